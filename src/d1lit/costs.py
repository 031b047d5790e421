"""What the work of a network costs: floating-point operations by formula, and the rate this machine reaches.

Only products of matrices count (norms, softmax and sampling do not), a multiplication and an addition each as one
operation, as is usual for model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B). Letters as in d1lit.types.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch


@dataclass(frozen=True)
class NetworkShape:
    """The sizes that decide the cost of a bidirectional transformer with SwiGLU blocks."""

    width: int
    mlp_width: int
    kv_width: int
    """Width of keys and values; below `width` where heads are grouped."""
    num_layers: int
    vocab_size: int

    @property
    def block_params(self) -> int:
        """Matrix entries of one block: q, o, k, v, and the three of the MLP."""
        return 2 * self.width**2 + 2 * self.width * self.kv_width + 3 * self.width * self.mlp_width

    @property
    def body_params(self) -> int:
        """Matrix entries of all blocks."""
        return self.num_layers * self.block_params

    @property
    def head_params(self) -> int:
        """Entries of the head."""
        return self.vocab_size * self.width


LLADA_8B = NetworkShape(width=4096, mlp_width=12288, kv_width=4096, num_layers=32, vocab_size=126464)
"""For arithmetic about the published model (arXiv 2502.09992)."""


# ------------------------------------------------------------------------------------------------------------ a forward


@dataclass(frozen=True)
class Extent:
    """What one forward computes."""

    rows: int
    queries: int
    """Positions of each row that go through the network."""
    keys: int
    """Positions they attend to: more than `queries` under a cache."""
    kept: int
    """Positions at which the last block finishes its work."""


def full(rows: int, length: int) -> Extent:
    """Everything, everywhere."""
    return Extent(rows, length, length, length)


def linear_flops(shape: NetworkShape, extent: Extent) -> int:
    """Products with the weights of the body; the last block has q, o and its MLP at the kept positions only."""
    whole = extent.queries * shape.body_params
    left_out = (extent.queries - extent.kept) * (shape.block_params - 2 * shape.width * shape.kv_width)
    return 2 * extent.rows * (whole - left_out)


def attention_flops(shape: NetworkShape, extent: Extent) -> int:
    """Scores and mixtures of all blocks; the last one only for the kept queries."""
    queries = (shape.num_layers - 1) * extent.queries + extent.kept
    return 4 * extent.rows * queries * extent.keys * shape.width


def body_flops(shape: NetworkShape, extent: Extent) -> int:
    """A forward without the head."""
    return linear_flops(shape, extent) + attention_flops(shape, extent)


def body_backward_flops(
    shape: NetworkShape, extent: Extent, trains_weights: bool, recomputes_blocks: bool = False
) -> int:
    """The backward pass of `body_flops`: gradients of activations, of the weights where they train, and recomputation.

    Attention has four products backward for two forward; that fused kernels form the scores again is not counted.
    """
    linear = linear_flops(shape, extent) * (2 if trains_weights else 1)
    again = body_flops(shape, extent) if recomputes_blocks else 0
    return linear + 2 * attention_flops(shape, extent) + again


def adapter_flops(num_params: int, extent: Extent) -> int:
    """A forward through low-rank factors beside the matrices; as if the last block did not skip any."""
    return 2 * num_params * extent.rows * extent.queries


def head_flops(shape: NetworkShape, positions: int) -> int:
    """Logits at some positions."""
    return 2 * shape.head_params * positions


def logprob_flops(shape: NetworkShape, positions: int, with_gradient: bool, trains_head: bool) -> tuple[int, int]:
    """Forward and backward of log-probabilities at some positions, as models/head.py computes them.

    A frozen head forms logits and the expectation E_p[W] forward and nothing backward; a trained one forms logits
    twice, and backward the gradients of hidden states and weights.
    """
    once = head_flops(shape, positions)
    if not with_gradient:
        return once, 0
    return (once, 3 * once) if trains_head else (2 * once, 0)


# ------------------------------------------------------------------------------------------------- rollouts and updates


@dataclass(frozen=True)
class RolloutPlan:
    """A block sampler's work, every row running to the end, the same number of tokens fixed in every step."""

    rows: int
    prompt_length: int
    completion_length: int
    block_length: int
    steps_per_block: int
    span: Callable[[int, int, int], tuple[int, int]] | None = None
    """Under a cache, which positions the steps of a block after its first compute: of start, stop, canvas length."""
    looks_ahead: bool = False
    """Whether every forward predicts the masks behind the active block too."""
    rows_at_a_canvas: tuple[int, ...] | None = None
    """Of rollouts that branch, how many rows share each forward, step by step over the completion; None: each by
    itself."""

    @property
    def length(self) -> int:
        """Of the canvas."""
        return self.prompt_length + self.completion_length

    @property
    def num_blocks(self) -> int:
        """Blocks of the completion."""
        return self.completion_length // self.block_length

    @property
    def masked(self) -> list[int]:
        """Masked positions of the active block before each of its steps that fixes any."""
        whole, rest = divmod(self.block_length, self.steps_per_block)
        left, result = self.block_length, []
        for step in range(min(self.steps_per_block, self.block_length)):
            result.append(left)
            left -= whole + (step < rest)
        return result

    @property
    def predicted(self) -> list[int]:
        """Positions whose tokens each step of the whole completion predicts."""
        behind = range(self.completion_length - self.block_length, -1, -self.block_length)
        return [masked + (rest if self.looks_ahead else 0) for rest in behind for masked in self.masked]

    @property
    def most_predicted(self) -> int:
        """Positions of a row that the largest forward predicts."""
        return self.completion_length if self.looks_ahead else self.block_length


