"""SFT under a mask and its complement, and with one weight a token: written out on a small network."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from d1lit.data import (
    CompletionBatch,
    EncodedRow,
    Layout,
    canvas_layout,
    completion_batch,
    right_padded_layout,
)
from d1lit.draws import CounterDraws
from d1lit.estimators.any_order import AnyOrderEstimator
from d1lit.losses import MaskedCrossEntropy
from d1lit.losses.supervised import per_target_token
from d1lit.masking import (
    BernoulliMask,
    BlockMask,
    BlockStreams,
    ExactCountMask,
    OrderStreams,
    UniformTimes,
    WholeRow,
    context_adaptive_weight,
)
from d1lit.modules import MaskedSFT
from d1lit.modules.optimizing import constant
from d1lit.schedules import ConstantSchedule, CosineSchedule, LinearSchedule
from d1lit.scoring import score
from d1lit.types import Context, NoisedRows, Rollout
from tests.end_to_end.small import EOS, prompt_rows, sgd, small_policy


def module_with(kind: type[MaskedSFT] = MaskedSFT, **changes: Any) -> MaskedSFT:
    settings: dict[str, Any] = {
        "policy": small_policy(torch.float64, num_layers=3),
        "schedule": LinearSchedule(),
        "times": UniformTimes(low=1e-3),
        "validation_times": UniformTimes(low=1e-3),
        "mask": BernoulliMask(),
        "view": WholeRow(),
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
        MaskedSFT.check(LinearSchedule(), ExactCountMask(), WholeRow(), complementary=True)


def test_a_schedule_without_mirror_has_no_complement() -> None:
    with pytest.raises(ValueError, match=r"^module\.complementary: CosineSchedule .*Try: schedule=linear"):
        MaskedSFT.check(CosineSchedule(1e-3), BernoulliMask(), WholeRow(), complementary=True)


# --------------------------------------------------------------------------------------------- clean and noised at once

EVERY_TARGET = ConstantSchedule(1.0)
LAYOUTS = {
    "canvas": partial(canvas_layout, completion_length=8),
    "right": partial(right_padded_layout, max_length=24, pad_to_max=False, learn_padding=False),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def laid_out(layout: Layout) -> CompletionBatch:
    """Prompts and completions of different lengths."""
    demonstrations = [
        EncodedRow([5, 6, 7, 8][: 4 - n], {"id": n}, [(3 * n + i) % 20 for i in range(3 + n)]) for n in range(4)
    ]
    return completion_batch(demonstrations, slice(0, 4), 0, layout, EOS, EOS)


def real_columns(batch: CompletionBatch, n: int) -> list[int]:
    seen = torch.ones_like(batch.is_target) if batch.attention is None else batch.attention
    return [c for c in range(batch.ids.shape[1]) if seen[n, c]]


@torch.no_grad()
@layouts
def test_blocks_are_learnt_as_if_nothing_stood_behind_them(layout: Layout) -> None:
    """Each noised block at the end of a sequence of its own, after the clean blocks before it."""
    module, batch, draws = module_with(view=BlockStreams(3)), laid_out(layout), CounterDraws(5)
    got, metrics = module.masked_loss(batch, draws, module.times)
    t = module.times(draws, batch.row_ids, batch.row_ids, 4)
    hidden = module.mask(draws, batch.row_ids, t, batch.is_target)
    expected = 0.0
    for n in range(4):
        columns = real_columns(batch, n)
        first = next(c for c in columns if batch.is_target[n, c])
        for start in range(first, batch.ids.shape[1], 3):
            inside = [c for c in columns if start <= c < start + 3 and hidden[n, c]]
            places = [c for c in columns if c < start + 3]
            ids = batch.ids[n, places].clone()
            for c in inside:
                ids[places.index(c)] = module.policy.mask_token_id
            block = torch.tensor([max(-1, (c - first) // 3) for c in places])
            attention = (block[None] <= block[:, None])[None]
            logits = module.policy.head(module.policy.hidden(ids[None], attention, torch.tensor(places)[None]))[0]
            for c in inside:
                expected -= float(logits[places.index(c)].log_softmax(-1)[batch.ids[n, c]] / t[n])
    assert float(metrics["num_scored"]) == int(hidden.sum())
    assert float(got) == pytest.approx(expected / int(batch.is_target.sum()), rel=1e-5)


@torch.no_grad()
@layouts
def test_an_order_is_learnt_token_by_token(layout: Layout) -> None:
    """Every token from a sequence that holds the prompt and what comes before it, read in the order of the draw."""
    module, batch = module_with(view=OrderStreams(), schedule=EVERY_TARGET), laid_out(layout)
    draws = CounterDraws(5)
    got, metrics = module.masked_loss(batch, draws, module.times)
    key = draws.uniform("order", batch.row_ids, (batch.ids.shape[1],))
    expected = 0.0
    for n in range(4):
        prompt = [c for c in real_columns(batch, n) if not batch.is_target[n, c]]
        order = sorted((c for c in range(batch.ids.shape[1]) if batch.is_target[n, c]), key=lambda c, n=n: key[n, c])
        for turn, c in enumerate(order):
            places = [*prompt, *order[:turn], c]
            ids = batch.ids[n, places].clone()
            ids[-1] = module.policy.mask_token_id
            attention = torch.ones(len(places), len(places), dtype=torch.bool).tril()
            attention[: len(prompt), : len(prompt)] = True
            hidden = module.policy.hidden(ids[None], attention[None], torch.tensor(places)[None])
            expected -= float(module.policy.head(hidden)[0, -1].log_softmax(-1)[batch.ids[n, c]])
    assert float(metrics["num_scored"]) == int(batch.is_target.sum())
    assert float(got) == pytest.approx(expected / int(batch.is_target.sum()), rel=1e-5)


@torch.no_grad()
def test_what_is_learnt_of_an_order_is_what_any_order_scores() -> None:
    """The loss is minus the mean of the estimator's log-probs of a rollout committed in that order."""
    module, batch = module_with(view=OrderStreams(), schedule=EVERY_TARGET), rows()
    draws, prompt = CounterDraws(5), batch.ids.shape[1] - 8
    got, _ = module.masked_loss(batch, draws, module.times)
    turn = draws.uniform("order", batch.row_ids, (batch.ids.shape[1],))[:, prompt:].argsort(1).argsort(1)
    seen = torch.ones_like(batch.is_target) if batch.attention is None else batch.attention
    nothing, everything = torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    rollout = Rollout(
        *(batch.ids[:, :prompt], seen[:, :prompt], batch.ids[:, prompt:], everything),
        *(batch.row_ids, 1, turn, nothing, nothing, nothing),
    )
    context = Context(rollout, torch.zeros(4), 0, 1, module.policy.mask_token_id, draws)
    estimator = AnyOrderEstimator(temperature=1.0)
    views = estimator.corrupt(context)
    value = estimator.combine(score(module.policy, rollout, views).logprobs, views, context).value
    assert float(got) == pytest.approx(-float(value.mean()), rel=1e-5)


def test_a_view_refuses_what_it_makes_no_sense_of() -> None:
    with pytest.raises(ValueError, match=r"^module\.schedule: LinearSchedule .*OrderStreams.*Try: schedule=constant"):
        MaskedSFT.check(LinearSchedule(), BernoulliMask(), OrderStreams())
    MaskedSFT.check(EVERY_TARGET, BernoulliMask(), OrderStreams())
    shifted = small_policy(torch.float64)
    shifted.network.config.shift = True
    with pytest.raises(ValueError, match=r"^module\.view: BlockStreams needs a network .*Try: .*\[E207\]"):
        module_with(policy=shifted, view=BlockStreams(3))
    module_with(policy=shifted)


@pytest.mark.parametrize("view", [WholeRow(), BlockStreams(3), OrderStreams()])
def test_the_length_that_is_planned_is_the_one_that_runs(view: Any) -> None:
    batch = rows()
    noised = NoisedRows(batch.ids, batch.is_target, batch.is_target, None, batch.row_ids, 21)
    seen = view(noised, CounterDraws(0))
    assert seen.ids.shape[1] == view.length(batch.ids.shape[1] - 8, 8)
