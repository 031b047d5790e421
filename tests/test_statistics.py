"""Intervals and tests against published values, brute force and coverage."""

import itertools
import math

import pytest
import torch

from d1lit import statistics as st
from d1lit.draws import CounterDraws


def test_wilson_interval_has_its_published_values_and_its_defining_property() -> None:
    interval = st.wilson_interval(81, 263)  # Newcombe (Statistics in Medicine 1998), table I, method 3
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert st.wilson_interval(0, 20).low == 0.0
    assert st.wilson_interval(20, 20).high == 1.0
    z = 1.959963984540054
    for successes, total in ((1, 29), (15, 148), (130, 500)):
        found = st.wilson_interval(successes, total)
        for edge in (found.low, found.high):
            assert abs(found.value - edge) == pytest.approx(z * math.sqrt(edge * (1 - edge) / total), rel=1e-9)
    for bad in ((1, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="successes"):
            st.wilson_interval(*bad)
    with pytest.raises(ValueError, match="confidence"):
        st.wilson_interval(1, 2, 1.0)


def test_trials_of_cells_that_share_a_rows_fate_count_as_rows() -> None:
    rows = [8.0] * 3 + [0.0] * 7
    assert st.effective_trials(rows, [8.0] * 10) == pytest.approx(9.0)  # all or nothing: a row is a trial, one is spent
    assert st.effective_trials([0.0] * 10, [8.0] * 10) == st.effective_trials([8.0] * 10, [8.0] * 10) == 10.0
    assert st.effective_trials([1.0], [8.0]) == 1.0
    assert st.effective_trials([4.0, 4.0, 4.0, 5.0], [8.0] * 4) == 32.0, "never more than there are"
    # By hand: share 5/12; residuals 3-2.5, 1-2.5, 1-0 of sizes 6, 6 and 0 cells are 0.5, -1.5, 1.
    found = st.effective_trials([3.0, 1.0, 1.0], [6.0, 6.0, 0.0])
    assert found == pytest.approx((5 / 12) * (7 / 12) / (3 / 2 * 3.5 / 144))
    for bad in (([], []), ([1.0], [1.0, 1.0])):
        with pytest.raises(ValueError, match="clusters"):
            st.effective_trials(*bad)


def test_the_interval_of_clustered_cells_covers_what_it_promises_and_plain_wilson_does_not() -> None:
    """Rows of 8 cells whose chance of being right differs from row to row (uniform): 60 rows, 1,000 times."""
    chance = CounterDraws(3).uniform("chance", torch.arange(1000), (60, 1), dtype=torch.float64)
    cells = CounterDraws(3).uniform("cells", torch.arange(1000), (60, 8), dtype=torch.float64) < chance
    right = cells.sum(-1).double()
    covered = {"rows": 0, "cells": 0}
    for successes in right.tolist():
        trials = {"rows": st.effective_trials(successes, [8.0] * 60), "cells": 480.0}
        for name, count in trials.items():
            interval = st.wilson_interval(sum(successes) / 480 * count, count)
            covered[name] += interval.low <= 0.5 <= interval.high
    print(covered)
    assert covered["rows"] >= 930 and covered["cells"] < 800


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                assert st.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for bad in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="k:"):
            st.pass_at_k(*bad)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert st.mcnemar_exact(0, 0) == 1.0
    assert st.mcnemar_exact(5, 5) == 1.0
    assert st.mcnemar_exact(0, 6) == pytest.approx(2 / 64)
    for b, c in itertools.product(range(6), repeat=2):
        total = b + c
        extreme = [k for k in range(total + 1) if abs(k - total / 2) >= abs(b - total / 2)]
        assert st.mcnemar_exact(b, c) == pytest.approx(sum(math.comb(total, k) for k in extreme) / 2**total)
    with pytest.raises(ValueError, match="counts"):
        st.mcnemar_exact(-1, 2)


def test_the_bootstrap_is_paired_reproducible_and_close_to_the_normal_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(400, generator=generator) < 0.4).double()
    second = torch.where(torch.rand(400, generator=generator) < 0.2, 1.0, first)
    draws = CounterDraws(3)
    interval = st.paired_bootstrap(first, second, draws)
    assert interval == st.paired_bootstrap(first, second, draws)
    difference = second - first
    half = 1.96 * difference.std().item() / 20
    assert interval.value == pytest.approx(difference.mean().item())
    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half + 1 / 400)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half + 1 / 400)
    same = st.paired_bootstrap(first, first, draws, num_resamples=100)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="rows"):
        st.paired_bootstrap(first, second[:3], draws)


def test_student_quantiles_are_the_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, wanted in table.items():
        assert st.student_quantile(0.975, degrees) == pytest.approx(wanted, abs=5e-4)
        assert st.student_quantile(0.025, degrees) == pytest.approx(-wanted, abs=5e-4)
    assert st.student_cdf(1.0, 1) == pytest.approx(0.75)
    assert st.student_cdf(0.0, 7) == 0.5
    with pytest.raises(ValueError, match="probability"):
        st.student_quantile(1.0, 3)


def test_seeds_have_a_t_interval() -> None:
    interval = st.mean_over_seeds([1.0, 2.0, 3.0])
    assert interval.value == 2.0
    assert interval.high - interval.value == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert st.mean_over_seeds([0.4]) == st.Interval(0.4, -math.inf, math.inf)
    with pytest.raises(ValueError, match="values"):
        st.mean_over_seeds([])
