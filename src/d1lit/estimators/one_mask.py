"""Estimators that score the hidden tokens of random masks of the completion, the prompt staying clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.draws import random_subset
from d1lit.estimators.elbo import scored_tokens, subset_views
from d1lit.estimators.views import sequence_logprobs, token_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class UniGRPOEstimator:
    """UniGRPO (MMaDA, arXiv 2505.15809): one mask of the answer at each inner update, its share sweeping (0, 1].

    Inner update j hides the share ((u + j) / mu) mod 1 of the completion, u uniform, so that mu updates meet all noise
    levels. Written from the paper; its authors published no code.
    """

    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token")

    def corrupt(self, context: Context) -> Corruption:
        """One view of each rollout."""
        rows = context.rollout.row_ids
        scored, length = scored_tokens(context, score_padding=False)
        start = context.draws.at(inner=0).uniform("mask_ratio", rows, ())  # one start for all inner updates
        share = (start + context.inner / context.num_inner_updates) % 1
        count = torch.ceil(share * length).to(torch.int64).clamp(min=1)
        hidden = random_subset(context.draws.uniform("mask", rows, (scored.shape[1],)), count, scored)
        return subset_views(context, hidden[:, None], hidden[:, None].to(torch.float32), score_padding=False)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The hidden tokens; the others count for nothing."""
        return token_logprobs(view_logprobs, corruption)


@dataclass(frozen=True)
class ReplicateEstimator:
    """DMPO's bound (arXiv 2510.08233): R Bernoulli masks, each weighing length / (its realised number of tokens).

    The hidden share of a mask is uniform over [share_low, 1]. In the antithetic form the second half of the masks are
    the complements of the first.
    """

    num_masks: int
    share_low: float
    antithetic: bool
    score_padding: bool
    """Score and attend the whole canvas, as the authors' code does."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("sequence")

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.antithetic and self.num_masks % 2:
            raise ValueError(f"estimator.num_masks: must be even when antithetic, got {self.num_masks}. Try: 4")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, mask)."""
        rows = context.rollout.row_ids
        scored, length = scored_tokens(context, self.score_padding)
        masks = []
        for k in range(self.num_masks // 2 if self.antithetic else self.num_masks):
            share = self.share_low + (1 - self.share_low) * context.draws.uniform("mask_ratio", rows, (), step=k)
            uniform = context.draws.uniform("mask", rows, (scored.shape[1],), step=k)
            masks.append((uniform < share[:, None]) & scored)
        if self.antithetic:
            masks += [scored & ~mask for mask in masks]
        hidden = torch.stack(masks, dim=1)
        count = hidden.sum(2, keepdim=True).clamp(min=1)
        weight = hidden * (length[:, None, None] / count).to(torch.float32) / self.num_masks
        return subset_views(context, hidden, weight, self.score_padding)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The weighted sum over views and tokens."""
        return sequence_logprobs(view_logprobs, corruption)
