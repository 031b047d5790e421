"""Times and masks: the laws they promise, and that rows do not depend on their neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d1lit.attention import block_streams
from d1lit.draws import CounterDraws, random_subset, spread_counts
from d1lit.masking import (
    AntitheticTimes,
    BernoulliMask,
    BlockMask,
    ExactCountMask,
    GridTimes,
    LogUniformMaskTimes,
    LowDiscrepancyTimes,
    StratifiedTimes,
    UniformTimes,
    apply_mask,
    complementary_mask,
    context_adaptive_weight,
)
from tests.golden.replay import ReplayDraws

DRAWS = CounterDraws(seed=7)
ROWS = torch.arange(64)


def _times(sampler: Any, n: int = 64) -> torch.Tensor:
    return sampler(DRAWS, torch.arange(n), torch.arange(n), n)


@pytest.mark.parametrize(
    "sampler", [UniformTimes(0.2, 0.7), StratifiedTimes(0.2, 0.7), LowDiscrepancyTimes(0.2, 0.7), GridTimes(0.2, 0.7)]
)
def test_times_stay_in_the_range_and_do_not_depend_on_the_cut(sampler: Any) -> None:
    whole = _times(sampler)
    assert float(whole.min()) >= 0.2 and float(whole.max()) <= 0.7 + 1e-6
    parts = [sampler(DRAWS, ROWS[i : i + 16], ROWS[i : i + 16], 64) for i in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler(DRAWS, ROWS[order], ROWS[order], 64), whole[order])


def test_each_stratum_is_met_once() -> None:
    for sampler in (StratifiedTimes(0.0), LowDiscrepancyTimes(0.0)):
        assert sorted((_times(sampler) * 64).long().tolist()) == list(range(64))


def test_low_discrepancy_times_are_evenly_spaced() -> None:
    gaps = torch.diff(_times(LowDiscrepancyTimes(0.0)).sort().values)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 64), atol=1e-6, rtol=0)


def test_antithetic_pairs_mirror_each_other() -> None:
    t = _times(AntitheticTimes(0.1, 0.9)).view(-1, 2)
    torch.testing.assert_close(t.sum(1), torch.ones(32))


def test_grid_is_that_of_d1() -> None:
    torch.testing.assert_close(_times(GridTimes(1e-3), 10), (1 - 1e-3) * torch.linspace(0, 1, 10) + 1e-3)


def test_log_uniform_times_spread_the_logarithm() -> None:
    t = LogUniformMaskTimes(StratifiedTimes(0.0), eps=1e-3)(DRAWS, ROWS, ROWS, 64)
    logs = torch.log(t * (1 - 1e-3))
    gaps = torch.diff(logs.sort().values)
    assert float(gaps.max()) < 2.2 * float(logs.max() - logs.min()) / 63


def test_bernoulli_masks_at_the_stated_rate_and_only_where_allowed() -> None:
    rows, allowed = torch.arange(400), torch.ones(400, 100, dtype=torch.bool)
    allowed[:, :10] = False
    hidden = BernoulliMask()(DRAWS, rows, torch.full((400,), 0.3), allowed)
    assert not bool(hidden[:, :10].any())
    assert abs(float(hidden[:, 10:].float().mean()) - 0.3) < 4 * (0.3 * 0.7 / 36_000) ** 0.5


def test_masks_of_a_row_do_not_depend_on_other_rows_or_on_padding_behind() -> None:
    prob, allowed = torch.full((8,), 0.5), torch.ones(8, 20, dtype=torch.bool)
    whole = BernoulliMask()(DRAWS, torch.arange(8), prob, allowed)
    alone = BernoulliMask()(DRAWS, torch.tensor([5]), prob[:1], allowed[:1])
    longer = BernoulliMask()(DRAWS, torch.arange(8), prob, torch.ones(8, 33, dtype=torch.bool))
    assert torch.equal(alone[0], whole[5])
    assert torch.equal(longer[:, :20], whole)


def test_exact_counts_have_no_binomial_noise_and_never_zero() -> None:
    allowed = torch.zeros(64, 30, dtype=torch.bool)
    allowed[:, 10:] = True
    prob = torch.linspace(0.001, 1, 64)
    hidden = ExactCountMask()(DRAWS, ROWS, prob, allowed)
    assert torch.equal(hidden.sum(1), torch.ceil(prob * 20).long().clamp(min=1))
    assert not bool((hidden & ~allowed).any())


def test_random_subsets_are_uniform() -> None:
    rows = torch.arange(6000)
    chosen = random_subset(DRAWS.uniform("x", rows, (4,)), torch.full((6000,), 2), torch.ones(6000, 4).bool())
    counts = torch.bincount((chosen * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16)
    pairs = counts[counts > 0]
    assert len(pairs) == 6
    assert float(((pairs - 1000) ** 2 / 1000).sum()) < 20.5  # chi-squared with 5 degrees of freedom, p = 0.001


def test_complementary_masks_hide_every_token_once() -> None:
    allowed = torch.rand(16, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    first = BernoulliMask()(DRAWS, torch.arange(16), torch.full((16,), 0.4), allowed)
    second = complementary_mask(first, allowed)
    assert torch.equal(first ^ second, allowed) and not bool((first & second).any())


def test_block_mask_noises_one_block_and_hides_the_later_ones() -> None:
    maskable = torch.zeros(200, 20, dtype=torch.bool)
    maskable[:, 4:] = True
    hidden = BlockMask(4)(DRAWS, torch.arange(200), torch.full((200,), 0.5), maskable)
    block = (torch.arange(16) // 4).expand(200, -1)
    tail = hidden[:, 4:]
    chosen = torch.stack([tail[:, 4 * b :].all(1) for b in range(4)], dim=1).long().argmax(1)  # first block all hidden
    assert not bool(hidden[:, :4].any())
    for row, masks, place in zip(chosen.tolist(), tail, block, strict=True):
        assert bool(masks[place >= row].all()) or row == 0
    assert len(set(chosen.tolist())) == 4


def _expected_weight(mask: Any, draws: ReplayDraws, prob: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    """Mean over rows of each token's weight under the linear schedule."""
    where = draws, torch.arange(len(prob)), prob, maskable
    return (mask(*where) * mask.weight(*where) / prob[:, None]).mean(0)


