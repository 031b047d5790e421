"""JustGRPO's estimator: each token given all tokens before it, and nothing after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.estimators.views import completion_views, drop_unscored, token_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class LeftToRightEstimator:
    """Exact log-probabilities of the left-to-right policy (JustGRPO, arXiv 2601.15165): one view a token.

    View k shows the prompt and the tokens before position k and hides the rest; only token k is scored in it.
    Differs from the paper's code: tokens after the end of the sequence are not scored, nor are their views computed;
    `score_padding` scores them.
    """

    fraction: float
    """Share of positions scored, those of highest entropy at rollout; 1 in the paper, 0.25 in its fast mode."""
    temperature: float
    """The sampler's temperature; with `exclude_mask` the likelihood is the sampling distribution's."""
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    score_padding: bool = False
    """Score the whole canvas, tokens after the end of the sequence too."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token")

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"estimator.fraction: must be in (0, 1], got {self.fraction}. Try: 1 (all positions)")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, position)."""
        rollout = context.rollout
        length = rollout.completion_ids.shape[1]
        num_views = max(1, round(self.fraction * length))
        valid = torch.ones_like(rollout.completion_mask) if self.score_padding else rollout.completion_mask
        entropy = torch.where(valid, rollout.entropy, -torch.inf)
        scored = entropy.topk(num_views, dim=1).indices.sort(dim=1).values  # [N, K]
        place = torch.arange(length, device=rollout.device)
        is_hidden = place >= scored[:, :, None]  # [N, K, C]
        noised = torch.where(is_hidden, context.mask_token_id, rollout.completion_ids[:, None, :])
        weight = (place == scored[:, :, None]) & valid[:, None, :]
        views = completion_views(
            rollout,
            noised,
            weight.to(torch.float32),
            temperature=self.temperature,
            exclude_mask=self.exclude_mask,
        )
        return drop_unscored(views)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Each token from the one view that scores it."""
        return token_logprobs(view_logprobs, corruption)
