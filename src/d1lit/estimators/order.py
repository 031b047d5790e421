"""The likelihood of a trajectory with its order: which positions were fixed, and which tokens there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d1lit.estimators.views import commit_segments, segment_views
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs, OrderLaw


def plackett_luce(
    scores: Float[Tensor, "N K C"],
    places: Float[Tensor, "N C"],
    chosen: Bool[Tensor, "N K C"],
    open_: Bool[Tensor, "N K C"],
) -> Float[Tensor, "N K"]:
    """log of the probability that the chosen positions come first, in order of falling `places`, drawn one by one.

    Each is drawn from softmax(scores) over the positions that are still open (Plackett, 1975; Luce, 1959).
    """
    others = open_ & ~chosen
    # position j is still there when i is drawn: j was not chosen, or comes after i (or is i)
    later = places[:, None, :] <= places[:, :, None]  # [N, i, j]
    there = others[:, :, None, :] | (chosen[:, :, None, :] & later[:, None])
    rivals = torch.where(there | ~chosen[..., None], scores[:, :, None, :], -torch.inf)  # rows not chosen stay finite
    return torch.where(chosen, scores - rivals.logsumexp(-1), 0.0).sum(2)


@dataclass(frozen=True)
class OrderedTraceEstimator:
    """Tokens and order of the recorded trajectory, one unit a step: log p(tokens) + log p(positions).

    Positions follow a Plackett-Luce law without a head of its own: the score of an open position is the log-probability
    of its token over `order_temperature` (in the spirit of the mask-aware policy gradient, arXiv 2607.15200, and of
    LLaDOU, arXiv 2505.10446, whose scores come from a trained head). Wants a sampler that draws its order so:
    `PlackettLuce(SampledLogProb)`.
    Differs from the sampler's exact law: the score of a position that was not fixed is that of its FINAL token, because
    tokens that were drawn and thrown away are not recorded. All hidden tokens of a step's view are scored for it.
    """

    block_length: int
    """The sampler's: only positions of the active block were open."""
    order_temperature: float
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""

    @property
    def traits(self) -> EstimatorTraits:
        """One unit a step, and the law of the order."""
        law = OrderLaw("token", self.order_temperature)
        return EstimatorTraits("step", needs_trace=True, order=law, parts=frozenset({"tokens", "order"}))

    def corrupt(self, context: Context) -> Corruption:
        """A view a step, which scores everything still hidden in the step's block, after the end too.

        The sampler could have fixed those positions instead. Where no valid token is open any more nothing is scored.
        """
        step, num_steps = commit_segments(context)
        steps = torch.arange(max(int(num_steps.max()), 1), device=step.device)
        chosen = steps.expand(len(step), -1)
        views = segment_views(
            context,
            step,
            chosen,
            score_all_hidden=True,
            score_padding=True,
            temperature=self.temperature,
            exclude_mask=self.exclude_mask,
        )
        block = torch.arange(step.shape[1], device=step.device) // self.block_length
        fixed = step[:, None, :] == chosen[:, :, None]
        active = torch.where(fixed, block, -1).amax(2, keepdim=True)
        weight = views.weight * (block == active)
        matters = (weight * context.rollout.completion_mask[:, None, :]).any(2, keepdim=True)
        return replace(views, weight=weight * matters)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Token and order likelihood of each step, and both apart; steps without an open valid token weigh 0.

        Tokens after the end have no likelihood, but that their positions were chosen has.
        """
        step = context.rollout.commit_step[:, None, :]
        steps = torch.arange(view_logprobs.shape[1], device=step.device)[None, :, None]
        open_ = corruption.weight > 0
        chosen = open_ & (step == steps)
        valid = context.rollout.completion_mask[:, None, :]
        tokens = torch.where(chosen & valid, view_logprobs, 0.0).sum(2)
        scores = view_logprobs / self.order_temperature
        order = plackett_luce(scores, context.rollout.confidence.to(scores.dtype), chosen, open_)
        return LogProbs(tokens + order, chosen.any(2).to(tokens.dtype), {"tokens": tokens, "order": order})