def textbook_rollout_flops(shape: NetworkShape, plan: RolloutPlan) -> int:
    """Every position through every block and the head in every step, as the published samplers do."""
    each = body_flops(shape, full(plan.rows, plan.length)) + head_flops(shape, plan.rows * plan.length)
    return plan.num_blocks * plan.steps_per_block * each


def exact_rollout_flops(shape: NetworkShape, plan: RolloutPlan) -> int:
    """The last block and the head at the masked positions only, of the active block or of all; once for rows at one
    canvas."""
    total = 0
    for number, masked in enumerate(plan.predicted):
        block, step = divmod(number, len(plan.masked))
        shared = 1 if plan.rows_at_a_canvas is None else plan.rows_at_a_canvas[block * plan.steps_per_block + step]
        rows = plan.rows // shared
        total += body_flops(shape, replace(full(rows, plan.length), kept=masked)) + head_flops(shape, rows * masked)
    return total


def rollout_flops(shape: NetworkShape, plan: RolloutPlan) -> int:
    """As the sampler works: the first step of a block as `exact_rollout_flops`, later ones on the plan's span."""
    if plan.span is None:
        return exact_rollout_flops(shape, plan)
    total = 0
    for start in range(plan.prompt_length, plan.length, plan.block_length):
        first, last = plan.span(start, start + plan.block_length, plan.length)
        for step, masked in enumerate(plan.masked):
            queries = plan.length if step == 0 else last - first
            body = body_flops(shape, Extent(plan.rows, queries, plan.length, masked))
            total += body + head_flops(shape, plan.rows * masked)
    return total


def dual_cache_rollout_flops(shape: NetworkShape, plan: RolloutPlan) -> int:
    """The first step of a block as `exact_rollout_flops`, the later ones on the block alone."""
    total = 0
    for step, masked in enumerate(plan.masked):
        queries = plan.length if step == 0 else plan.block_length
        body = body_flops(shape, Extent(plan.rows, queries, plan.length, masked))
        total += body + head_flops(shape, plan.rows * masked)
    return plan.num_blocks * total


def scoring_flops(shape: NetworkShape, views: int, prompt_length: int, completion_length: int) -> int:
    """Log-probabilities of completions, one view each, without gradient."""
    extent = Extent(views, prompt_length + completion_length, prompt_length + completion_length, completion_length)
    return body_flops(shape, extent) + head_flops(shape, views * completion_length)


def update_flops(
    shape: NetworkShape, views: int, prompt_length: int, completion_length: int, trains_weights: bool = False
) -> int:
    """Forward and backward of a policy loss with a frozen head."""
    extent = Extent(views, prompt_length + completion_length, prompt_length + completion_length, completion_length)
    head, _ = logprob_flops(shape, views * completion_length, with_gradient=True, trains_head=False)
    return body_flops(shape, extent) + head + body_backward_flops(shape, extent, trains_weights)


# ------------------------------------------------------------------------------------------------------------- counting


@dataclass
class Work:
    """A running count of what a network has computed."""

    forwards: int = 0
    tokens: int = 0
    """Positions that went through the body, over all rows."""
    flops: int = 0

    def plus(self, other: Work) -> Work:
        """The sum of two counts."""
        return Work(self.forwards + other.forwards, self.tokens + other.tokens, self.flops + other.flops)

    def since(self, earlier: Work) -> Work:
        """What was added after `earlier`."""
        return Work(self.forwards - earlier.forwards, self.tokens - earlier.tokens, self.flops - earlier.flops)


@dataclass
class SectionCost:
    """What one part of the training loop took."""

    seconds: float = 0.0
    work: Work = field(default_factory=Work)
    peak_memory_mb: float = 0.0
    """Most memory held during it: of the device's allocator on a GPU, of the whole process on a CPU."""

    def add(self, other: SectionCost) -> None:
        """Sum of both; of the memory, the larger."""
        self.seconds += other.seconds
        self.work = self.work.plus(other.work)
        self.peak_memory_mb = max(self.peak_memory_mb, other.peak_memory_mb)


def utilisation(flops: int, seconds: float, peak: float) -> float:
    """Share of the peak rate that was reached (MFU)."""
    return flops / seconds / peak if seconds > 0 and peak > 0 else 0.0


@cache
def matmul_peak(device_type: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations a second of the best of some square products, measured once a process.

    1024 x 1024 on a CPU; larger on a GPU, where such a product would be over before the next one is launched.
    """
    size = 1024 if device_type == "cpu" else 8192
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(size, size, generator=generator).to(device_type, dtype) for _ in range(2))
    best = float("inf")
    with torch.inference_mode(), torch.autocast(device_type, enabled=False):
        for _ in range(repeats + 1):  # the first one warms up
            synchronise(device_type)
            start = time.perf_counter()
            torch.mm(left, right)
            synchronise(device_type)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronise(device_type: str) -> None:
    """Wait until a GPU has done what it was asked; nothing on a CPU."""
    if device_type == "cuda":
        torch.cuda.synchronize()
