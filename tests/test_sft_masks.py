"""SFT under a mask and its complement, and with one weight a token: written out on a small network."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from d1lit.data import CompletionBatch, EncodedRow, canvas_layout, completion_batch
from d1lit.draws import CounterDraws
from d1lit.losses import MaskedCrossEntropy
from d1lit.losses.supervised import per_target_token
from d1lit.masking import BernoulliMask, BlockMask, ExactCountMask, UniformTimes, context_adaptive_weight
from d1lit.modules import MaskedSFT
from d1lit.modules.optimizing import constant
from d1lit.schedules import CosineSchedule, LinearSchedule
from tests.end_to_end.small import EOS, prompt_rows, sgd, small_policy


def module_with(kind: type[MaskedSFT] = MaskedSFT, **changes: Any) -> MaskedSFT:
    settings: dict[str, Any] = {
        "policy": small_policy(torch.float64),
        "schedule": LinearSchedule(),
        "times": UniformTimes(low=1e-3),
        "validation_times": UniformTimes(low=1e-3),
        "mask": BernoulliMask(),
        "loss": MaskedCrossEntropy(per_target_token),
        "optimizer": sgd,
        "lr_schedule": partial(constant, warmup_updates=0),
        "num_updates": 1,
        "seed": 5,
    }
    return kind(**{**settings, **changes})


def rows() -> CompletionBatch:
    demonstrations = [EncodedRow(row.prompt_ids, row.example, [n % 20] * 3) for n, row in enumerate(prompt_rows(4))]
    return completion_batch(demonstrations, slice(0, 4), 0, partial(canvas_layout, completion_length=8), EOS, EOS)


def longhand(module: MaskedSFT, batch: CompletionBatch, hidden: torch.Tensor, weight: torch.Tensor) -> float:
    noised = torch.where(hidden, module.policy.mask_token_id, batch.ids)
    logprobs = torch.log_softmax(module.policy.head(module.policy.hidden(noised, batch.attention)), -1)
    nll = -logprobs.gather(2, batch.ids[..., None])[..., 0]
    return float((nll * weight * hidden).sum() / batch.is_target.sum())


@torch.no_grad()
def test_a_pair_of_masks_hides_every_target_once() -> None:
    module, batch, draws = module_with(complementary=True), rows(), CounterDraws(5)
    got, _ = module.masked_loss(batch, draws, module.times)
    t = module.times(draws, batch.row_ids, batch.row_ids, 4)
    first = module.mask(draws, batch.row_ids, t, batch.is_target)
    second = batch.is_target & ~first
    assert torch.equal(first ^ second, batch.is_target)
    expected = (
        longhand(module, batch, first, 1 / t[:, None]) + longhand(module, batch, second, 1 / (1 - t)[:, None])
    ) / 2
    assert float(got) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_weights_by_token_stand_in_the_place_of_the_schedules() -> None:
    cart = partial(context_adaptive_weight, geometric_prob=0.3)
    module, batch, draws = module_with(token_weight=cart), rows(), CounterDraws(5)
    got, _ = module.masked_loss(batch, draws, module.times)
    t = module.times(draws, batch.row_ids, batch.row_ids, 4)
    hidden = module.mask(draws, batch.row_ids, t, batch.is_target)
    assert float(got) == pytest.approx(longhand(module, batch, hidden, cart(hidden)), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask", [ExactCountMask(), BlockMask(3)])
def test_the_weight_of_a_mask_reaches_the_loss(mask: Any) -> None:
    module, batch, draws = module_with(mask=mask), rows(), CounterDraws(5)
    got, _ = module.masked_loss(batch, draws, module.times)
    t = module.times(draws, batch.row_ids, batch.row_ids, 4)
    where = draws, batch.row_ids, t, batch.is_target
    weight = mask.weight(*where)
    assert float(got) == pytest.approx(longhand(module, batch, mask(*where), weight / t[:, None]), rel=1e-5)
    assert not torch.equal(weight, torch.ones_like(weight))


def test_only_independent_masks_have_a_complement() -> None:
    with pytest.raises(ValueError, match=r"^module\.complementary: .* ExactCountMask .*Try: "):
        MaskedSFT.check(LinearSchedule(), ExactCountMask(), complementary=True)


def test_a_schedule_without_mirror_has_no_complement() -> None:
    with pytest.raises(ValueError, match=r"^module\.complementary: CosineSchedule .*Try: schedule=linear"):
        MaskedSFT.check(CosineSchedule(1e-3), BernoulliMask(), complementary=True)
