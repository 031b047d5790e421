"""From a canvas to tokens and scores at chosen positions, without a tensor of all positions times the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d1lit import attention as patterns
from d1lit.models.head import GPU_TAIL_BYTES
from d1lit.sampling.cache import SpanStorage
from d1lit.sampling.parts import Cells, Choice, Confidence, Prediction, Proposal
from d1lit.sampling.proposal import greedy
from d1lit.types import MaskPredictor, OrderPredictor

_CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": GPU_TAIL_BYTES}
"""Size of one temporary of the tail (softmax, scaled logits): within the cache on a CPU, few launches on a GPU."""


@contextmanager
def evaluation_mode(policy: MaskPredictor) -> Iterator[None]:
    """Dropout off while sampling; each module gets its own flag back. Nothing happens to a policy that keeps it on."""
    if getattr(policy, "keeps_dropout", False):
        yield
        return
    network: object = policy
    training = [m for m in network.modules() if m.training] if isinstance(network, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Canvas:
    """Rows as the network sees them: prompt and completion, tokens or masks."""

    ids: Int[Tensor, "n L"]
    attention: Bool[Tensor, "n L"] | Bool[Tensor, "n L L"] | None
    """None where no prompt is padded."""
    prompt_length: int
    position_ids: Int[Tensor, "n L"] | None = None
    """None: the place in the canvas."""


def block_causal(canvas: Canvas, block_length: int) -> Canvas:
    """The canvas with every block seeing the prompt, the blocks before it and itself; the prompt sees itself."""
    ids, start = canvas.ids, canvas.prompt_length
    place = torch.arange(ids.shape[1], device=ids.device) - start
    block = place.div(block_length, rounding_mode="floor").clamp(min=-1)[None]
    return replace(canvas, attention=patterns.block_causal(block, canvas.attention).expand(len(ids), -1, -1))


def any_order(canvas: Canvas, commit_step: Int[Tensor, "n C"]) -> Canvas:
    """The canvas attended in the order of commitment (d2-AnyOrder, arXiv 2509.21474); nobody sees another's mask.

    A mask sees the prompt and every committed token; a committed one the prompt, those committed before it and, of its
    own step, those to its left; the prompt itself.
    """
    ids, start = canvas.ids, canvas.prompt_length
    committed, place = commit_step >= 0, torch.arange(commit_step.shape[1], device=ids.device)
    before = (commit_step[:, None] < commit_step[:, :, None]) | (
        (commit_step[:, None] == commit_step[:, :, None]) & (place < place[:, None])
    )
    attention = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
    attention[:, :, :start] = True if canvas.attention is None else canvas.attention[:, None, :start]
    attention[:, start:, start:] = committed[:, None] & (before | ~committed[:, :, None])
    return replace(canvas, attention=attention | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device))


def guided(
    conditional: Float[Tensor, "n M V"], unconditional: Float[Tensor, "n M V"], guidance: float
) -> Float[Tensor, "n M V"]:
    """Classifier-free guidance u + (s + 1)(c - u)."""
    return unconditional + (guidance + 1) * (conditional - unconditional)


@dataclass(frozen=True)
class View:
    """The part of the canvas that one forward computes."""

    span: tuple[int, int]
    cache: SpanStorage | None


def predict(
    policy: MaskPredictor, canvas: Canvas, keep: Int[Tensor, "n M"], guidance: float, view: View | None = None
) -> Float[Tensor, "n M V"]:
    """Logits at the kept positions of the canvas."""
    return predict_with_order(policy, canvas, keep, guidance, view)[0]


def predict_with_order(
    policy: MaskPredictor, canvas: Canvas, keep: Int[Tensor, "n M"], guidance: float, view: View | None = None
) -> tuple[Float[Tensor, "n M V"], Float[Tensor, "n M"] | None]:
    """Logits at the kept positions of the canvas, and the scores of the order head where the network has one.

    With guidance both halves go through the network in one call, and the conditional one says the order. The
    unconditional half sees every prompt position as a mask, left padding included (as LLaDA and d1 do).
    """
    ids, attention = canvas.ids, canvas.attention
    if guidance:
        blind = ids.clone()
        blind[:, : canvas.prompt_length] = policy.mask_token_id
        ids, keep = torch.cat([ids, blind]), keep.repeat(2, 1)
        attention = None if attention is None else attention.repeat(2, *[1] * (attention.dim() - 1))
    cache = None
    if view is not None:
        start, stop = view.span
        ids, keep, cache = ids[:, start:stop], keep - start, view.cache
        attention = attention[:, start:stop] if attention is not None and attention.dim() == 3 else attention
    hidden = policy.hidden(ids, attention, canvas.position_ids, keep, cache)
    logits = policy.head(hidden)
    order = policy.order_scores(hidden[: len(canvas.ids)]) if isinstance(policy, OrderPredictor) else None
    if not guidance:
        return logits, order
    conditional, unconditional = logits.chunk(2)
    return guided(conditional, unconditional, guidance), order


def rows_per_chunk(logits: Float[Tensor, "c V"]) -> int:
    """Rows of logits whose softmax fits the budget of the device."""
    budget = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES["cuda"])
    return max(1, budget // (logits.shape[1] * logits.element_size()))


def choose(
    logits: Float[Tensor, "n M V"],
    cells: Cells,
    mask_token_id: int,
    temperature: float,
    proposal: Proposal,
    confidence: Confidence,
    order_scores: Float[Tensor, "n M"] | None = None,
) -> tuple[Choice, Float[Tensor, "n M"]]:
    """A token and a confidence for each cell (the choice is flat, n * M).

    Done in chunks of rows: next to the logits themselves no other tensor of the size of the vocabulary lives long.
    """
    flat = logits.flatten(0, 1)
    noise = proposal.uniforms(cells, flat.shape[1]).flatten(0, 1) if temperature > 0 else None
    order = confidence.uniforms(cells)
    order = None if order is None else order.flatten()
    positions = cells.positions.flatten()
    size = rows_per_chunk(flat)
    tokens, logprobs, scores = [], [], []
    for start in range(0, len(flat), size):
        part = slice(start, start + size)
        ranked = None if order_scores is None else order_scores.flatten()[part]
        prediction = Prediction(flat[part], torch.softmax(flat[part], dim=-1), mask_token_id, ranked)
        choice = greedy(prediction) if noise is None else proposal.draw(prediction, temperature, noise[part])
        scores.append(confidence.score(prediction, choice, positions[part], None if order is None else order[part]))
        tokens.append(choice.tokens)
        logprobs.append(choice.logprobs)
    return Choice(torch.cat(tokens), torch.cat(logprobs)), torch.cat(scores).view(cells.positions.shape)


def entropies(logits: Float[Tensor, "c V"], rows: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Entropy in nats, at temperature 1, of the predictions in some rows: only committed positions pay for it."""
    size = rows_per_chunk(logits)
    parts = [torch.special.entr(torch.softmax(logits[chunk], dim=-1)).sum(-1) for chunk in rows.split(size)]
    return torch.cat(parts) if parts else logits.new_zeros(0)
