"""Estimators that replay the rollout's own trajectory: every token is scored in a state the sampler was in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.estimators.views import commit_segments, segment_views, token_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class StepMergeEstimator:
    """d2-StepMerge (arXiv 2509.21474): the denoising steps cut into equal segments, one view at the start of each.

    Token k of a segment is scored from the state at the segment's start. One segment is d1's estimator without prompt
    masks; as many as there are steps is the trajectory's own likelihood, at the sampler's temperature and with
    `exclude_mask`.
    """

    num_segments: int
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token", needs_trace=True)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.num_segments < 1:
            raise ValueError(f"estimator.num_segments: must be >= 1, got {self.num_segments}. Try: 8 or 16")

    def corrupt(self, context: Context) -> Corruption:
        """Segment n starts at step int(n * steps / num_segments) of the rollout's own steps."""
        step, num_steps = commit_segments(context)
        index = torch.arange(self.num_segments, device=step.device)
        start = index * num_steps[:, None] // self.num_segments  # [N, K]
        segment = (step[:, None, :] >= start[:, :, None]).sum(1) - 1  # the last segment begun at that step
        never = step == torch.iinfo(step.dtype).max
        segment = torch.where(never, self.num_segments, segment)
        chosen = index.expand(len(step), -1)
        return segment_views(context, segment, chosen, temperature=self.temperature, exclude_mask=self.exclude_mask)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Each token from the view of its segment."""
        return token_logprobs(view_logprobs, corruption)


@dataclass(frozen=True)
class TraceEstimator:
    """TraceRL (arXiv 2509.06949): every `shrink` successive steps are one view; the tokens of those steps are scored.

    Steps that committed nothing do not count.

    With shrink 1 it is CJ-GRPO (arXiv 2509.23924): every recorded step replayed, each token scored at its own step.
    """

    shrink: int
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token", needs_trace=True)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.shrink < 1:
            raise ValueError(f"estimator.shrink: must be >= 1, got {self.shrink}. Try: 8, TraceRL's for LLaDA")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, merged step); rollouts of fewer steps have fewer views."""
        step, num_steps = commit_segments(context)
        total = max(int(num_steps.max()), 1)
        happened = torch.zeros(len(step), total + 1, dtype=torch.int64, device=step.device)
        happened.scatter_(1, step.clamp(max=total), 1)  # column `total` collects the tokens never committed
        rank = (happened.cumsum(1) - 1).gather(1, step.clamp(max=total))
        segment = torch.where(step < total, rank // self.shrink, total)
        chosen = torch.arange(-(-total // self.shrink), device=step.device).expand(len(step), -1)
        return segment_views(context, segment, chosen, temperature=self.temperature, exclude_mask=self.exclude_mask)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Each token from the view of its step."""
        return token_logprobs(view_logprobs, corruption)
