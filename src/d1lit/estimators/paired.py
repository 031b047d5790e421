"""Estimators that use a mask and its complement, so that every token is scored once a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.draws import random_subset, spread_counts
from d1lit.estimators.elbo import scored_tokens, subset_views
from d1lit.estimators.views import attend_real_tokens, sequence_logprobs, token_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class CoupledEstimator:
    """coupled-GRPO (DiffuCoder, arXiv 2506.20639): the fully masked view averaged with a complementary pair.

        log p_i = (1 / 2) [ log p_i(all hidden) + w_i log p_i(whichever of S, S^c hides i) ],  w = 1 / ratio, mirrored

    The rollouts of a prompt share the fully masked view. Not a log-probability: the weights reach 5.
    """

    ratio_low: float
    ratio_high: float
    one_ratio: bool = False
    """One mask ratio for the whole batch, as the authors' code draws it, instead of one for each rollout."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token")

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.ratio_low <= self.ratio_high < 1:
            raise ValueError(
                f"estimator.ratio_low: 0 < ratio_low <= ratio_high < 1 is asked, got {self.ratio_low}, "
                f"{self.ratio_high}. Try: 0.2 and 0.8"
            )

    def corrupt(self, context: Context) -> Corruption:
        """Views: one fully masked for each group, then S and its complement for each rollout."""
        rollout, mask_id = context.rollout, context.mask_token_id
        n, c = rollout.completion_ids.shape
        rows, owners = rollout.row_ids, slice(None, None, rollout.group_size)
        uniform = context.draws.uniform("mask_ratio", rows, ())
        if self.one_ratio:
            uniform = context.draws.batch("mask_ratio", ()).to(uniform.device).expand(n)
        ratio = self.ratio_low + (self.ratio_high - self.ratio_low) * uniform
        chosen = context.draws.uniform("mask", rows, (c,)) < ratio[:, None]
        pair = torch.stack([chosen, ~chosen], dim=1)  # [N, 2, C]
        pair_ids = torch.where(pair, mask_id, rollout.completion_ids[:, None, :]).flatten(0, 1)
        full = torch.full_like(rollout.completion_ids[owners], mask_id)
        prompts = torch.cat([rollout.prompt_ids[owners], rollout.prompt_ids.repeat_interleave(2, dim=0)])
        prompt_mask = torch.cat([rollout.prompt_mask[owners], rollout.prompt_mask.repeat_interleave(2, dim=0)])
        place = torch.arange(n, device=rollout.device)
        own = len(full) + 2 * place[:, None] + torch.arange(2, device=rollout.device)
        weight = torch.stack([torch.ones_like(pair[:, 0]) * 0.5, pair[:, 0] * 0.5 / ratio[:, None]], dim=1)
        weight = torch.cat([weight, (pair[:, 1] * 0.5 / (1 - ratio)[:, None])[:, None]], dim=1)
        return Corruption(
            noised_ids=torch.cat([prompts, torch.cat([full, pair_ids])], dim=1),
            view_of=torch.cat([(place // rollout.group_size)[:, None], own], dim=1),
            target_ids=rollout.completion_ids[:, None, :].expand(-1, 3, -1),
            weight=weight * rollout.completion_mask[:, None, :],
            score_from=prompts.shape[1],
            attention=attend_real_tokens(prompt_mask, c),
        )

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The weighted sum of the two views that score a token."""
        return token_logprobs(view_logprobs, corruption)


@dataclass(frozen=True)
class ESPOEstimator:
    """ESPO's sequence bound (arXiv 2512.03759): l hidden of L, l uniform over 0 .. L, and the complement.

        ELBO = (1 / 2) [ (L + 1) / l sum_{S} log p_i + (L + 1) / (L - l) sum_{S^c} log p_i ],  averaged over masks

    The numbers l of a group are stratified over its rollouts. An empty half adds 0, which keeps the mean right.
    """

    num_masks: int
    complement: bool
    """Add the complementary mask (two views a mask); without it the first half counts in full."""
    score_padding: bool
    """Score and attend the whole canvas, as the authors' code does."""
    round_sums: bool = False
    """Round the sizes as the authors' code does (`draws.spread_counts`): biased at some lengths."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("sequence")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, mask, half)."""
        rollout = context.rollout
        scored, length = scored_tokens(context, self.score_padding)
        group, place = rollout.row_ids // rollout.group_size, rollout.row_ids % rollout.group_size
        halves, weights = [], []
        for k in range(self.num_masks):
            start = (context.draws.uniform("mask_count", group, (), step=k) * (length + 1)).to(torch.int64)
            count = spread_counts(start, place, rollout.group_size, length + 1, self.round_sums) % (length + 1)
            chosen = random_subset(
                context.draws.uniform("mask", rollout.row_ids, (scored.shape[1],), step=k), count, scored
            )
            for half, size in ((chosen, count), (scored & ~chosen, length - count))[: 1 + self.complement]:
                halves.append(half)
                weights.append(half * ((length + 1) / size.clamp(min=1)).to(torch.float32)[:, None])
        weight = torch.stack(weights, dim=1) / len(weights)
        return subset_views(context, torch.stack(halves, dim=1), weight, self.score_padding)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The weighted sum over views and tokens."""
        return sequence_logprobs(view_logprobs, corruption)


@dataclass(frozen=True)
class PairScoreEstimator:
    """GDSD's score (arXiv 2605.29398): half the summed log-probabilities of a pair, one unit a pair, no 1/p weights."""

    num_masks: int
    score_padding: bool
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("view")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, mask, half); the size of the mask is uniform over 0 .. n."""
        scored, length = scored_tokens(context, self.score_padding)
        rows, halves = context.rollout.row_ids, []
        for k in range(self.num_masks):
            count = (context.draws.uniform("mask_count", rows, (), step=k) * (length + 1)).to(torch.int64)
            chosen = random_subset(context.draws.uniform("mask", rows, (scored.shape[1],), step=k), count, scored)
            halves += [chosen, scored & ~chosen]
        hidden = torch.stack(halves, dim=1)
        return subset_views(context, hidden, hidden * 0.5, self.score_padding)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """One score a pair."""
        value = (view_logprobs * corruption.weight).sum(2).view(len(view_logprobs), -1, 2).sum(2)
        return LogProbs(value=value, weight=torch.full_like(value, 1 / self.num_masks))
