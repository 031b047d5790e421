"""Losses that weigh whole sequences within a group, or fit them to a target, instead of using a ratio of policies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.losses.terms import KLEstimator, Scalar, log_ratio, softmax_in_group
from d1lit.types import LogProbs, LossInputs, LossTraits, Metrics

Rows = Float[Tensor, " N"]


def sequence_value(logprobs: LogProbs) -> Rows:
    """The units of a rollout summed with their weights: the log-likelihood of the whole sequence."""
    return (torch.where(logprobs.weight > 0, logprobs.value, 0.0) * logprobs.weight).sum(1)


@dataclass(frozen=True)
class WD1Loss:
    """Weighted likelihoods without old or reference policy (wd1, arXiv 2507.08838).

        loss = sum_i (-w+_i + w-_i) log p_i,   w+- = softmax over the group of +-psi A_i

    Groups are averaged.
    """

    psi: float
    positive_only: bool
    """Drop w-."""
    over_micro_batch: bool = False
    """Softmax over the micro-batch, as in the authors' code: right only where that is one group."""
    traits: ClassVar[LossTraits] = LossTraits(frozenset({"token", "sequence"}))

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        size = len(inputs.advantages) if self.over_micro_batch else inputs.group_size
        weight = -softmax_in_group(self.psi * inputs.advantages, size)
        if not self.positive_only:
            weight = weight + softmax_in_group(-self.psi * inputs.advantages, size)
        value = sequence_value(inputs.logprobs)
        loss = (weight * value).sum() * size / inputs.num_rollouts
        return loss, {"logprob": value.mean().detach(), "weight_abs": weight.abs().mean().detach()}


def dmpo_weights(inputs: LossInputs, alpha: float, coefficient: float, sign: float = 1.0) -> Rows:
    """softmax over the group of coefficient (log p_ref - log p_old + sign R / alpha); sign R alone where alpha is 0."""
    target = sign * inputs.rewards
    if alpha > 0:
        assert inputs.ref is not None
        at_rollout = inputs.logprobs if inputs.old is None else inputs.old
        target = sequence_value(inputs.ref) - sequence_value(at_rollout).detach() + target / alpha
    return softmax_in_group(coefficient * target, inputs.group_size)


@dataclass(frozen=True)
class Weights:
    """What a centring may subtract from: DMPO's weights of a batch of rollouts."""

    positive: Rows
    negative: Rows
    """With the reward's sign flipped."""
    gap: Rows
    """log p - log p_old of each rollout's bound, detached."""


def no_centering(weights: Weights, group_size: int) -> Rows:
    """The weights as they are."""
    return weights.positive


def mean_centering(weights: Weights, group_size: int, strength: float = 1.0) -> Rows:
    """Weights minus their mean, 1 / group size."""
    return weights.positive - strength / group_size


def negative_centering(weights: Weights, group_size: int, strength: float = 1.0) -> Rows:
    """Weights minus those with the reward's sign flipped."""
    return weights.positive - strength * weights.negative


def importance_centering(weights: Weights, group_size: int, strength: float = 1.0) -> Rows:
    """Weights minus softmax over the group of log p - log p_old: rollouts of an older policy count as its own."""
    return weights.positive - strength * softmax_in_group(weights.gap, group_size)


@dataclass(frozen=True)
class DMPOLoss:
    """Distribution matching by weighted denoising cross-entropy (DMPO, arXiv 2510.08233).

        loss = sum_i (w_i - baseline_i) * mean cross-entropy of the hidden tokens

    A likelihood that weighs each mask by length / (its tokens), such as `ReplicateEstimator`'s, divided by the length
    is that mean. Groups are averaged.
    """

    alpha: float
    """Temperature of the target distribution p_ref exp(R / alpha)."""
    coefficient: float
    center: Callable[[Weights, int], Rows]
    """`no_centering`, `mean_centering`, `negative_centering` or `importance_centering`."""
    length: Callable[[LossInputs], Rows]

    @property
    def traits(self) -> LossTraits:
        """The target distribution tilts the reference, unless alpha is 0."""
        return LossTraits(frozenset({"sequence"}), needs_old=True, needs_reference=self.alpha > 0)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        weight = dmpo_weights(inputs, self.alpha, self.coefficient)
        negative = dmpo_weights(inputs, self.alpha, self.coefficient, sign=-1.0)
        centred = self.center(Weights(weight, negative, _gap(inputs).detach()), inputs.group_size).detach()
        cross_entropy = -sequence_value(inputs.logprobs) / self.length(inputs)
        loss = (centred * cross_entropy).sum() * inputs.group_size / inputs.num_rollouts
        return loss, {"weight_max": weight.max().detach()}


