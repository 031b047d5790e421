"""The one place that turns (policy, corruption) into log-probabilities: shared views, chunks, recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from d1lit.processes import all_gather_objects
from d1lit.types import Corruption, MaskPredictor, Rollout, Scores

_ENTROPY_BUDGET = 64 * 2**20  # bytes of logits at a time


@dataclass(frozen=True)
class _ViewTable:
    """Which views run, which (rollout, k) pairs each of them scores, and where. Views nobody scores are left out."""

    views: Int[Tensor, " r"]
    pairs: Int[Tensor, "r J"]
    """Flat index n * K + k of the pairs of each view; -1 fills up where views have different numbers of pairs."""
    is_needed: Bool[Tensor, "r C"]
    """Completion positions that some pair of the view scores."""

    def chunks(self, size: int, count: int) -> Iterator[_ViewTable]:
        """Runs of at most `size` views, by rising number of scored positions, so that padding wastes little.

        Made up to `count` by runs of the first view with one position that no pair scores.
        """
        order = torch.argsort(self.is_needed.sum(-1), stable=True)
        parts = order.split(size) if len(order) else ()
        for part in parts:
            yield _ViewTable(self.views[part], self.pairs[part], self.is_needed[part])
        first = self.is_needed.new_zeros(1, self.is_needed.shape[1])
        first[:, 0] = True
        for _ in range(count - len(parts)):
            yield _ViewTable(self.views.new_zeros(1), self.pairs.new_full((1, 1), -1), first)

    def positions(self) -> tuple[Int[Tensor, "r M"], Bool[Tensor, "r M"]]:
        """The needed completion positions of each view, padded to the most of any, and which of them are real."""
        counts = self.is_needed.sum(-1)
        most = int(counts.max())
        places = torch.argsort((~self.is_needed).to(torch.int8), dim=-1, stable=True)[:, :most]
        return places, torch.arange(most, device=counts.device) < counts[:, None]


def _view_table(corruption: Corruption) -> _ViewTable:
    """Turn `view_of` (views of each rollout) round: the scored pairs of each view, and the positions they want."""
    num_views = len(corruption.noised_ids)
    view_of = corruption.view_of.flatten()
    is_scored = corruption.weight.flatten(0, 1) != 0
    pairs = torch.nonzero((view_of >= 0) & is_scored.any(-1)).squeeze(-1)
    pairs = pairs[torch.argsort(view_of[pairs], stable=True)]
    view = view_of[pairs]
    per_view = torch.bincount(view, minlength=num_views)
    rank_in_view = torch.arange(len(pairs), device=view.device) - (per_view.cumsum(0) - per_view)[view]
    table = view.new_full((num_views, int(per_view.max()) if len(pairs) else 0), -1)
    table[view, rank_in_view] = pairs
    is_needed = is_scored.new_zeros(num_views, is_scored.shape[-1], dtype=torch.int32)
    is_needed = is_needed.index_add_(0, view, is_scored[pairs].int()) > 0
    views = torch.nonzero(per_view).squeeze(-1)
    return _ViewTable(views, table[views], is_needed[views])


def score(
    policy: MaskPredictor,
    rollout: Rollout,
    corruption: Corruption,
    want_entropy: bool = False,
    views_per_chunk: int | None = None,
) -> Scores:
    """Log-probability of every scored target of a corruption, differentiable in the policy's parameters.

    Each view runs once, whatever the number of rollouts that share it; the last block and the head work only at
    positions that some rollout scores. In more than one chunk, with gradients, a chunk's body is recomputed backward,
    so that activations of one chunk exist at a time; what stays of every view are the final hidden states of its
    scored positions. The values do not depend on the chunks beyond rounding. Where parameters are sharded (FSDP) all
    processes run as many chunks: one with fewer views to score runs others, of which nothing is scored.

    Guidance runs every view again with its whole prompt masked (on top of the view's own masks). The head is linear,
    so the guided logits u + (s + 1)(c - u) are the head of the same combination of hidden states.

    Args:
        policy: the network.
        rollout: what is scored; only the length of its prompts is read.
        corruption: views, targets and weights.
        want_entropy: also the entropy of the prediction at every scored position.
        views_per_chunk: views in one forward, at least 1; None takes all at once.
    """
    shape = corruption.target_ids.shape
    num_tokens = shape[2]
    plan = _view_table(corruption)
    size = max(1, min(views_per_chunk or len(plan.views), len(plan.views)))
    num_chunks = _num_chunks(policy, -(-len(plan.views) // size))
    if num_chunks == 0:
        nothing = torch.zeros(shape, device=corruption.weight.device)
        return Scores(nothing, nothing.clone() if want_entropy else None)
    if corruption.attention is not None and bool(corruption.attention.all()):
        corruption = replace(corruption, attention=None)  # nothing hidden: SDPA's fast kernels take no mask
    recompute = torch.is_grad_enabled() and num_chunks > 1
    prompt_length = rollout.prompt_ids.shape[1]

    logprobs, entropies, places = [], [], []
    for chunk in plan.chunks(size, num_chunks):
        position, is_real = chunk.positions()
        hidden = _hidden(policy, corruption, chunk.views, corruption.score_from + position, prompt_length, recompute)
        flat = hidden.flatten(0, 1)
        place = (chunk.pairs[:, None, :] * num_tokens + position[..., None]).clamp(min=0)
        targets = corruption.target_ids.flatten()[place]
        values = policy.logprobs(flat, targets.flatten(0, 1), corruption.temperature, corruption.exclude_mask)
        values = values.view(place.shape)
        wanted = is_real[..., None] & (chunk.pairs[:, None] >= 0) & (corruption.weight.flatten()[place] != 0)
        logprobs.append(values[wanted])
        places.append(place[wanted])
        if want_entropy:
            entropy = _entropy(policy, flat, corruption).view(position.shape)
            entropies.append(entropy[..., None].expand(place.shape)[wanted])
    index = (torch.cat(places),)
    return Scores(
        _scatter(index, torch.cat(logprobs), shape),
        _scatter(index, torch.cat(entropies), shape) if want_entropy else None,
    )


def _num_chunks(policy: MaskPredictor, own: int) -> int:
    """Forwards of this call: where parameters are sharded, as many as the process with the most, for each gathers.

    With gradients at least one: a loss of nothing has gradients too, of zero, which other processes wait for.
    """
    own = max(own, int(torch.is_grad_enabled()))
    return max(all_gather_objects(own)) if isinstance(policy, FSDPModule) else own


def _scatter(index: tuple[Int[Tensor, " n"]], values: Float[Tensor, " n"], shape: torch.Size) -> Float[Tensor, "N K C"]:
    return values.new_zeros(shape.numel()).index_put(index, values).view(shape)


def _hidden(
    policy: MaskPredictor,
    corruption: Corruption,
    views: Int[Tensor, " r"],
    keep: Int[Tensor, "r M"],
    prompt_length: int,
    recompute: bool,
) -> Float[Tensor, "r M D"]:
    """Hidden states of some views at their scored positions, guided where the corruption asks for it."""
    ids = corruption.noised_ids[views]
    attention = None if corruption.attention is None else corruption.attention[views]
    position_ids = None if corruption.position_ids is None else corruption.position_ids[views]

    def run(ids: Tensor) -> Tensor:
        conditional = policy.hidden(ids, attention, position_ids, keep)
        if corruption.guidance == 0:
            return conditional
        blind = ids.clone()
        blind[:, :prompt_length] = policy.mask_token_id
        unconditional = policy.hidden(blind, attention, position_ids, keep)
        exact = torch.promote_types(unconditional.dtype, torch.float32)
        unconditional = unconditional.to(exact)
        return unconditional + (corruption.guidance + 1.0) * (conditional.to(exact) - unconditional)

    if not recompute:
        return run(ids)
    hidden = checkpoint(run, ids, use_reentrant=False)
    assert isinstance(hidden, Tensor)
    return hidden


@torch.no_grad()
def _entropy(policy: MaskPredictor, hidden: Float[Tensor, "M D"], corruption: Corruption) -> Float[Tensor, " M"]:
    """Entropy in nats, a few positions at a time."""
    first = policy.head(hidden[:1])
    rows = max(1, _ENTROPY_BUDGET // (3 * first.shape[-1] * first.element_size()))
    parts = []
    for part in hidden.split(rows):
        logits = policy.head(part) / corruption.temperature
        if corruption.exclude_mask:
            logits[:, policy.mask_token_id] = torch.finfo(logits.dtype).min  # not -inf, which times 0 is NaN
        logprobs = logits.log_softmax(-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts)
