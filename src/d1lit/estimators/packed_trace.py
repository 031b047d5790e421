"""TraceRL on networks that decode block by block: every step of a rollout in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.attention import block_copies
from d1lit.estimators.views import commit_segments, own_views
from d1lit.types import AttentionPattern, Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class PackedTraceEstimator:
    """Every token given the canvas of its own step, all steps in one view (TraceRL on block models, arXiv 2509.06949).

    The view is [prompt; completion; a copy of the active block as it stood at each step]. A block sees clean ones
    before it and itself, so the steps do not disturb each other, and the pass computes a block a step where
    `TraceEstimator(shrink=1)` computes a canvas a step. The two are equal on rollouts of a sampler with `block_causal`,
    the only ones that this one scores.
    """

    block_length: int
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""

    @property
    def traits(self) -> EstimatorTraits:
        """A likelihood of tokens, in the sampler's own blocks."""
        pattern = AttentionPattern("blocks", self.block_length)
        return EstimatorTraits("token", needs_trace=True, needs_own_place=True, pattern=pattern)

    def corrupt(self, context: Context) -> Corruption:
        """One view a rollout; nothing is drawn. Steps of which no token is scored have no copy."""
        rollout = context.rollout
        (n, c), prompt = rollout.completion_ids.shape, rollout.prompt_ids.shape[1]
        step, _ = commit_segments(context)
        of_copy = _steps_copied(step, rollout.completion_mask & (rollout.commit_step >= 0))
        block = torch.arange(c, device=step.device) // self.block_length
        is_its = step[:, None] == of_copy[:, :, None]
        copied = torch.where(is_its, block, -1).amax(2)  # the block that the step worked on
        inside = torch.arange(self.block_length, device=step.device)
        place = (copied.clamp(min=0)[:, :, None] * self.block_length + inside).flatten(1)  # [N, copies * block]
        begun = of_copy.repeat_interleave(self.block_length, 1)
        tokens, its = rollout.completion_ids.gather(1, place), step.gather(1, place)
        noised = torch.where(its < begun, tokens, context.mask_token_id)
        weight = (its == begun) & rollout.completion_mask.gather(1, place)

        clean = block.expand(n, -1)
        number = torch.arange(of_copy.shape[1], device=step.device).repeat_interleave(self.block_length).expand(n, -1)
        nowhere = torch.full_like(rollout.prompt_ids, -1)
        attention = block_copies(
            torch.cat([nowhere, clean, copied.repeat_interleave(self.block_length, 1)], 1),
            torch.cat([nowhere, torch.full_like(clean, -1), number], 1),
            torch.cat([rollout.prompt_mask, rollout.commit_step >= 0, torch.ones_like(weight)], 1),
        )
        return Corruption(
            noised_ids=torch.cat([rollout.prompt_ids, rollout.completion_ids, noised], 1),
            view_of=own_views(n, 1, step.device),
            target_ids=tokens[:, None],
            weight=weight[:, None].to(torch.float32),
            score_from=prompt + c,
            attention=attention,
            position_ids=torch.cat([torch.arange(prompt + c, device=step.device).expand(n, -1), prompt + place], 1),
            temperature=self.temperature,
            exclude_mask=self.exclude_mask,
        )

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Each token from the copy of its step: of all places that stand for its position, the one that is scored."""
        assert corruption.position_ids is not None
        prompt_length = context.rollout.prompt_ids.shape[1]
        place = corruption.position_ids[:, corruption.score_from :] - prompt_length
        nothing = view_logprobs.new_zeros(context.rollout.completion_ids.shape)
        weight = corruption.weight[:, 0].to(view_logprobs.dtype)
        value = nothing.scatter_add(1, place, view_logprobs[:, 0] * weight)
        return LogProbs(value, nothing.scatter_add(1, place, weight))


def _steps_copied(step: Int[Tensor, "N C"], scored: Bool[Tensor, "N C"]) -> Int[Tensor, "N S"]:
    """The steps at which some scored token was committed, in order; -1 fills up where a rollout has fewer."""
    total = max(int(torch.where(scored, step, -1).max()) + 1, 1)
    happened = torch.zeros(len(step), total + 1, dtype=torch.bool, device=step.device)
    happened.scatter_(1, torch.where(scored, step, total), True)  # column `total` collects the tokens not scored
    happened = happened[:, :total]
    most = max(int(happened.sum(1).max()), 1)
    every = torch.arange(total, device=step.device).expand(len(step), -1)
    first = torch.where(happened, every, total).sort(1).values[:, :most]
    return torch.where(first < total, first, -1)