def _gap(inputs: LossInputs) -> Rows:
    """log p - log p_old of whole sequences; 0, with its gradient, where the policy itself is the old one."""
    old = inputs.logprobs if inputs.old is None else inputs.old
    return sequence_value(inputs.logprobs) - sequence_value(old).detach()


@dataclass(frozen=True)
class DDOLoss:
    """DMPO's discriminator variant (arXiv 2510.08233): own rollouts told from the weighted ones by their log-ratio.

        loss = -mean_i [ w_i log sigmoid(beta d_i) ] - fake_weight mean_i log sigmoid(-beta d_i)
        d = log p - log p_old

    Differs from the authors' code: d is a difference of two bounds; there the current bound is summed over the
    replicate masks and the old one averaged (`replicates` gives that sum).
    """

    alpha: float
    """Temperature of the target distribution p_ref exp(R / alpha)."""
    coefficient: float
    beta: float
    fake_weight: float
    replicates: int = 1
    """The current bound is multiplied by it: the number of masks for the authors' code."""

    @property
    def traits(self) -> LossTraits:
        """The target distribution tilts the reference, unless alpha is 0."""
        return LossTraits(frozenset({"sequence"}), needs_old=True, needs_reference=self.alpha > 0)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        weight = dmpo_weights(inputs, self.alpha, self.coefficient).detach()
        gap = _gap(inputs) + (self.replicates - 1) * sequence_value(inputs.logprobs)
        sigmoid = torch.nn.functional.logsigmoid
        rows = -weight * sigmoid(self.beta * gap) - self.fake_weight * sigmoid(-self.beta * gap)
        return rows.sum() / inputs.num_rollouts, {"gap": gap.mean().detach(), "weight_max": weight.max()}


@dataclass(frozen=True)
class GDSDLoss:
    """Regress the clamped log-ratio onto the advantage (GDSD, arXiv 2605.29398).

        loss = mean_i sum_j ( clamp(s_ij - s_ij^old, log(1 - epsilon), log(1 + epsilon)) / L - psi A_i )^2 + beta KL

    Outside the clamp the gradient vanishes. As in the authors' code the squares are summed over masks j, and the KL is
    averaged over them and divided by L.
    """

    epsilon: float
    psi: float
    beta: float
    kl: KLEstimator
    length: Callable[[LossInputs], Rows]

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.epsilon < 1:
            raise ValueError(f"loss.epsilon: must be in (0, 1), got {self.epsilon}. Try: 4e-4, the paper's")

    @property
    def traits(self) -> LossTraits:
        """Only a KL penalty reads the reference."""
        return LossTraits(frozenset({"sequence", "view"}), needs_old=True, needs_reference=self.beta > 0)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        difference = log_ratio(inputs.logprobs, inputs.old)
        low, high = math.log(1 - self.epsilon), math.log(1 + self.epsilon)
        scaled = difference.clamp(low, high) / self.length(inputs)[:, None]
        rows = ((scaled - self.psi * inputs.advantages[:, None]) ** 2).sum(1)
        metrics = {"clip_fraction": ((difference < low) | (difference > high)).to(rows.dtype).mean().detach()}
        if self.beta > 0:
            kl = self.kl(log_ratio(inputs.logprobs, inputs.ref)).mean(1) / self.length(inputs)
            rows = rows + self.beta * kl
            metrics["kl"] = kl.mean().detach()
        return rows.sum() / inputs.num_rollouts, metrics


@dataclass(frozen=True)
class PreferenceLoss:
    """DPO on likelihood bounds (VRPO of LLaDA 1.5, arXiv 2505.19223): rows 2 j and 2 j + 1 are a pair.

        loss = -log sigmoid( beta [ (E_w - E_w^ref) - (E_l - E_l^ref) ] / L ),   w the row of higher reward

    A pair of equal rewards says nothing and counts 0.
    """

    beta: float
    length: Callable[[LossInputs], Rows]
    """`unit_length` for the method as published, `canvas_length` for DARE's port."""
    traits: ClassVar[LossTraits] = LossTraits(frozenset({"token", "sequence"}), needs_reference=True, group_size=2)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        assert inputs.ref is not None
        gain = (sequence_value(inputs.logprobs) - sequence_value(inputs.ref).detach()) / self.length(inputs)
        first, second = gain.view(-1, 2).unbind(1)
        preferred = torch.sign(inputs.rewards.view(-1, 2)[:, 0] - inputs.rewards.view(-1, 2)[:, 1])
        margin = preferred * (first - second)
        loss = -torch.nn.functional.logsigmoid(self.beta * margin) * preferred.abs()
        wins = ((margin > 0) & (preferred != 0)).sum() / (preferred != 0).sum().clamp(min=1)
        return loss.sum() * 2 / inputs.num_rollouts, {"margin": margin.mean().detach(), "preference_accuracy": wins}
