"""Log-probabilities and entropies from hidden states without a [M, V] tensor in memory.

The logits are formed tile by tile, many positions times a part of the vocabulary, with a running maximum and sum. With
a frozen head the backward pass needs the vocabulary no more: the gradient of sum_j c_j log p(y_j) with respect to the
hidden state is sum_j c_j W[y_j] - (sum_j c_j) E_p[W], and the expectation E_p[W], one vector a position, is kept from
the forward pass. With a trainable head a tile is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_BUDGET = 16 * 2**20  # bytes for the logits of one tile
GPU_BUDGET = 256 * 2**20  # there every tile costs launches, and nothing is gained by staying within a cache
GPU_TAIL_BYTES = 512 * 2**20  # bytes of one softmax where tokens are drawn on a GPU
_ROWS, _COLUMNS = 1024, 4096  # a tile of this size keeps products of matrices efficient; taller or wider gains nothing
_FEW = 4  # positions up to which the head is not worth reordering
_SLICE = 8192  # rows of a low-precision head cast at a time where the device cannot accumulate in fp32 by itself


def default_budget(device_type: str) -> int:
    """Bytes for the logits of one tile where nobody said."""
    return GPU_BUDGET if device_type == "cuda" else DEFAULT_BUDGET


def rows_per_chunk(vocab_size: int, budget: int, itemsize: int = 4) -> int:
    """How many positions' logits fit `budget` bytes; at least one."""
    return max(1, budget // (vocab_size * itemsize))


def _working_weight(weight: Tensor) -> Tensor:
    """The head in the dtype its products are taken in: autocast's for a float32 master copy, else its own."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return weight.to(torch.get_autocast_dtype(device))
    return weight


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T, accumulated and returned in fp32 (fp64 for fp64 weights)."""
    if weight.dtype in (torch.float32, torch.float64):
        return hidden.to(weight.dtype) @ weight.T
    if weight.is_cuda:
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    exact = hidden.float()
    for start in range(0, len(weight), _SLICE):
        logits[:, start : start + _SLICE] = exact @ weight[start : start + _SLICE].float().T
    return logits


def few_logits(hidden: Float[Tensor, "*M D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "*M V"] | None:
    """Logits of two to four positions by the product the other way round; None where that gains nothing.

    For `hidden @ weight.T` a CPU library first copies all of the head into its own order, which for so few positions
    takes several times as long as the product itself.
    """
    count = hidden.shape[:-1].numel()
    is_plain = hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32
    if not is_plain or torch.is_grad_enabled() or not 2 <= count <= _FEW:
        return None
    return (weight @ hidden.flatten(0, -2).T).T.contiguous().view(*hidden.shape[:-1], -1)


def _mix(probabilities: Tensor, weight: Tensor) -> Tensor:
    """probabilities @ weight, accumulated and returned in fp32 (fp64 for fp64 weights)."""
    if weight.dtype in (torch.float32, torch.float64):
        return probabilities @ weight
    if weight.is_cuda:
        return torch.mm(probabilities.to(weight.dtype), weight, out_dtype=torch.float32)
    mixed = probabilities.new_zeros(len(probabilities), weight.shape[1])
    for start in range(0, len(weight), _SLICE):
        mixed += probabilities[:, start : start + _SLICE] @ weight[start : start + _SLICE].float()
    return mixed


def tile_shape(positions: int, vocab_size: int, budget: int, itemsize: int = 4) -> tuple[int, int]:
    """Positions and tokens whose logits are formed at a time, within `budget` bytes where that is at all possible."""
    room = max(1, budget // itemsize)
    rows = max(1, min(positions, _ROWS, room // min(vocab_size, _COLUMNS)))
    return rows, max(1, min(vocab_size, room // rows))


def _logits(hidden: Tensor, weight: Tensor, temperature: float, start: int, excluded: int | None) -> Tensor:
    """Logits of a tile that begins with token `start`; that of an excluded token is the lowest there is."""
    logits = _project(hidden, weight)
    if temperature != 1.0:
        logits.div_(temperature)
    if excluded is not None and start <= excluded < start + len(weight):
        # Not -inf: a tile that holds nothing else would turn the running sum into NaN.
        logits[:, excluded - start] = torch.finfo(logits.dtype).min
    return logits


def _tiles(weight: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of the vocabulary, with the id of their first token."""
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns]


def _within(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and their place in it (any place for the others)."""
    place = targets - start
    return (place >= 0) & (place < width), place.clamp(0, width - 1)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    excluded: int | None,
    columns: int,
    expectation: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logits of the targets and log of the normaliser; fills `expectation` with E_p[W] where it is given.

    One pass over the vocabulary: sums are kept relative to the largest logit so far, as in streaming softmax.
    """
    exact = _exact(weight.dtype)
    chosen = hidden.new_zeros(targets.shape, dtype=exact)
    top = hidden.new_full((len(hidden), 1), -torch.inf, dtype=exact)
    total = torch.zeros_like(top)
    for start, part in _tiles(weight, columns):
        logits = _logits(hidden, part, temperature, start, excluded)
        inside, place = _within(targets, start, len(part))
        chosen = torch.where(inside, logits.gather(1, place), chosen)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        shrink = (top - higher).exp_()
        logits.sub_(higher).exp_()
        total = total * shrink + logits.sum(-1, keepdim=True)
        if expectation is not None:
            expectation.mul_(shrink).add_(_mix(logits, part))
        top = higher
    if expectation is not None:
        expectation.div_(total)
    return chosen, top + total.log_()


class _FrozenHead(torch.autograd.Function):
    """Keeps E_p[W] for the backward pass where a gradient to the hidden states is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        excluded: int | None,
        tile: tuple[int, int],
        keep: bool,
    ) -> Tensor:
        rows, columns = tile
        with torch.autocast(hidden.device.type, enabled=False):
            values = hidden.new_empty(targets.shape, dtype=_exact(weight.dtype))
            expectation = hidden.new_zeros(hidden.shape, dtype=values.dtype) if keep else None
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                mean = None if expectation is None else expectation[part]
                chosen, normaliser = _walk(hidden[part], weight, targets[part], temperature, excluded, columns, mean)
                values[part] = chosen - normaliser
        if expectation is not None:
            ctx.save_for_backward(weight, targets, expectation)
            ctx.temperature, ctx.dtype, ctx.rows = temperature, hidden.dtype, rows
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        weight, targets, expectation = ctx.saved_tensors
        result = expectation.new_empty(expectation.shape, dtype=ctx.dtype)
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            share = gradient[part].to(expectation.dtype)
            pull = share.sum(-1, keepdim=True) * expectation[part]
            pull.neg_()
            for j in range(targets.shape[1]):
                pull += share[:, j, None] * weight[targets[part, j]].to(pull.dtype)
            result[part] = pull / ctx.temperature
        return result, None, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Recomputes each tile in the backward pass, which also yields the gradient of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        excluded: int | None,
        tile: tuple[int, int],
    ) -> Tensor:
        rows, columns = tile
        with torch.autocast(hidden.device.type, enabled=False):
            values = hidden.new_empty(targets.shape, dtype=_exact(weight.dtype))
            normaliser = hidden.new_empty((len(hidden), 1), dtype=values.dtype)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                place = hidden[part], weight, targets[part]
                chosen, normaliser[part] = _walk(*place, temperature, excluded, columns, None)
                values[part] = chosen - normaliser[part]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature, ctx.excluded, ctx.tile = temperature, excluded, tile
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        hidden, weight, targets, normaliser = ctx.saved_tensors
        rows, columns = ctx.tile
        exact = _exact(weight.dtype)
        to_hidden = hidden.new_zeros(hidden.shape, dtype=exact)
        to_weight = weight.new_zeros(weight.shape, dtype=exact)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            share = gradient[part].to(exact) / ctx.temperature
            for start, tokens in _tiles(weight, columns):
                inside, place = _within(targets[part], start, len(tokens))
                logits = _logits(hidden[part], tokens, ctx.temperature, start, ctx.excluded)
                pull = logits.sub_(normaliser[part]).exp_()
                pull.mul_(-share.sum(-1, keepdim=True)).scatter_add_(1, place, share * inside)
                to_hidden[part] += _mix(pull, tokens)
                to_weight[start : start + len(tokens)].addmm_(pull.T, hidden[part].to(exact))
        return to_hidden.to(hidden.dtype), to_weight.to(weight.dtype), None, None, None, None


def chunked_logprobs(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "M J"],
    temperature: float = 1.0,
    budget: int = DEFAULT_BUDGET,
    excluded: int | None = None,
) -> Float[Tensor, "M J"]:
    """log softmax(hidden @ weight.T / temperature) at J targets a position, in fp32.

    Args:
        hidden: final hidden states of the scored positions.
        weight: the head; its gradient is returned only where it requires one.
        targets: token ids.
        temperature: divides the logits.
        budget: bytes that the logits of one tile may take.
        excluded: a token that takes no part in the softmax and is no target.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: must be positive to score tokens, got {temperature}. Try: 1, the plain model")
    tile = tile_shape(len(hidden), len(weight), budget, torch.finfo(_exact(weight.dtype)).bits // 8)
    wants_gradient = torch.is_grad_enabled()
    if wants_gradient and weight.requires_grad:
        values = _TrainableHead.apply(hidden, _working_weight(weight), targets, temperature, excluded, tile)
    else:
        keep = wants_gradient and hidden.requires_grad
        values = _FrozenHead.apply(hidden, _working_weight(weight), targets, temperature, excluded, tile, keep)
    assert isinstance(values, Tensor)
    return values


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """In place: logits become probabilities; returns them and the log of the normaliser."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return logits.div_(total), (top + total.log()).squeeze(-1)


@torch.no_grad()
def chunked_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    temperature: float = 1.0,
    budget: int = DEFAULT_BUDGET,
    excluded: int | None = None,
) -> Float[Tensor, " M"]:
    """Entropy in nats of softmax(hidden @ weight.T / temperature), without the `excluded` token; no gradient."""
    weight = _working_weight(weight)
    exact = _exact(weight.dtype)
    rows = max(1, rows_per_chunk(len(weight), budget, torch.finfo(exact).bits // 8) // 2)
    entropy = hidden.new_empty(len(hidden), dtype=exact)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            logits = _logits(hidden[start : start + rows], weight, temperature, 0, excluded)
            probabilities, normaliser = _softmax_(logits.clone())
            entropy[start : start + rows] = normaliser - probabilities.mul_(logits).sum(-1)
    return entropy
