"""Wrappers that take units out of another loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from d1lit.draws import random_subset
from d1lit.losses.terms import Scalar, log_ratio
from d1lit.types import LossInputs, LossTraits, Metrics, PolicyLoss


def _with_weight(inputs: LossInputs, keep: torch.Tensor) -> LossInputs:
    weight = inputs.logprobs.weight * keep
    return replace(inputs, logprobs=replace(inputs.logprobs, weight=weight))


@dataclass(frozen=True)
class TopEntropyLoss:
    """Another loss on the tokens of highest entropy only (TRL's `top_entropy_quantile`); counts stay those of all.

    The quantile is over the tokens of this micro-batch, so what is kept depends on how a batch is cut.
    """

    loss: PolicyLoss
    share: float
    """Share of this micro-batch's tokens that are kept."""

    @property
    def traits(self) -> LossTraits:
        """The wrapped loss's; entropies are known a token."""
        inner = self.loss.traits
        return replace(inner, units=inner.units & {"token"}, needs_entropy=True)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """The wrapped loss, the other tokens weighing 0."""
        assert inputs.entropy is not None
        threshold = torch.quantile(inputs.entropy[inputs.logprobs.weight > 0].float(), 1 - self.share)
        return self.loss(_with_weight(inputs, inputs.entropy >= threshold))


@dataclass(frozen=True)
class GivenEntropyFilter:
    """Another loss that learns, of tokens given to a rollout, those of highest entropy only (IGPO, arXiv 2509.10396).

    The policy did not write them, so most are far from what it would write. Of a rollout's given tokens int(share times
    their number) are kept, at least one; tokens that were drawn all count. Without given tokens it is the wrapped loss.
    Entropies are asked for at every update, also where no token was given.
    Differs from the published code: the entropy is the current policy's under this update's views, not the sampling
    one's; a loss that divides by the tokens of the global batch divides by all of them, not by those kept.
    """

    loss: PolicyLoss
    share: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.share <= 1:
            raise ValueError(f"loss.share: must be in (0, 1], got {self.share}. Try: 0.2, the paper's")

    @property
    def traits(self) -> LossTraits:
        """The wrapped loss's; entropies are known a token."""
        inner = self.loss.traits
        return replace(inner, units=inner.units & {"token"}, needs_entropy=True)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """The wrapped loss, the other given tokens weighing 0."""
        if inputs.given is None:
            return self.loss(inputs)
        assert inputs.entropy is not None
        weight = inputs.logprobs.weight
        given = inputs.given.repeat(1, weight.shape[1] // inputs.given.shape[1]) & (weight > 0)
        count = (given.sum(1, dtype=torch.float64) * self.share).long().clamp(min=1)
        highest = random_subset(-inputs.entropy, count, given)  # those with the smallest keys
        return self.loss(_with_weight(inputs, ~given | highest))


@dataclass(frozen=True)
class OffPolicyFilter:
    """Another loss without the rollouts of negative advantage that the policy has already left (as in TRL).

    A rollout is dropped where A < 0 and the mean of log p_old - log p over its units exceeds the threshold.
    """

    loss: PolicyLoss
    threshold: float

    @property
    def traits(self) -> LossTraits:
        """The wrapped loss's; the drift is measured against the old policy."""
        return replace(self.loss.traits, needs_old=True, takes_unit_advantages=False)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """The wrapped loss, the dropped rollouts weighing 0."""
        weight = inputs.logprobs.weight
        drift = (-log_ratio(inputs.logprobs, inputs.old).detach() * weight).sum(1) / weight.sum(1).clamp(min=1e-8)
        keep = ~((inputs.advantages < 0) & (drift > self.threshold))
        loss, metrics = self.loss(_with_weight(inputs, keep[:, None]))
        return loss, {**metrics, "dropped_fraction": (~keep).to(drift.dtype).mean()}


@dataclass(frozen=True)
class LikelyTokenFilter:
    """Another loss without the tokens that the policy finds unlikely, as Drift's code has it (arXiv 2605.25638).

    A token counts where its probability is above `min_prob`, under the old policy if there is one and else the current
    one; tokens that the estimator calls its own step's always count.
    """

    loss: PolicyLoss
    min_prob: float

    @property
    def traits(self) -> LossTraits:
        """The wrapped loss's, and the part that says which tokens are their step's own."""
        inner = self.loss.traits
        return replace(inner, needs_parts=inner.needs_parts | {"of_step"})

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """The wrapped loss, unlikely tokens weighing 0."""
        judge = inputs.logprobs if inputs.old is None else inputs.old
        keep = (judge.value.detach() > math.log(self.min_prob)) | (inputs.logprobs.parts["of_step"] > 0)
        loss, metrics = self.loss(_with_weight(inputs, keep))
        return loss, {**metrics, "dropped_fraction": (~keep)[inputs.logprobs.weight > 0].float().mean()}