def test_an_exact_number_of_hidden_tokens_weighs_one_in_expectation() -> None:
    """Over all times and all rotations of the row; rounded numbers at 1/t gave 1.36 at ten tokens."""
    size, steps = 10, 200
    prob = ((torch.arange(steps) + 0.5) / steps).repeat_interleave(size)
    rotated = (torch.arange(size)[None] + torch.arange(size)[:, None]) % size / size + 0.01
    draws = ReplayDraws({"mask": rotated.repeat(steps, 1)})
    maskable = torch.ones(len(prob), size, dtype=torch.bool)
    counts = torch.bincount(ExactCountMask()(draws, torch.arange(len(prob)), prob, maskable).sum(1))
    assert counts.tolist() == [0] + [steps] * size  # every number equally often
    draws = ReplayDraws({"mask": rotated.repeat(steps, 1)})
    torch.testing.assert_close(_expected_weight(ExactCountMask(), draws, prob, maskable), torch.ones(size))


def test_a_noised_block_weighs_one_in_expectation() -> None:
    """Over all choices of the block and of who is hidden in it."""
    blocks, levels, prob = 3, 20, 0.35
    each = torch.cartesian_prod(torch.arange(blocks), torch.arange(levels))
    uniforms = {"block": (each[:, :1] + 0.5) / blocks, "mask": ((each[:, 1:] + 0.5) / levels).expand(-1, 13)}
    maskable = torch.arange(13).expand(len(each), -1) >= 3  # blocks of 4, 4 and 2 tokens
    found = _expected_weight(BlockMask(4), ReplayDraws(uniforms), torch.full((len(each),), prob), maskable)
    torch.testing.assert_close(found, maskable[0].float())


def _sizes(round_sums: bool) -> list[int]:
    """How often each size from 1 to 10 is met by 4 strata over all starts."""
    counts, length, index = torch.zeros(11, dtype=torch.int64), torch.full((4,), 10), torch.arange(4)
    for start in range(1, 11):
        got = (spread_counts(torch.full((4,), start), index, 4, length, round_sums) - 1) % 10 + 1
        counts += torch.bincount(got, minlength=11)
    return counts[1:].tolist()


def test_spread_counts_visit_all_sizes_equally() -> None:
    assert _sizes(round_sums=False) == [4] * 10


def test_the_published_rounding_favours_every_second_size() -> None:
    assert _sizes(round_sums=True) == [2, 6] * 5


def test_apply_mask() -> None:
    assert apply_mask(torch.tensor([[1, 2]]), torch.tensor([[True, False]]), 9).tolist() == [[9, 2]]


def test_cart_weight_against_a_longhand_sum() -> None:
    masked = torch.rand(5, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    got = context_adaptive_weight(masked, 0.3)
    for b in range(5):
        for n in range(9):
            expected = sum(0.5 * 0.3 * 0.7 ** (abs(n - i) - 1) for i in range(9) if not masked[b, i])
            assert float(got[b, n]) == pytest.approx(expected if masked[b, n] else 0.0, abs=1e-6)


def test_attention_of_one_block_is_a_clean_and_a_noised_half() -> None:
    (allowed,) = block_streams(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), 0)
    half = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(allowed, torch.block_diag(half, half).bool())
