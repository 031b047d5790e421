"""Estimators that replay only some steps of the rollout's trajectory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.estimators.views import commit_segments, segment_views, token_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


def mean_over_steps(value: Float[Tensor, "N C"], context: Context, num_steps: int) -> Float[Tensor, "N S"]:
    """Mean of a token quantity over the valid tokens each step committed; -inf where a step committed none."""
    step, valid = context.rollout.commit_step, context.rollout.completion_mask & (context.rollout.commit_step >= 0)
    index = step.clamp(min=0)
    total = value.new_zeros(len(value), num_steps).scatter_add_(1, index, value * valid)
    count = value.new_zeros(len(value), num_steps).scatter_add_(1, index, valid.to(value.dtype))
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)


@dataclass(frozen=True)
class SampledStepsEstimator:
    """AGRPO (arXiv 2510.04019): K steps drawn at random without replacement, each weighing steps / K.

    The gradient of the summed log-probability of the whole trajectory is met without bias by a loss that divides by
    something not drawn: `constant_length` or `sequence_sum`. A mean over the drawn weights is a quotient of two draws.
    """

    num_steps: int
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token", needs_trace=True)

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, drawn step); steps that committed no valid token cannot be drawn."""
        step, _ = commit_segments(context)
        total = int(context.rollout.commit_step.max()) + 1
        exists = torch.isfinite(mean_over_steps(context.rollout.entropy * 0, context, max(total, 1)))
        keys = context.draws.uniform("step", context.rollout.row_ids, (exists.shape[1],))
        keys, chosen = torch.where(exists, keys, -1.0).topk(min(self.num_steps, exists.shape[1]), dim=1)
        chosen = torch.where(keys > 0, chosen, -1)
        share = exists.sum(1, keepdim=True) / (chosen >= 0).sum(1, keepdim=True).clamp(min=1)
        share = share.expand(chosen.shape)
        return segment_views(context, step, chosen, share, temperature=self.temperature, exclude_mask=self.exclude_mask)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The log-probabilities as they are; steps / K goes into the weight, so that ratios stay ratios."""
        plain = replace(corruption, weight=(corruption.weight > 0).to(view_logprobs.dtype))
        return replace(token_logprobs(view_logprobs, plain), weight=corruption.weight.sum(1))


@dataclass(frozen=True)
class EntropyStepsEstimator:
    """EGSPO (arXiv 2603.12554): the K steps whose tokens were least certain when they were committed."""

    num_steps: int
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token", needs_trace=True)

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, step by falling entropy)."""
        step, _ = commit_segments(context)
        total = int(context.rollout.commit_step.max()) + 1
        entropy = mean_over_steps(context.rollout.entropy, context, max(total, 1))
        value, chosen = entropy.topk(min(self.num_steps, entropy.shape[1]), dim=1)
        chosen = torch.where(torch.isfinite(value), chosen, -1)
        return segment_views(context, step, chosen, temperature=self.temperature, exclude_mask=self.exclude_mask)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The tokens of the chosen steps; the others count for nothing."""
        return token_logprobs(view_logprobs, corruption)


@dataclass(frozen=True)
class SurprisalStepsEstimator:
    """Drift (arXiv 2605.25638): K steps drawn by surprisal, and all tokens still hidden at them scored, as it is coded.

    A step is drawn with probability softmax(-mean log p / step_temperature) of what the sampler recorded. A hidden
    token committed later counts only where its sampled probability reached `min_prob`. One unit a (step, token).
    """

    num_steps: int
    step_temperature: float
    min_prob: float
    score_later: bool = True
    """Score the hidden tokens of later steps too; False: a step's own tokens, as the paper says it."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token", needs_trace=True, parts=frozenset({"of_step"}))

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, drawn step), drawn without replacement by Gumbel keys."""
        rollout = context.rollout
        step, _ = commit_segments(context)
        total = max(int(rollout.commit_step.max()) + 1, 1)
        logprob = mean_over_steps(rollout.sampled_logprobs, context, total)
        uniform = context.draws.uniform("step", rollout.row_ids, (total,))
        keys = -logprob / self.step_temperature - torch.log(-torch.log(uniform))
        keys = torch.where(torch.isfinite(logprob), keys, -torch.inf)
        value, chosen = keys.topk(min(self.num_steps, total), dim=1)
        chosen = torch.where(torch.isfinite(value), chosen, -1)
        views = segment_views(context, step, chosen, score_all_hidden=self.score_later)
        likely = torch.exp(rollout.sampled_logprobs)[:, None, :] >= self.min_prob
        return replace(views, weight=views.weight * (likely | (step[:, None, :] == chosen[:, :, None])))

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Units in the order (step, token); the part `of_step` is 1 for tokens committed in the unit's own step.

        They are those that a view hides and no later view of the same rollout shows: the earliest still hidden.
        """
        hidden, step = corruption.weight > 0, context.rollout.commit_step[:, None, :]
        first = torch.where(hidden, step, torch.iinfo(step.dtype).max).amin(2, keepdim=True)
        own = (hidden & (step == first)).to(view_logprobs.dtype)
        return LogProbs(view_logprobs.flatten(1), corruption.weight.flatten(1), {"of_step": own.flatten(1)})
