"""UniGRPO's estimator: the hidden tokens of one random mask of the completion, the prompt staying clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.draws import random_subset
from d1lit.estimators.elbo import scored_tokens, subset_views
from d1lit.estimators.views import token_logprobs
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
