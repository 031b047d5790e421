"""The estimator of whole predictions: at some denoising steps all tokens that the sampler proposed are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from d1lit.estimators.views import completion_views, drop_unscored
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs

GUARD = 1e-4
"""Added to the number of masked tokens wherever something is divided by it, as in the authors' code."""


@dataclass(frozen=True)
class PredictedStepsEstimator:
    """MDPO (arXiv 2508.13148): the steps of largest |advantage|, each scored on all tokens its prediction filled in.

    One view a step, the canvas as the step found it; one unit a (step, token). Steps are chosen before the network is
    asked, so what is not chosen costs no pass. Of |advantages| equal to four digits the earlier step is taken; with one
    advantage a rollout, the first ones.
    A token weighs its probability when it was drawn over the step's masked tokens: with `sequence_sum` the loss is the
    sum over the chosen steps of the mean over masked tokens, as in the authors' code. The part `step` says which step a
    unit belongs to, and `scale` what its advantage is multiplied by, lambda = length / masked tokens.
    Tokens after a predicted end of sequence count too, as in the authors' code, though no judge has read them.
    """

    num_steps: int
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits(
        "token", needs_advantages=True, needs_predictions=True, parts=frozenset({"step", "scale"})
    )

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.num_steps < 1:
            raise ValueError(f"estimator.num_steps: must be >= 1, got {self.num_steps}. Try: 8, MDPO's")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, step by falling |advantage|); a rollout of fewer steps has fewer.

        Raises:
            ValueError: if the rollout carries no predictions.
        """
        rollout, record, chosen = context.rollout, context.rollout.steps, self._chosen(context)
        index = chosen.clamp(min=0).T[:, :, None].expand(-1, -1, rollout.completion_ids.shape[1])
        masked, standing, tokens, logprobs = (
            x.gather(0, index).transpose(0, 1)  # [N K C]
            for x in (record.masked, record.standing, record.predictions, record.logprobs)
        )
        masked = masked & (chosen >= 0)[:, :, None]
        noised = torch.where(masked, context.mask_token_id, standing)
        weight = torch.where(masked, logprobs.exp(), 0.0) / (masked.sum(2, keepdim=True) + GUARD)
        views = completion_views(rollout, noised, weight, temperature=self.temperature, exclude_mask=self.exclude_mask)
        return drop_unscored(replace(views, target_ids=torch.where(masked, tokens, views.target_ids)))

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Units in the order (step, token), with each unit's step and the factor on its advantage."""
        chosen, length = self._chosen(context).clamp(min=0), corruption.weight.shape[2]
        num_masked = context.rollout.steps.masked.sum(2).T.gather(1, chosen)  # [N K]
        scale = (length / (num_masked + GUARD)).to(view_logprobs.dtype)
        parts = {name: x.repeat_interleave(length, 1) for name, x in (("step", chosen), ("scale", scale))}
        return LogProbs(view_logprobs.flatten(1), corruption.weight.flatten(1), parts)

    def _chosen(self, context: Context) -> Int[Tensor, "N K"]:
        """Which steps of each rollout are scored, -1 where it took too few."""
        taken, advantages = context.rollout.steps.taken.T, context.advantages
        size = torch.ones_like(taken, dtype=advantages.dtype)
        if advantages.ndim == 2:  # which may know of longer rollouts, of other processes
            size = advantages[:, : taken.shape[1]].abs().round(decimals=4)  # rounding errors are no reason to choose
        size = pad(torch.where(taken, size, -1.0), (0, max(0, self.num_steps - taken.shape[1])), value=-1.0)
        size, chosen = size.sort(dim=1, descending=True, stable=True)
        return torch.where(size >= 0, chosen, -1)[:, : self.num_steps]
