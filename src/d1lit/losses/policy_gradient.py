"""Losses whose gradient is a weight times grad log p: no minimum of two branches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.losses.terms import (
    LOG_RATIO_LIMIT,
    Aggregation,
    KLEstimator,
    Scalar,
    log_ratio,
    per_unit,
    softmax_in_group,
    weighted_mean,
)
from d1lit.types import LossInputs, LossTraits, Metrics


def _plain(inputs: LossInputs) -> Tensor:
    """log p where the unit counts, 0 elsewhere."""
    return torch.where(inputs.logprobs.weight > 0, inputs.logprobs.value, 0.0)


@dataclass(frozen=True)
class ReinforceLoss:
    """-A log p (REINFORCE; SPG's loss, arXiv 2510.09541, on its bounds; RLOO with leave-one-out advantages).

    No old policy is asked for, so it is on-policy at the first inner update only.
    """

    aggregate: Aggregation
    traits: ClassVar[LossTraits] = LossTraits(
        frozenset({"token", "sequence", "view", "step"}), takes_unit_advantages=True
    )

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        value = _plain(inputs)
        loss = self.aggregate(-per_unit(inputs.advantages) * value, inputs.logprobs.weight, inputs)
        return loss, {"logprob": weighted_mean(value, inputs.logprobs.weight)}


@dataclass(frozen=True)
class CISPOLoss:
    """-sg(min(r, cap)) A log p (CISPO, arXiv 2506.13585): the ratio is clipped, but every token keeps its gradient."""

    ratio_cap: float
    """The largest ratio itself, not 1 + epsilon."""
    beta: float
    kl: KLEstimator
    aggregate: Aggregation

    @property
    def traits(self) -> LossTraits:
        """Only a KL penalty reads the reference."""
        return LossTraits(
            frozenset({"token", "view", "step"}),
            needs_old=True,
            needs_reference=self.beta > 0,
            takes_unit_advantages=True,
        )

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        weight, advantages = inputs.logprobs.weight, per_unit(inputs.advantages)
        ratio = torch.exp(log_ratio(inputs.logprobs, inputs.old)).detach()
        terms = -ratio.clamp(max=self.ratio_cap) * advantages * _plain(inputs)
        stopped = (ratio > self.ratio_cap) & (advantages > 0)
        metrics = {
            "clip_fraction": weighted_mean(stopped.to(ratio.dtype), weight),
            "ratio_mean": weighted_mean(ratio, weight),
        }
        if self.beta > 0:
            kl = self.kl(log_ratio(inputs.logprobs, inputs.ref))
            terms = terms + self.beta * kl
            metrics["kl"] = weighted_mean(kl, weight)
        return self.aggregate(terms, weight, inputs), metrics


@dataclass(frozen=True)
class SoftGateLoss:
    """-A (4 / tau) sigmoid(tau (r - 1)) (Soft Adaptive PO, read from TRL's `loss_type="sapo"`): a smooth gate, no clip.

    Not the step-aware method also called SAPO (arXiv 2510.01544).
    """

    positive_temperature: float
    negative_temperature: float
    aggregate: Aggregation
    traits: ClassVar[LossTraits] = LossTraits(
        frozenset({"token", "view", "step"}), needs_old=True, takes_unit_advantages=True
    )

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        weight, advantages = inputs.logprobs.weight, per_unit(inputs.advantages)
        ratio = torch.exp(log_ratio(inputs.logprobs, inputs.old))
        tau = torch.where(advantages > 0, self.positive_temperature, self.negative_temperature)
        terms = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        return self.aggregate(terms, weight, inputs), {"ratio_mean": weighted_mean(ratio, weight)}


def gamma_kernel(log_ratio: Tensor, shape: float, rate: float) -> Tensor:
    """w^shape exp(rate (1 - w)) of w = exp(log_ratio): 1 at w = 1, largest at w = shape / rate, 0 far away."""
    return torch.exp(shape * log_ratio + rate * (1 - torch.exp(log_ratio)))


@dataclass(frozen=True)
class VESPOLoss:
    """-sg(phi(w)) A log p with w the ratio of whole sequences, not normalised (VESPO, arXiv 2602.10693, as in TRL).

    phi is `gamma_kernel`, with one shape and rate for A >= 0 and another for A < 0.
    """

    positive_shape: float
    positive_rate: float
    negative_shape: float
    negative_rate: float
    aggregate: Aggregation
    through_weight: bool = False
    """Let the gradient run through phi as well, which TRL's `no_grad` prevents."""
    traits: ClassVar[LossTraits] = LossTraits(frozenset({"token", "view", "step"}), needs_old=True)

    def weight(self, difference: Float[Tensor, " N"], advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """phi of each rollout's summed log-ratio."""
        bounded = difference.clamp(math.log(1e-8), LOG_RATIO_LIMIT)
        positive = gamma_kernel(bounded, self.positive_shape, self.positive_rate)
        return torch.where(advantages >= 0, positive, gamma_kernel(bounded, self.negative_shape, self.negative_rate))

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        counted = inputs.logprobs.weight
        difference = (log_ratio(inputs.logprobs, inputs.old) * (counted > 0)).sum(1)
        phi = self.weight(difference if self.through_weight else difference.detach(), inputs.advantages)
        terms = -(phi * inputs.advantages)[:, None] * _plain(inputs)
        metrics = {"weight_mean": phi.mean().detach(), "weight_max": phi.max().detach()}
        return self.aggregate(terms, counted, inputs), metrics


@dataclass(frozen=True)
class StableDRLLoss:
    """Self-normalised, capped importance weights on SPG's bound (StableDRL, arXiv 2603.06743).

        loss = -mean over groups of sum_i w_i A_i bound_i,   w = softmax over the group of clip(ELBO - ELBO_old)

    The ratio is clipped whatever the sign of A.
    Differs from the paper, which clips to [0.8, 1.2]: its code clips from above only, at 5, as `loss=stable_drl` does.
    """

    ratio_cap: float
    """The largest ratio; in the paper 1.2."""
    ratio_floor: float | None = None
    """The smallest ratio; in the paper 0.8, in its code none."""
    over_micro_batch: bool = False
    """Normalise over the micro-batch, whatever the groups, as the authors' code does."""
    traits: ClassVar[LossTraits] = LossTraits(frozenset({"sequence"}), needs_old=True, needs_parts=frozenset({"elbo"}))

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        old = inputs.logprobs if inputs.old is None else inputs.old
        difference = (inputs.logprobs.parts["elbo"] - old.parts["elbo"]).detach()
        floor = None if self.ratio_floor is None else math.log(self.ratio_floor)
        clipped = difference.clamp(min=floor, max=math.log(self.ratio_cap))
        size = len(clipped) if self.over_micro_batch else inputs.group_size
        weight = softmax_in_group(clipped, size)
        loss = -(weight * inputs.advantages * inputs.logprobs.value[:, 0]).sum()
        return loss * size / inputs.num_rollouts, {"weight_max": weight.max().detach()}


@dataclass(frozen=True)
class MaskwiseBoundLoss:
    """BGPO (arXiv 2510.11683): one term a mask, each a bound, so each mask can be backpropagated by itself.

    A > 0 takes the linear lower bound 1 + d of the ratio, A < 0 the exponential; both are clipped as in PPO.
    Differs from the published code: that goes through log(1 + d), which is undefined for d <= -1.
    """

    epsilon_low: float
    epsilon_high: float
    aggregate: Aggregation
    dual_clip: float | None = None
    traits: ClassVar[LossTraits] = LossTraits(
        frozenset({"token", "view", "step"}), needs_old=True, takes_unit_advantages=True
    )

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        weight, advantages = inputs.logprobs.weight, per_unit(inputs.advantages)
        difference = log_ratio(inputs.logprobs, inputs.old)
        ratio = torch.where(advantages > 0, 1 + difference, torch.exp(difference))
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        terms = -torch.minimum(ratio * advantages, clipped * advantages)
        if self.dual_clip is not None:
            terms = torch.where(advantages < 0, torch.minimum(terms, -self.dual_clip * advantages), terms)
        return self.aggregate(terms, weight, inputs), {"ratio_mean": weighted_mean(ratio, weight)}
