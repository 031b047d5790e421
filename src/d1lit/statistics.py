"""Intervals and paired comparisons for accuracies: what a number is worth.

Closed forms and counter-based resampling only; no global generator is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.types import Draws


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it."""

    value: float
    low: float
    high: float


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1. Try: 0.95")


def wilson_interval(successes: int | float, total: int | float, confidence: float = 0.95) -> Interval:
    """Interval of a proportion by inverting the score test (Wilson, JASA 1927); honest near 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    _check_confidence(confidence)
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"successes: {successes} of {total} is no proportion. Try: 0 <= successes <= total, total > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, max(center - half, 0.0), min(center + half, 1.0))


def effective_trials(successes: Sequence[int | float], sizes: Sequence[int | float]) -> float:
    """Independent trials that tell as much of a share as clustered ones (Kish, Survey Sampling 1965: design effect).

    The share is sum(successes) / sum(sizes); its variance is taken over clusters (the ratio estimator's), and the
    binomial with that variance has this many trials: at most all of them, and as many as clusters where none differs.

    Args:
        successes: of each cluster, for instance the right cells of a row.
        sizes: trials of each cluster.

    Raises:
        ValueError: no cluster, or lists of different lengths.
    """
    if len(successes) != len(sizes) or not sizes:
        raise ValueError(f"clusters: {len(successes)} and {len(sizes)}. Try: both of each cluster, at least one")
    clusters, total = len(sizes), math.fsum(sizes)
    share = math.fsum(successes) / total
    squares = math.fsum((s - share * n) ** 2 for s, n in zip(successes, sizes, strict=True))
    if clusters == 1 or squares <= 1e-12 * total:
        return float(min(clusters, total))
    variance = clusters / (clusters - 1) * squares / total**2
    return min(max(share * (1 - share) / variance, 1.0), total)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples is right, estimated without bias from n samples (Chen et al., 2107.03374).

    Raises:
        ValueError: fewer samples than k, or more correct ones than samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"k: {k} of {num_samples} samples with {num_correct} correct. Try: 1 <= k <= samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two graded runs on the same rows are equally good.

    Args:
        only_first: rows that only the first run got right.
        only_second: rows that only the second run got right.

    Raises:
        ValueError: a negative count.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts: {only_first} and {only_second}. Try: counts of rows, 0 or more")
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(2 * tail / 2**total, 1.0)


def paired_bootstrap(
    first: Float[Tensor, " n"],
    second: Float[Tensor, " m"],
    draws: Draws,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of mean(second) - mean(first), rows resampled together.

    Args:
        first: score of each row under the first run.
        second: score of the same rows, in the same order, under the second.
        draws: the source of the resampling.
        num_resamples: bootstrap resamples.
        confidence: coverage asked for.

    Raises:
        ValueError: no rows, or runs of different lengths.
    """
    _check_confidence(confidence)
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"rows: {len(first)} and {len(second)}. Try: runs on the same rows, at least one")
    difference = (second - first).to(torch.float64)
    size = len(difference)
    means = torch.empty(num_resamples, dtype=torch.float64)
    rows_at_once = max(1, 4_000_000 // size)  # keeps the table of drawn indices near 32 MB
    for start in range(0, num_resamples, rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, num_resamples))
        index = (draws.uniform("bootstrap", rows, (size,), dtype=torch.float64) * size).long()
        means[rows] = difference[index].mean(-1)
    edges = torch.tensor([0.5 - confidence / 2, 0.5 + confidence / 2], dtype=torch.float64)
    low, high = means.quantile(edges).tolist()
    return Interval(float(difference.mean()), low, high)


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval; infinitely wide for a single seed.

    Raises:
        ValueError: no values.
    """
    _check_confidence(confidence)
    if not values:
        raise ValueError("values: none. Try: the result of at least one seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = student_quantile(0.5 + confidence / 2, len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def student_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    term, total = 1.0, 0.0
    if degrees % 2:
        if degrees > 1:
            term = math.cos(angle)
            for k in range(1, (degrees - 1) // 2 + 1):
                total += term
                term *= cosine_squared * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine_squared * (2 * k - 1) / (2 * k)
        inside = math.sin(angle) * total
    return 0.5 + inside / 2


def student_quantile(probability: float, degrees: int) -> float:
    """The t below which a share `probability` of Student's distribution lies, by bisection.

    Raises:
        ValueError: a probability outside (0, 1), or no degree of freedom.
    """
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise ValueError(f"probability: {probability} with {degrees} degrees. Try: one in (0, 1) and degrees >= 1")
    if probability < 0.5:
        return -student_quantile(1.0 - probability, degrees)
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2
