"""Clipped policy losses: each unit (token), or each sequence, has one probability ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.losses.terms import (
    Aggregation,
    KLEstimator,
    Scalar,
    log_ratio,
    num_completion_tokens,
    per_unit,
    weighted_mean,
)
from d1lit.types import LossInputs, LossTraits, Metrics


def _check(epsilon_low: float, epsilon_high: float, beta: float) -> None:
    if not 0 <= epsilon_low < 1:
        raise ValueError(f"loss.epsilon_low: must be in [0, 1), got {epsilon_low}. Try: 0.2, or d1's 0.5")
    if epsilon_high < 0:
        raise ValueError(f"loss.epsilon_high: must be >= 0, got {epsilon_high}. Try: 0.2, or d1's 0.5")
    if beta < 0:
        raise ValueError(f"loss.beta: must be >= 0, got {beta}. Try: 0 (no KL), or d1's 0.04")


def clip_metrics(ratio: Tensor, advantages: Tensor, low: float, high: float, weight: Tensor) -> Metrics:
    """Share of units whose gradient the clip stopped, and the ratio's mean and largest value."""
    stopped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    return {
        "clip_fraction": weighted_mean(stopped.to(ratio.dtype), weight),
        "ratio_mean": weighted_mean(ratio, weight),
        "ratio_max": torch.where(weight > 0, ratio, 0.0).amax().detach(),
    }


@dataclass(frozen=True)
class ClippedPolicyLoss:
    """The clipped surrogate of GRPO on every unit, with a KL penalty (d1, arXiv 2504.12216; GRPO, arXiv 2402.03300).

        -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL(log p - log p_ref),   r = p / p_old

    GRPO, Dr.GRPO, BNPO and DAPO differ in the aggregation and in epsilon alone.
    Differs from the paper: d1's Eq. 4 averages each sequence before the batch; its code averages over tokens. Both are
    aggregations here.
    """

    epsilon_low: float
    epsilon_high: float
    beta: float
    kl: KLEstimator
    aggregate: Aggregation
    dual_clip: float | None = None
    """Where A < 0 the loss is at most this times -A (dual-clip PPO; 3 in verl)."""
    ratio_cap: float | None = None
    """The ratio itself is at most this, whatever the sign of A (TRL's `delta`)."""
    weigh_kl: bool = False
    """Multiply the KL by the ratio, so that its expectation is under the current policy (TRL's bias correction)."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check(self.epsilon_low, self.epsilon_high, self.beta)

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
        ratio = torch.exp(log_ratio(inputs.logprobs, inputs.old))
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        free = ratio if self.ratio_cap is None else ratio.clamp(max=self.ratio_cap)
        terms = -torch.minimum(free * advantages, ratio.clamp(low, high) * advantages)
        if self.dual_clip is not None:
            terms = torch.where(advantages < 0, torch.minimum(terms, -self.dual_clip * advantages), terms)
        metrics = clip_metrics(ratio, advantages, low, high, weight)
        if self.beta > 0:
            kl = self.kl(log_ratio(inputs.logprobs, inputs.ref))
            kl = kl * ratio if self.weigh_kl else kl
            terms = terms + self.beta * kl
            metrics["kl"] = weighted_mean(kl, weight)
        return self.aggregate(terms, weight, inputs), metrics


@dataclass(frozen=True)
class SequenceClippedLoss:
    """The clipped surrogate on one ratio a sequence, s = exp(sum of log-ratios / length).

    With token likelihoods and the completion's length it is GSPO (arXiv 2507.18071); with an ELBO and the canvas length
    it is ESPO (arXiv 2512.03759); with no normalisation and `row_weight=inverse_length`, the raw ratio of GDPO (arXiv
    2510.08554). epsilon has to fit the normalisation: 3e-4 in GSPO, 0.2 in ESPO.
    """

    epsilon_low: float
    epsilon_high: float
    beta: float
    kl: KLEstimator
    length: Callable[[LossInputs], Float[Tensor, " N"]]
    """What a sequence's log-ratio and KL are divided by: `canvas_length`, `num_completion_tokens` or `unit_length`."""
    row_weight: Callable[[LossInputs], Float[Tensor, " N"]] | None = None
    """What each sequence's loss is multiplied by: `num_completion_tokens` (LUSPO in TRL), `inverse_length` (GDPO)."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check(self.epsilon_low, self.epsilon_high, self.beta)

    @property
    def traits(self) -> LossTraits:
        """Only a KL penalty reads the reference."""
        return LossTraits(
            frozenset({"token", "sequence", "view", "step"}), needs_old=True, needs_reference=self.beta > 0
        )

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        length = self.length(inputs)
        summed = (log_ratio(inputs.logprobs, inputs.old) * inputs.logprobs.weight).sum(1)
        ratio = torch.exp((summed / length).clamp(-20.0, 20.0))
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        advantages = inputs.advantages
        rows = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        metrics = clip_metrics(ratio[:, None], advantages[:, None], low, high, torch.ones_like(ratio)[:, None])
        if self.beta > 0:
            units = self.kl(log_ratio(inputs.logprobs, inputs.ref)) * inputs.logprobs.weight
            rows = rows + self.beta * units.sum(1) / length
            metrics["kl"] = (units.sum(1) / length).mean().detach()
        if self.row_weight is not None:
            rows = rows * self.row_weight(inputs)
        return rows.sum() / inputs.num_rollouts, metrics


def inverse_length(inputs: LossInputs) -> Float[Tensor, " N"]:
    """1 / tokens of each completion, as a weight: GDPO's 1/|o| stands outside the ratio."""
    return 1 / num_completion_tokens(inputs)
