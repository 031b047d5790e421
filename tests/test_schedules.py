"""Schedules: alpha, mask probability and weight belong together, and the bound does not depend on the schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from d1lit import schedules as s

BOUNDS: dict[str, Any] = {
    "linear": s.LinearSchedule(),
    "log_linear": s.LogLinearSchedule(1e-3),
    "cosine": s.CosineSchedule(1e-3),
    "cosine_squared": s.CosineSquaredSchedule(1e-3),
    "raised_cosine": s.RaisedCosineSchedule(1e-3),
    "reversed_cosine": s.ReversedCosineSchedule(),
    "geometric": s.GeometricSchedule(1e-4, 20.0),
    "linear_sigma": s.LinearSigmaSchedule(0.0, 10.0),
    "square": s.PowerSchedule(2.0, floor=1e-12),
    "square_root": s.PowerSchedule(0.5, floor=1e-12),
    "log": s.LogSchedule(),
}
OTHERS: dict[str, Any] = {
    "constant": s.ConstantSchedule(0.3),
    "unweighted": s.UniformWeight(s.LinearSchedule()),
    "capped": s.CappedWeight(s.LinearSchedule(), 20.0),
}


@pytest.mark.parametrize("schedule", BOUNDS.values(), ids=BOUNDS.keys())
def test_weight_is_the_slope_of_alpha_over_the_mask_probability(schedule: Any) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", (BOUNDS | OTHERS).values(), ids=(BOUNDS | OTHERS).keys())
def test_mask_probability_complements_alpha(schedule: Any) -> None:
    t = torch.linspace(0.01, 1.0, 100, dtype=torch.float64)
    torch.testing.assert_close(schedule.mask_prob(t), 1 - schedule.alpha(t), rtol=1e-12, atol=1e-12)
    assert bool((torch.diff(schedule.mask_prob(t)) >= 0).all())
    assert bool(((schedule.mask_prob(t) >= 0) & (schedule.mask_prob(t) <= 1)).all())


@pytest.mark.parametrize("schedule", BOUNDS.values(), ids=BOUNDS.keys())
def test_the_bound_does_not_depend_on_the_schedule(schedule: Any) -> None:
    """With a loss of h(p) per hidden token, int weight(t) p(t) h(p(t)) dt = int h(p) dp over the schedule's range."""
    t = torch.linspace(1e-6, 1.0, 400_001, dtype=torch.float64)
    p = schedule.mask_prob(t)
    integral = torch.trapezoid(schedule.weight(t) * p * (1 - p**2), t)
    first, last = float(p[0]), float(p[-1])
    exact = (last - last**3 / 3) - (first - first**3 / 3)
    assert float(integral) == pytest.approx(exact, rel=2e-3)


def test_half_angle_keeps_the_digits_of_small_times() -> None:
    t = torch.tensor([1e-4])
    exact = (1 - 1e-3) * (1 - math.cos(math.pi / 2 * 1e-4))
    assert float(s.CosineSchedule(1e-3).mask_prob(t)) == pytest.approx(exact, rel=1e-6)


def test_reverse_mask_probability_of_the_linear_schedule() -> None:
    earlier, later = torch.tensor([0.2, 0.5]), torch.tensor([0.4, 1.0])
    torch.testing.assert_close(s.reverse_mask_prob(s.LinearSchedule(), earlier, later), torch.tensor([0.5, 0.5]))


def test_wrapped_weights() -> None:
    t = torch.tensor([0.01, 0.5])
    assert s.UniformWeight(s.LinearSchedule()).weight(t).tolist() == [1, 1]
    assert s.CappedWeight(s.LinearSchedule(), 20.0).weight(t).tolist() == [20, 2]
