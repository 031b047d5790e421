"""Log-probabilities and entropies from hidden states without a [M, V] tensor in memory.

Rows go through the vocabulary in chunks. With a frozen head the backward pass needs the vocabulary no more: the
gradient of sum_j c_j log p(y_j) with respect to the hidden state is sum_j c_j W[y_j] - (sum_j c_j) E_p[W], and the
expectation E_p[W], one vector a position, is kept from the forward pass. With a trainable head a chunk is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_BUDGET = 64 * 2**20  # bytes for the logits of one chunk
_SLICE = 8192  # rows of a low-precision head cast at a time where the device cannot accumulate in fp32 by itself


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


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """In place: logits become probabilities; returns them and the log of the normaliser."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return logits.div_(total), (top + total.log()).squeeze(-1)


class _FrozenHead(torch.autograd.Function):
    """Keeps E_p[W] for the backward pass where a gradient to the hidden states is wanted."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int, keep: bool
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            values = hidden.new_empty(targets.shape, dtype=_exact(weight.dtype))
            expectation = hidden.new_empty(hidden.shape, dtype=values.dtype) if keep else None
            for start in range(0, len(hidden), rows):
                stop = start + rows
                logits = _project(hidden[start:stop], weight).div_(temperature)
                chosen = logits.gather(1, targets[start:stop])
                if expectation is None:
                    values[start:stop] = chosen - _log_normaliser_(logits)[:, None]
                    continue
                probabilities, normaliser = _softmax_(logits)
                values[start:stop] = chosen - normaliser[:, None]
                expectation[start:stop] = _mix(probabilities, weight)
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
        return result, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Recomputes each chunk in the backward pass, which also yields the gradient of the head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            values = hidden.new_empty(targets.shape, dtype=_exact(weight.dtype))
            for start in range(0, len(hidden), rows):
                logits = _project(hidden[start : start + rows], weight).div_(temperature)
                chosen = logits.gather(1, targets[start : start + rows])
                values[start : start + rows] = chosen - _log_normaliser_(logits)[:, None]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.rows = temperature, rows
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        hidden, weight, targets = ctx.saved_tensors
        exact = _exact(weight.dtype)
        to_hidden = torch.empty_like(hidden)
        to_weight = weight.new_zeros(weight.shape, dtype=exact)
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            share = gradient[part].to(exact) / ctx.temperature
            probabilities, _ = _softmax_(_project(hidden[part], weight).div_(ctx.temperature))
            pull = probabilities.mul_(-share.sum(-1, keepdim=True)).scatter_add_(1, targets[part], share)
            to_hidden[part] = _mix(pull, weight).to(hidden.dtype)
            to_weight.addmm_(pull.T, hidden[part].to(exact))
        return to_hidden, to_weight.to(weight.dtype), None, None, None


def _log_normaliser_(logits: Tensor) -> Tensor:
    """logsumexp over the vocabulary, overwriting the logits; faster than torch.logsumexp, which copies them."""
    top = logits.amax(-1, keepdim=True)
    return (top + logits.sub_(top).exp_().sum(-1, keepdim=True).log()).squeeze(-1)


def chunked_logprobs(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "M J"],
    temperature: float = 1.0,
    budget: int = DEFAULT_BUDGET,
) -> Float[Tensor, "M J"]:
    """log softmax(hidden @ weight.T / temperature) at J targets a position, in fp32.

    Args:
        hidden: final hidden states of the scored positions.
        weight: the head; its gradient is returned only where it requires one.
        targets: token ids.
        temperature: divides the logits.
        budget: bytes that the logits of one chunk may take.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to score tokens, got {temperature}. Use 1 for the plain model.")
    rows = rows_per_chunk(len(weight), budget, torch.finfo(_exact(weight.dtype)).bits // 8)
    wants_gradient = torch.is_grad_enabled()
    if wants_gradient and weight.requires_grad:
        values = _TrainableHead.apply(hidden, _working_weight(weight), targets, temperature, rows)
    else:
        keep = wants_gradient and hidden.requires_grad
        values = _FrozenHead.apply(hidden, _working_weight(weight), targets, temperature, rows, keep)
    assert isinstance(values, Tensor)
    return values


@torch.no_grad()
def chunked_entropy(
    hidden: Float[Tensor, "M D"], weight: Float[Tensor, "V D"], temperature: float = 1.0, budget: int = DEFAULT_BUDGET
) -> Float[Tensor, " M"]:
    """Entropy in nats of softmax(hidden @ weight.T / temperature); no gradient."""
    weight = _working_weight(weight)
    exact = _exact(weight.dtype)
    rows = max(1, rows_per_chunk(len(weight), budget, torch.finfo(exact).bits // 8) // 2)
    entropy = hidden.new_empty(len(hidden), dtype=exact)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            logits = _project(hidden[start : start + rows], weight).div_(temperature)
            probabilities, normaliser = _softmax_(logits.clone())
            entropy[start : start + rows] = normaliser - probabilities.mul_(logits).sum(-1)
    return entropy
