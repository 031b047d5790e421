"""Advantages: identities, the rule for rows no judge could judge, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from d1lit import advantages as adv
from d1lit.types import RewardBatch

GROUP = 4


def batch(total: Tensor, valid: Tensor | None = None) -> RewardBatch:
    valid = torch.ones(len(total), 1, dtype=torch.bool) if valid is None else valid[:, None]
    return RewardBatch(total[:, None], valid, torch.ones(1))


def rewards(seed: int = 0, groups: int = 5) -> Tensor:
    return torch.randn(groups * GROUP, generator=torch.Generator().manual_seed(seed))


CENTRED: dict[str, Callable[..., Tensor]] = {
    "group_mean": adv.group_mean,
    "group_zscore": adv.group_zscore,
    "batch_std": adv.group_mean_batch_std,
    "leave_one_out": adv.leave_one_out,
    "leave_one_out_zscore": adv.leave_one_out_zscore,
}
ALL = CENTRED | {"median": adv.group_median, "normalize_then_sum": adv.normalize_then_sum}


@pytest.mark.parametrize("function", CENTRED.values(), ids=CENTRED.keys())
def test_advantages_of_a_group_sum_to_zero(function: Callable[..., Tensor]) -> None:
    sums = function(batch(rewards()), GROUP).view(-1, GROUP).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=2e-6, rtol=0)


@pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())
def test_equal_rewards_teach_nothing(function: Callable[..., Tensor]) -> None:
    got = function(batch(torch.full((8,), 0.7)), GROUP)
    torch.testing.assert_close(got, torch.zeros(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("function", [*CENTRED.values(), adv.group_median])
def test_a_constant_added_to_all_rewards_changes_nothing(function: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(function(batch(rewards() + 3), GROUP), function(batch(rewards()), GROUP))


@pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())
def test_the_order_inside_a_group_does_not_matter(function: Callable[..., Tensor]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    shuffled = function(batch(rewards().view(-1, GROUP)[:, order].reshape(-1)), GROUP)
    plain = function(batch(rewards()), GROUP).view(-1, GROUP)[:, order].reshape(-1)
    torch.testing.assert_close(shuffled, plain, atol=1e-5, rtol=1e-5)


def test_leave_one_out_longhand() -> None:
    r = rewards()
    got = adv.leave_one_out(batch(r), GROUP)
    for i in range(len(r)):
        first = i // GROUP * GROUP
        others = [float(r[j]) for j in range(first, first + GROUP) if j != i]
        assert float(got[i]) == pytest.approx(float(r[i]) - sum(others) / 3, abs=1e-5)


def test_zscore_and_median_longhand() -> None:
    r = rewards().view(-1, GROUP)
    expected = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(adv.group_zscore(batch(r.flatten()), GROUP), expected.flatten())
    middle = r.sort(1).values[:, 1:3].mean(1, keepdim=True)
    torch.testing.assert_close(adv.group_median(batch(r.flatten()), GROUP), (r - middle).flatten())


@pytest.mark.parametrize("function", [*CENTRED.values(), adv.group_median])
def test_a_row_without_verdict_is_left_out(function: Callable[..., Tensor]) -> None:
    r = rewards(groups=1)
    valid = torch.tensor([True, True, False, True])
    got = function(batch(r, valid), GROUP)
    assert float(got[2]) == 0.0
    if function is not adv.group_mean_batch_std:
        torch.testing.assert_close(got[valid], function(batch(r[valid]), 3))


def test_dynamic_sampling_finds_the_groups_that_can_teach() -> None:
    r = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    assert adv.has_spread(batch(r), GROUP).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [1, 3])
def test_impossible_group_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"^group_size: "):
        adv.group_mean(batch(rewards(groups=2)), size)


def test_bound_functions_keep_their_eps() -> None:
    wide = partial(adv.group_zscore, eps=10.0)
    assert float(wide(batch(rewards()), GROUP).abs().max()) < float(
        adv.group_zscore(batch(rewards()), GROUP).abs().max()
    )
