"""d2-AnyOrder: a trajectory's likelihood in one pass, for networks that attend in the order of commitment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.attention import order_streams
from d1lit.estimators.views import commit_segments, own_views, token_logprobs
from d1lit.types import AttentionPattern, Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class AnyOrderEstimator:
    """Every token given those committed in earlier steps, all in one view (d2-AnyOrder, arXiv 2509.21474).

    The view is [prompt; completion; a mask slot for each token], a slot at its token's position. What a committed token
    looks like to later ones does not depend on them, so one pass holds the states of all steps.
    Exact only where the network also samples in that pattern (`sampler.any_order`), which is of use only where it was
    trained in it. LLaDA and Dream were not: for their trajectories it is another network's likelihood.
    Read in kuleshov-group/d2. Tokens of one step: their slots do not see each other's, as the sampler's masks did not;
    the committed tokens stand in a line, left to right, as in the orders that d2 trains on.
    Differs from the published code: steps are those of the rollout, not pairs; behind the end nothing is scored.
    """

    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits(
        "token", needs_trace=True, needs_own_place=True, pattern=AttentionPattern("order")
    )

    def corrupt(self, context: Context) -> Corruption:
        """One view a rollout; nothing is drawn."""
        rollout = context.rollout
        (n, c), prompt = rollout.completion_ids.shape, rollout.prompt_ids.shape[1]
        slots = torch.full_like(rollout.completion_ids, context.mask_token_id)
        place = torch.arange(prompt + c, device=rollout.device)
        step, _ = commit_segments(context)
        of = torch.cat([torch.full_like(rollout.prompt_ids, -1), step], dim=1)
        committed = rollout.commit_step >= 0
        return Corruption(
            noised_ids=torch.cat([rollout.prompt_ids, rollout.completion_ids, slots], dim=1),
            view_of=own_views(n, 1, rollout.device),
            target_ids=rollout.completion_ids[:, None],
            weight=(rollout.completion_mask & committed)[:, None].to(torch.float32),
            score_from=prompt + c,
            attention=order_streams(of, torch.cat([rollout.prompt_mask, committed], dim=1), prompt),
            position_ids=torch.cat([place, place[prompt:]]).expand(n, -1),
            temperature=self.temperature,
            exclude_mask=self.exclude_mask,
        )

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Each token from its slot."""
        return token_logprobs(view_logprobs, corruption)
