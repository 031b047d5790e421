"""Wrappers that take units out of another loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from d1lit.losses.terms import Scalar, log_ratio
from d1lit.types import LossInputs, Metrics


def _with_weight(inputs: LossInputs, keep: torch.Tensor) -> LossInputs:
    weight = inputs.logprobs.weight * keep
    return replace(inputs, logprobs=replace(inputs.logprobs, weight=weight))


@dataclass(frozen=True)
class TopEntropyLoss:
    """Another loss on the tokens of highest entropy only (TRL's `top_entropy_quantile`); counts stay those of all."""

    loss: Any
    share: float
    """Share of this micro-batch's tokens that are kept."""
    needs_entropy: bool = True

    @property
    def units(self) -> frozenset[str]:
        """Entropies are known a token."""
        return self.loss.units & {"token"}

    @property
    def needs_old(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_old

    @property
    def needs_reference(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_reference

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """The wrapped loss, the other tokens weighing 0."""
        assert inputs.entropy is not None
        counted = inputs.logprobs.weight > 0
        # A unit is a token, which one view scores, or a (view, token).
        entropy = inputs.entropy.sum(1) if counted.shape[1] == inputs.entropy.shape[2] else inputs.entropy.flatten(1)
        threshold = torch.quantile(entropy[counted].float(), 1 - self.share)
        return self.loss(_with_weight(inputs, entropy >= threshold))


@dataclass(frozen=True)
class OffPolicyFilter:
    """Another loss without the rollouts of negative advantage that the policy has already left (as in TRL).

    A rollout is dropped where A < 0 and the mean of log p_old - log p over its units exceeds the threshold.
    """

    loss: Any
    threshold: float

    @property
    def units(self) -> frozenset[str]:
        """As the wrapped loss."""
        return self.loss.units

    @property
    def needs_old(self) -> bool:
        """The drift is measured against the old policy."""
        return True

    @property
    def needs_reference(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_reference

    @property
    def needs_entropy(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_entropy

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

    loss: Any
    min_prob: float
    needs_parts: ClassVar[frozenset[str]] = frozenset({"of_step"})

    @property
    def units(self) -> frozenset[str]:
        """As the wrapped loss."""
        return self.loss.units

    @property
    def needs_old(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_old

    @property
    def needs_reference(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_reference

    @property
    def needs_entropy(self) -> bool:
        """As the wrapped loss."""
        return self.loss.needs_entropy

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """The wrapped loss, unlikely tokens weighing 0."""
        judge = inputs.logprobs if inputs.old is None else inputs.old
        keep = (judge.value.detach() > math.log(self.min_prob)) | (inputs.logprobs.parts["of_step"] > 0)
        loss, metrics = self.loss(_with_weight(inputs, keep))
        return loss, {**metrics, "dropped_fraction": (~keep)[inputs.logprobs.weight > 0].float().mean()}
