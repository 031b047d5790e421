"""Masking schedules: how many tokens are hidden at time t, and what weight makes the loss a likelihood bound.

A schedule is one of three separate choices. The other two, how t is drawn and which tokens are hidden, are in
`masking.py`. Every schedule has the same bound in expectation (a change of time leaves it alone); they differ in the
variance of the loss and in where compute goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.types import Schedule

Times = Float[Tensor, "*n"]

_HALF_PI = math.pi / 2


def reverse_mask_prob(schedule: Schedule, s: Times, t: Times) -> Times:
    """Probability that a token hidden at t is still hidden at the earlier s: (1 - alpha(s)) / (1 - alpha(t))."""
    return schedule.mask_prob(s) / schedule.mask_prob(t)


@dataclass(frozen=True)
class LinearSchedule:
    """alpha(t) = 1 - t: each token is hidden with probability t and weighs 1/t (LLaDA, arXiv 2502.09992; d1).

    LLaDA's eps = 1e-3 is a range of t, so it stands with the sampler of t (`masking.UniformTimes(low=1e-3)`).
    """

    guard: float = 0.0
    """Added to the denominator of the weight (1e-6 in the dLLM toolkit)."""

    def alpha(self, t: Times) -> Times:
        """1 - t."""
        return 1 - t

    def mask_prob(self, t: Times) -> Times:
        """t."""
        return t.clone()

    def weight(self, t: Times) -> Times:
        """1 / t."""
        return 1 / (t + self.guard)


@dataclass(frozen=True)
class LogLinearSchedule:
    """sigma(t) = -log(1 - (1 - eps) t) (MDLM, arXiv 2406.07524): mask probability (1 - eps) t, weight 1/t."""

    eps: float

    def alpha(self, t: Times) -> Times:
        """1 - (1 - eps) t."""
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Times) -> Times:
        """(1 - eps) t."""
        return (1 - self.eps) * t

    def weight(self, t: Times) -> Times:
        """1 / t: the factor 1 - eps cancels."""
        return 1 / t


@dataclass(frozen=True)
class CosineSchedule:
    """alpha(t) = eps + (1 - eps) cos(pi t / 2) (MDLM, arXiv 2406.07524): few tokens hidden at small t."""

    eps: float

    def alpha(self, t: Times) -> Times:
        """Survival probability."""
        return self.eps + (1 - self.eps) * torch.cos(_HALF_PI * t)

    def mask_prob(self, t: Times) -> Times:
        """(1 - eps)(1 - cos(pi t / 2)), by the half angle so that small t keeps its digits."""
        return (1 - self.eps) * 2 * torch.sin(_HALF_PI * t / 2) ** 2

    def weight(self, t: Times) -> Times:
        """(pi / 2) cot(pi t / 4): the factor 1 - eps cancels."""
        return _HALF_PI / torch.tan(_HALF_PI * t / 2)


@dataclass(frozen=True)
class CosineSquaredSchedule:
    """alpha(t) = eps + (1 - eps) cos^2(pi t / 2) (MDLM, arXiv 2406.07524)."""

    eps: float

    def alpha(self, t: Times) -> Times:
        """Survival probability."""
        return self.eps + (1 - self.eps) * torch.cos(_HALF_PI * t) ** 2

    def mask_prob(self, t: Times) -> Times:
        """(1 - eps) sin^2(pi t / 2)."""
        return (1 - self.eps) * torch.sin(_HALF_PI * t) ** 2

    def weight(self, t: Times) -> Times:
        """pi cot(pi t / 2)."""
        return math.pi / torch.tan(_HALF_PI * t)


@dataclass(frozen=True)
class RaisedCosineSchedule:
    """Mask probability 1 - (1 - eps) cos(pi t / 2), from eps to exactly 1 (BD3LM, arXiv 2503.09573)."""

    eps: float
    guard: float = 0.0
    """Added to the denominator of the weight; the BD3LM code adds eps although the probability starts at eps."""

    def alpha(self, t: Times) -> Times:
        """(1 - eps) cos(pi t / 2)."""
        return (1 - self.eps) * torch.cos(_HALF_PI * t)

    def mask_prob(self, t: Times) -> Times:
        """1 - alpha(t)."""
        return 1 - self.alpha(t)

    def weight(self, t: Times) -> Times:
        """-alpha' / (1 - alpha)."""
        return (1 - self.eps) * _HALF_PI * torch.sin(_HALF_PI * t) / (self.mask_prob(t) + self.guard)


@dataclass(frozen=True)
class ReversedCosineSchedule:
    """alpha(t) = 1 - cos(pi (1 - t) / 2) (dLLM toolkit): the opposite curvature, many tokens hidden early."""

    guard: float = 0.0
    """Added to the denominator of the weight (1e-6 in the dLLM toolkit)."""

    def alpha(self, t: Times) -> Times:
        """Survival probability."""
        return 1 - torch.cos(_HALF_PI * (1 - t))

    def mask_prob(self, t: Times) -> Times:
        """cos(pi (1 - t) / 2) = sin(pi t / 2)."""
        return torch.sin(_HALF_PI * t)

    def weight(self, t: Times) -> Times:
        """(pi / 2) cot(pi t / 2)."""
        return _HALF_PI * torch.cos(_HALF_PI * t) / (self.mask_prob(t) + self.guard)


