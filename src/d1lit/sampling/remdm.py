"""ReMDM (arXiv 2503.00307): a reverse process that remasks tokens with probability sigma, whatever the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d1lit.sampling.parts import Cells, Standing

Sigma = Callable[[float, float, Tensor | None], Tensor | float]
"""From alpha at t, alpha at the earlier s, and the confidences of standing tokens (None: of a masked one)."""


def largest_sigma(alpha_t: float, alpha_s: float) -> float:
    """The largest sigma that leaves the marginals alone: (1 - alpha_s) / alpha_t, at most 1."""
    return min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0


def capped(alpha_t: float, alpha_s: float, confidence: Tensor | None, eta: float) -> float:
    """ReMDM-cap: min(eta, the largest sigma)."""
    return min(eta, largest_sigma(alpha_t, alpha_s))


def rescaled(alpha_t: float, alpha_s: float, confidence: Tensor | None, eta: float) -> float:
    """ReMDM-rescale: eta times the largest sigma."""
    return eta * largest_sigma(alpha_t, alpha_s)


def forward_backward(alpha_t: float, alpha_s: float, confidence: Tensor | None) -> float:
    """The forward-backward corrector, (alpha_s - alpha_t) / alpha_t: above the largest sigma where s is near 0."""
    return (alpha_s - alpha_t) / alpha_t if alpha_t > 0 else 1.0


def by_confidence(alpha_t: float, alpha_s: float, confidence: Tensor | None) -> Tensor | float:
    """ReMDM-conf: the largest sigma times softmax(-probability the token was fixed with) over the standing tokens.

    As in the authors' code a masked position has sigma 0, which leaves the marginals only nearly alone.
    """
    if confidence is None:
        return 0.0
    weights = torch.softmax(-confidence, dim=1)  # a confidence of infinity, where nothing stands, weighs 0
    return largest_sigma(alpha_t, alpha_s) * weights.nan_to_num(0.0)


def reveal_probability(alpha_t: float, alpha_s: float, sigma: float) -> float:
    """Probability that a position masked at t is shown at s: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)."""
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


@dataclass(frozen=True)
class Loop:
    """ReMDM-loop: tokens are remasked only between two times, during which alpha stands still.

    Before and after, the times are stretched so that alpha runs from 0 to alpha_on and from alpha_on to 1, without
    remasking.
    """

    t_on: float
    t_off: float
    alpha_on: float

    def __post_init__(self) -> None:
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise ValueError(
                f"sampler.commit.loop: t_on {self.t_on}, t_off {self.t_off}, alpha_on {self.alpha_on} must satisfy "
                "0 < t_off < t_on < 1 and 0 < alpha_on < 1. Try: t_on=0.55 t_off=0.05 alpha_on=0.9"
            )

    def alpha(self, time: float) -> float:
        """Share of tokens shown at a time."""
        if time > self.t_on:
            return (1 - time) * self.alpha_on / (1 - self.t_on)
        return self.alpha_on if time > self.t_off else 1 - time * (1 - self.alpha_on) / self.t_off


@dataclass(frozen=True)
class ReMDM:
    """Commit rule and remask rule in one (arXiv 2503.00307), with alpha = 1 - t on a grid of times from 1 to eps.

    A masked position is fixed with `reveal_probability`, a standing token remasked with probability sigma; the last
    step commits all and remasks nothing.
    Differs from the authors' code: sigma never exceeds `largest_sigma`; the time runs over each block.
    """

    sigma: Sigma
    eps: float
    """Last time of the grid."""
    loop: Loop | None = None
    verifies: ClassVar[bool] = False
    runs_all_steps: ClassVar[bool] = True

    def quotas(self, block_length: int, num_steps: int) -> None:
        """Chance decides."""
        return None

    def _alphas(self, cells: Cells) -> tuple[float, float, bool]:
        """alpha at the step's time and at the next one, and whether tokens may be remasked between them."""
        times = torch.linspace(1, self.eps, cells.num_steps + 1, dtype=torch.float64).tolist()
        if self.loop is None:
            return 1 - times[cells.step], 1 - times[cells.step + 1], True
        inside = [self.loop.t_off < t <= self.loop.t_on for t in times]
        # What a step has reached, not what the clock says: a loop that the grid leaves late has stood still so long.
        reached = [
            self.loop.alpha_on if k and inside[k - 1] else self.loop.alpha(t)
            for k, t in enumerate(times[: cells.step + 2])
        ]
        return reached[-2], reached[-1], inside[cells.step]

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """A coin for each masked position."""
        if cells.step >= cells.num_steps - 1:
            return cells.candidates
        alpha_t, alpha_s, remasks = self._alphas(cells)
        sigma = min(float(self.sigma(alpha_t, alpha_s, None)), largest_sigma(alpha_t, alpha_s)) if remasks else 0.0
        return (cells.uniform("order") < reveal_probability(alpha_t, alpha_s, sigma)) & cells.candidates

    def remask(self, standing: Standing) -> Bool[Tensor, "n M"]:
        """A coin for each token that stood before this step."""
        cells = standing.cells
        old = cells.candidates & (standing.age > 0)
        alpha_t, alpha_s, remasks = self._alphas(cells)
        if cells.step >= cells.num_steps - 1 or not remasks:
            return torch.zeros_like(old)
        sigma = self.sigma(alpha_t, alpha_s, standing.confidence.masked_fill(~old, torch.inf))
        sigma = torch.as_tensor(sigma, device=old.device).clamp(max=largest_sigma(alpha_t, alpha_s))
        return (cells.uniform("remask") < sigma) & old
