"""The likelihood of a trajectory whose order a head of the network has drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.estimators.order import OrderedTraceEstimator, plackett_luce
from d1lit.types import POSITION, Context, Corruption, EstimatorTraits, LogProbs, OrderLaw


@dataclass(frozen=True)
class LearnedOrderEstimator:
    """Order and tokens of the recorded trajectory, one unit a step, the order scored by the network's head.

        log p(step) = sum_j [s_{u_j} - log sum_{still open} e^s] + sum_j log p(token at u_j)

    (LLaDOU, arXiv 2505.10446.) The head sees no token that was drawn, so this is the exact law of the sampler
    `PlackettLuce(OrderScore(), temperature=1)`, whose steps it replays: head and network learn from one ratio.
    """

    block_length: int
    """The sampler's: only positions of the active block were open."""
    temperature: float
    """Of the tokens; the scores of the order have none."""
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits(
        "step", needs_trace=True, order=OrderLaw("head", 1.0), parts=frozenset({"tokens", "order"})
    )

    def corrupt(self, context: Context) -> Corruption:
        """A view a step, which scores the tokens fixed in it up to the end, and every open position of its block."""
        views = OrderedTraceEstimator(self.block_length, 1.0, self.temperature, self.exclude_mask).corrupt(context)
        steps = torch.arange(views.weight.shape[1], device=views.weight.device)[:, None]
        rollout = context.rollout
        fixed = (rollout.commit_step[:, None, :] == steps) & rollout.completion_mask[:, None, :]
        return replace(
            views,
            view_of=torch.cat([views.view_of, views.view_of], dim=1),
            target_ids=torch.cat([views.target_ids, torch.full_like(views.target_ids, POSITION)], dim=1),
            weight=torch.cat([views.weight * fixed, views.weight], dim=1),
        )

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Token and order likelihood of each step, and both apart; steps without an open valid token weigh 0."""
        tokens, scores = view_logprobs.chunk(2, dim=1)
        is_scored, is_open = (corruption.weight > 0).chunk(2, dim=1)
        steps = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        chosen = is_open & (context.rollout.commit_step[:, None, :] == steps)
        said = torch.where(is_scored, tokens, 0.0).sum(2)
        order = plackett_luce(scores, context.rollout.confidence.to(scores.dtype), chosen, is_open)
        return LogProbs(said + order, chosen.any(2).to(said.dtype), {"tokens": said, "order": order})