@dataclass(frozen=True)
class GeometricSchedule:
    """sigma(t) = sigma_min^(1-t) sigma_max^t (MDLM, arXiv 2406.07524), alpha = exp(-sigma).

    At t = 1 the mask probability is 1 - exp(-sigma_max): only 0.632 for the code's default of 1.
    """

    sigma_min: float
    sigma_max: float

    def _sigma(self, t: Times) -> Times:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def alpha(self, t: Times) -> Times:
        """exp(-sigma(t))."""
        return torch.exp(-self._sigma(t))

    def mask_prob(self, t: Times) -> Times:
        """1 - exp(-sigma(t))."""
        return -torch.expm1(-self._sigma(t))

    def weight(self, t: Times) -> Times:
        """sigma' / (exp(sigma) - 1)."""
        sigma = self._sigma(t)
        return sigma * math.log(self.sigma_max / self.sigma_min) / torch.expm1(sigma)


@dataclass(frozen=True)
class LinearSigmaSchedule:
    """sigma(t) = sigma_min + t (sigma_max - sigma_min) (MDLM, arXiv 2406.07524), alpha = exp(-sigma)."""

    sigma_min: float
    sigma_max: float

    def _sigma(self, t: Times) -> Times:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def alpha(self, t: Times) -> Times:
        """exp(-sigma(t))."""
        return torch.exp(-self._sigma(t))

    def mask_prob(self, t: Times) -> Times:
        """1 - exp(-sigma(t))."""
        return -torch.expm1(-self._sigma(t))

    def weight(self, t: Times) -> Times:
        """sigma' / (exp(sigma) - 1)."""
        return (self.sigma_max - self.sigma_min) / torch.expm1(self._sigma(t))


@dataclass(frozen=True)
class PowerSchedule:
    """Mask probability t^exponent, not below `floor` (BD3LM, arXiv 2503.09573: exponents 2 and 0.5).

    Below the floor the weight keeps the slope of t^exponent, as the BD3LM code does, so it is the bound's weight only
    where t^exponent >= floor.
    """

    exponent: float
    floor: float

    def alpha(self, t: Times) -> Times:
        """1 - mask_prob(t)."""
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Times) -> Times:
        """max(t^exponent, floor)."""
        return torch.clamp(t**self.exponent, min=self.floor)

    def weight(self, t: Times) -> Times:
        """exponent t^(exponent - 1) / mask_prob(t)."""
        return self.exponent * t ** (self.exponent - 1) / self.mask_prob(t)


@dataclass(frozen=True)
class LogSchedule:
    """Mask probability log2(1 + t) (BD3LM, arXiv 2503.09573)."""

    def alpha(self, t: Times) -> Times:
        """1 - log2(1 + t)."""
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Times) -> Times:
        """log2(1 + t)."""
        return torch.log1p(t) / math.log(2)

    def weight(self, t: Times) -> Times:
        """1 / ((1 + t) ln(1 + t))."""
        return 1 / ((1 + t) * torch.log1p(t))


@dataclass(frozen=True)
class ConstantSchedule:
    """The same share of tokens hidden at every t, weight 1 (BERT's law; Drift and dLLM-RL use it).

    Not a likelihood bound: alpha does not move, so the bound's own weight would be 0.
    """

    ratio: float

    def alpha(self, t: Times) -> Times:
        """1 - ratio."""
        return torch.full_like(t, 1 - self.ratio)

    def mask_prob(self, t: Times) -> Times:
        """The ratio."""
        return torch.full_like(t, self.ratio)

    def weight(self, t: Times) -> Times:
        """1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class UniformWeight:
    """Another schedule's masks with every hidden token weighing 1: stabler, tilted towards large t."""

    schedule: Schedule

    def alpha(self, t: Times) -> Times:
        """The wrapped schedule's."""
        return self.schedule.alpha(t)

    def mask_prob(self, t: Times) -> Times:
        """The wrapped schedule's."""
        return self.schedule.mask_prob(t)

    def weight(self, t: Times) -> Times:
        """1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class CappedWeight:
    """Another schedule with its weight cut at `cap`: a little bias for much less variance at small t."""

    schedule: Schedule
    cap: float

    def alpha(self, t: Times) -> Times:
        """The wrapped schedule's."""
        return self.schedule.alpha(t)

    def mask_prob(self, t: Times) -> Times:
        """The wrapped schedule's."""
        return self.schedule.mask_prob(t)

    def weight(self, t: Times) -> Times:
        """min(weight, cap)."""
        return torch.clamp(self.schedule.weight(t), max=self.cap)
