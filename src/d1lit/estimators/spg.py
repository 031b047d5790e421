"""SPG: a lower bound where the advantage is positive, an upper bound (or a mixture) where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.draws import random_subset
from d1lit.estimators.views import completion_views, mask_prompt
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs

Masks = Bool[Tensor, "N K C"]
MaskLaw = Callable[[Context, int], tuple[Masks, Masks]]
"""(context, K) -> which valid completion tokens K views hide by themselves, and which they leave clean as context."""


def _random_counts(context: Context, allowed: Bool[Tensor, "N C"], index: int) -> Bool[Tensor, "N C"]:
    """A uniformly random number of the allowed tokens, at least one where any is allowed, at random places."""
    rows = context.rollout.row_ids
    count = (context.draws.uniform("mask_count", rows, (), step=index) * allowed.sum(1)).to(torch.int64) + 1
    return random_subset(context.draws.uniform("mask", rows, (allowed.shape[1],), step=index), count, allowed)


def hide_all(context: Context, num_masks: int) -> tuple[Masks, Masks]:
    """The whole completion is hidden (SPG's `all`)."""
    valid = context.rollout.completion_mask[:, None, :].expand(-1, num_masks, -1)
    return valid, torch.zeros_like(valid)


def hide_random(context: Context, num_masks: int) -> tuple[Masks, Masks]:
    """A random number of completion tokens at random places (SPG's `random`); the rest is no context to be masked."""
    valid = context.rollout.completion_mask
    hidden = torch.stack([_random_counts(context, valid, k) for k in range(num_masks)], dim=1)
    return hidden, torch.zeros_like(hidden)


def _chosen_blocks(context: Context, num_masks: int, block_length: int) -> tuple[Int[Tensor, " C"], Int[Tensor, "N K"]]:
    """The block of each position, and K blocks of each rollout, drawn without replacement (in rounds for large K)."""
    valid = context.rollout.completion_mask
    block = torch.arange(valid.shape[1], device=valid.device) // block_length
    num_blocks = (valid.sum(1) - 1).clamp(min=0) // block_length + 1
    total = int(block[-1]) + 1
    order = context.draws.uniform("block", context.rollout.row_ids, (total,)).argsort(dim=1)
    order = order[:, torch.arange(num_masks, device=valid.device) % total]
    return block, order % num_blocks[:, None]


def hide_block(context: Context, num_masks: int, block_length: int) -> tuple[Masks, Masks]:
    """One random block hidden as a whole, earlier blocks clean, later ones hidden (SPG's `block_all`)."""
    block, chosen = _chosen_blocks(context, num_masks, block_length)
    valid = context.rollout.completion_mask[:, None, :]
    hidden = (block >= chosen[:, :, None]) & valid
    return hidden, ~hidden & valid


def hide_in_block(context: Context, num_masks: int, block_length: int) -> tuple[Masks, Masks]:
    """A random number of tokens of one random block, earlier blocks clean, later hidden (SPG's `block_random`)."""
    block, chosen = _chosen_blocks(context, num_masks, block_length)
    valid = context.rollout.completion_mask
    inside = [_random_counts(context, (block == chosen[:, k : k + 1]) & valid, k) for k in range(num_masks)]
    hidden = torch.stack(inside, dim=1) | ((block > chosen[:, :, None]) & valid[:, None, :])
    return hidden, ~hidden & valid[:, None, :]


def _at_random(context: Context, clean: Bool[Tensor, "N C"], prob: float, index: int) -> Bool[Tensor, "N C"]:
    """Each clean context token with a small probability."""
    if prob == 0:
        return torch.zeros_like(clean)
    return clean & (context.draws.uniform("context_mask", context.rollout.row_ids, clean.shape[1:], step=index) < prob)


@dataclass(frozen=True)
class SPGEstimator:
    """Sandwiched policy gradient (SPG, arXiv 2510.09541): the bound is chosen by the sign of the advantage.

        A > 0:  ELBO = mean_j mean_{i hidden in j} log p_ij
        else:   omega EUBO + (1 - omega) ELBO,
                EUBO = mean_i (1 / beta) log( (1 / m) sum_{j hides i} p_ij^beta / (hidden share of j) )

    Both bounds are per-token means, and the unit's weight is the length, so the loss is `-sum A l |o| / sum |o|`.
    Later blocks are scored too, as in the authors' code.
    """

    mask: MaskLaw
    """`hide_in_block`, `hide_block`, `hide_random` or `hide_all`."""
    num_masks: int
    context_mask_prob: float
    """Probability of hiding a token of the prompt or of the clean part of the completion."""
    eubo_beta: float
    mix_weight: float
    """omega: 1 for the EUBO alone, 0 for the ELBO alone."""
    ignore_negative: bool = False
    """Give rollouts without a positive advantage the constant likelihood 0 (the ablation without negative rows)."""
    score_context: bool = True
    """Score context tokens of the completion that were hidden at random too, as in the authors' code."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.eubo_beta < 1:
            raise ValueError(f"estimator.eubo_beta: must be >= 1 for an upper bound, got {self.eubo_beta}. Try: 1.5")
        if not 0 <= self.mix_weight <= 1:
            raise ValueError(f"estimator.mix_weight: must be in [0, 1], got {self.mix_weight}. Try: 0.5")

    @property
    def traits(self) -> EstimatorTraits:
        """A sequence's bound, the upper one alone where nothing is mixed in."""
        return EstimatorTraits(
            "sequence",
            needs_advantages=True,
            is_upper_bound=self.mix_weight == 1 and not self.ignore_negative,
            parts=frozenset({"elbo", "eubo"}),
        )

    def corrupt(self, context: Context) -> Corruption:
        """m views of each rollout; everything after the end of the sequence is hidden in all of them."""
        rollout, prob = context.rollout, self.context_mask_prob
        scored, clean = self.mask(context, self.num_masks)
        prompts, hidden = [], []
        for k in range(self.num_masks):
            hidden.append(scored[:, k] | _at_random(context, clean[:, k], prob, k))
            prompts.append(mask_prompt(rollout, context, rollout.row_ids, slice(None), k, prob))
        hidden = torch.stack(hidden, dim=1)
        shown = ~hidden & rollout.completion_mask[:, None, :]
        noised = torch.where(shown, rollout.completion_ids[:, None, :], context.mask_token_id)
        scored = hidden if self.score_context else scored
        return completion_views(rollout, noised, scored.to(torch.float32), torch.stack(prompts, dim=1))

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The bound that fits the sign of the advantage; both bounds are in `parts`."""
        hidden = corruption.weight > 0  # [N, K, C]
        length = context.rollout.completion_mask.sum(1).clamp(min=1).to(view_logprobs.dtype)
        count = hidden.sum(2).to(view_logprobs.dtype)  # [N, K]
        elbo = ((view_logprobs * corruption.weight).sum(2) / count.clamp(min=1)).mean(1)
        eubo = self._eubo(view_logprobs, hidden, count / length[:, None])
        negative = self.mix_weight * eubo + (1 - self.mix_weight) * elbo
        if self.ignore_negative:
            negative = torch.zeros_like(negative)
        value = torch.where(context.advantages > 0, elbo, negative)
        return LogProbs(value[:, None], length[:, None], {"elbo": elbo, "eubo": eubo})

    def _eubo(self, logprobs: Float[Tensor, "N K C"], hidden: Masks, share: Float[Tensor, "N K"]) -> Tensor:
        """Mean over the tokens hidden in any view; log p_ij^beta is summed in logs, where no view can underflow."""
        covered = hidden.any(1)  # [N, C]
        terms = self.eubo_beta * logprobs - torch.log(share.clamp(min=1e-12))[:, :, None]
        terms = torch.where(hidden | ~covered[:, None, :], terms, -torch.inf)  # uncovered columns stay finite
        bound = (torch.logsumexp(terms, dim=1) - math.log(self.num_masks)) / self.eubo_beta
        return torch.where(covered, bound, 0.0).sum(1) / covered.sum(1).clamp(min=1)
