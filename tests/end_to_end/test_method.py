"""The method itself, in a running Trainer: old log-probs, masks, micro-batches and where randomness comes from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.data import CompletionRows, EncodedRow, canvas_layout, completion_batch
from d1lit.draws import CounterDraws
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses import MaskedCrossEntropy
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.supervised import per_target_token
from d1lit.losses.terms import k3, token_mean
from d1lit.masking import BernoulliMask, GridTimes, UniformTimes, WholeRow
from d1lit.models import KVCache, LoraSettings, Policy, add_lora
from d1lit.modules import DiffuGRPO, MaskedSFT
from d1lit.modules.optimizing import constant
from d1lit.sampling import BlockSampler, DualCache
from d1lit.schedules import LinearSchedule
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs, Rollout
from tests.end_to_end.small import EOS, Noise, fit, largest_shift, make_module, prompt_rows, sampler, sgd, small_policy


class Watched(DiffuGRPO):
    """Takes old log-probs of its own, in other chunks, when the rollout is made; compares them at inner update 0."""

    def collect(self, *args: Any) -> Any:
        experience = super().collect(*args)
        self.views_per_chunk = 1
        with torch.no_grad():
            self.independent = [self._likelihood(e.rollout, e.advantages, e.step, 0)[0].value for e in experience]
        self.views_per_chunk = 2
        return experience

    def update(self, experience: Any, inner: int, num_micro: int) -> Tensor:
        place = next(i for i, e in enumerate(self.experience) if e is experience)
        self.seen.append((experience.step, inner, place))
        if inner == 0:
            new, _ = self._likelihood(experience.rollout, experience.advantages, experience.step, 0)
            assert new.value.requires_grad
            ratio = torch.exp(new.value.detach() - self.independent[place])
            self.ratios.append(float((ratio - 1).abs().max()))
        return super().update(experience, inner, num_micro)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("num_micro", [1, 2, 4])
def test_ratio_is_one_at_the_first_inner_update(num_micro, dtype, tolerance):
    """Under the weights that sampled, so every micro-batch of inner update 0 comes before the first optimizer step."""
    module = make_module(small_policy(dtype, init_std=0.2), Watched, num_updates=6)
    module.ratios, module.seen = [], []
    fit(module, num_micro)
    print(f"{dtype}, {num_micro} micro-batches: |ratio - 1| <= {max(module.ratios):.1e}")
    assert len(module.ratios) == 3 * num_micro
    assert max(module.ratios) <= tolerance


@dataclass
class Recording:
    """d1's estimator, and what it drew for which inner update of which rows."""

    inside: OneStepEstimator
    drawn: list[tuple[int, int, int, Tensor]] = field(default_factory=list)
    traits = EstimatorTraits("token")

    def corrupt(self, context: Context) -> Corruption:
        corruption = self.inside.corrupt(context)
        assert isinstance(context.draws, CounterDraws)
        first = int(context.rollout.row_ids[0])
        self.drawn.append((context.draws.step, context.inner, first, corruption.noised_ids.clone()))
        return corruption

    def combine(self, view_logprobs: Tensor, corruption: Corruption, context: Context) -> LogProbs:
        return self.inside.combine(view_logprobs, corruption, context)


@pytest.mark.parametrize("num_micro", [1, 2])
def test_every_mask_is_used_equally_often_by_every_micro_batch(num_micro):
    mu, rollouts = 3, 2
    estimator = Recording(OneStepEstimator(prompt_mask_prob=0.5, num_masks=1, share_within_group=False))
    module = make_module(small_policy(), Watched, num_inner_updates=mu, num_updates=mu * rollouts, estimator=estimator)
    module.ratios, module.seen = [], []
    fit(module, num_micro)
    times = Counter((inner, micro) for _, inner, micro in module.seen)
    assert times == {(inner, micro): rollouts for inner in range(mu) for micro in range(num_micro)}
    # inner-major: no micro-batch goes on to the next mask before all have used this one
    assert module.seen == [(s, i, m) for s in range(rollouts) for i in range(mu) for m in range(num_micro)]
    views: dict[tuple[int, int, int], list[Tensor]] = {}
    for step, inner, first_row, ids in estimator.drawn:
        views.setdefault((step, inner, first_row), []).append(ids)
    assert len(views) == rollouts * mu * num_micro
    for same in views.values():
        assert len(same) > 1  # when collected, and when used
        assert all(torch.equal(ids, same[0]) for ids in same)
    for step in range(rollouts):
        distinct = {tuple(ids[0].flatten().tolist()) for (s, _, row), ids in views.items() if s == step and row == 0}
        assert len(distinct) == mu


def test_old_logprobs_belong_to_the_weights_that_sampled():
    """With a learning rate of 0 nothing moves, so the stored old log-probs give a ratio of 1 at every inner update."""
    ratios = []

    class Stored(DiffuGRPO):
        def update(self, experience, inner, num_micro):
            if inner:
                with torch.no_grad():
                    new, _ = self._likelihood(experience.rollout, experience.advantages, experience.step, inner)
                ratios.append(float((torch.exp(new.value - experience.old[inner].value) - 1).abs().max()))
            return super().update(experience, inner, num_micro)

    fit(make_module(small_policy(), Stored, num_inner_updates=3, num_updates=6, optimizer=partial(sgd, lr=0.0)), 2)
    assert len(ratios) == 8
    assert max(ratios) <= 1e-6
    ratios.clear()
    fit(make_module(small_policy(), Stored, num_inner_updates=3, num_updates=6, optimizer=partial(sgd, lr=0.3)), 2)
    assert min(ratios) > 1e-4  # and once the weights move, it is no longer 1


@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_moves_when_it_is_told_to_and_only_then(adapted):
    """Every two optimizer steps of four: how far policy and reference are apart once each rollout is collected."""
    apart = []

    class Compared(DiffuGRPO):
        @torch.no_grad()
        def collect(self, *args: Any) -> Any:
            experience = super().collect(*args)
            ids = torch.tensor([[1, 2, 3, 4, 5, 22, 22]])
            here = self.policy.hidden(ids)
            with self.policy.reference():
                apart.append(float((here - self.policy.hidden(ids)).abs().max()))
            return experience

    policy = small_policy()
    if adapted:
        policy = add_lora(policy, LoraSettings("all_linear", 2, 4.0, 0.0), seed=0)
    policy.keep_reference()
    loss = ClippedPolicyLoss(0.2, 0.2, 0.04, k3, token_mean)
    fit(make_module(policy, Compared, loss=loss, num_inner_updates=1, reference_sync_every=2))
    assert [distance == 0.0 for distance in apart] == [True, False, True, False], apart
    policy.drop_reference()
    assert not policy.has_kept_reference
    assert not [name for name in policy.state_dict() if "reference" in name]


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_cut_into_micro_batches_does_not_change_the_update(beta):
    def weights(num_micro: int, num_updates: int) -> Any:
        policy = small_policy(torch.float64)
        if beta:
            policy.keep_reference()
        loss = ClippedPolicyLoss(0.2, 0.2, beta, k3, token_mean)
        return fit(make_module(policy, loss=loss, num_updates=num_updates), num_micro)

    start = dict(small_policy(torch.float64).state_dict())
    for num_updates in (1, 4):
        whole = weights(1, num_updates)
        moved = largest_shift(whole, {**whole, **start})  # a kept reference stays where it is
        assert moved > 1e-3
        for num_micro in (2, 4):
            shift = largest_shift(whole, weights(num_micro, num_updates))
            print(f"beta {beta}, {num_updates} updates, {num_micro} micro-batches: {shift:.1e} of {moved:.1e}")
            assert shift < 1e-11 * moved


def sft_module(policy: Any, num_updates: int) -> MaskedSFT:
    return MaskedSFT(
        policy=policy,
        schedule=LinearSchedule(),
        times=UniformTimes(low=1e-3),
        validation_times=UniformTimes(low=1e-3),
        mask=BernoulliMask(),
        view=WholeRow(),
        loss=MaskedCrossEntropy(per_target_token),
        optimizer=sgd,
        lr_schedule=partial(constant, warmup_updates=0),
        num_updates=num_updates,
        seed=5,
    )


def fit_sft(module: MaskedSFT, num_micro: int, callbacks: Any = ()) -> Any:
    demonstrations = [
        EncodedRow(row.prompt_ids, row.example, [n % 20] * (n % 5 + 1)) for n, row in enumerate(prompt_rows())
    ]
    layout = partial(canvas_layout, completion_length=8)
    return fit(
        module,
        num_micro,
        callbacks=callbacks,
        make_dataset=lambda plan: CompletionRows(demonstrations, plan, module.num_updates, layout, EOS, EOS, 1),
    )


def test_the_cut_into_micro_batches_does_not_change_sft():
    whole = fit_sft(sft_module(small_policy(torch.float64), 3), 1)
    moved = largest_shift(whole, dict(small_policy(torch.float64).state_dict()))
    assert moved > 1e-3
    for num_micro in (2, 4):
        assert largest_shift(whole, fit_sft(sft_module(small_policy(torch.float64), 3), num_micro)) < 1e-11 * moved


def test_the_validation_loss_is_the_weighted_loss_over_a_fixed_grid_of_times():
    """Written out; whatever the batches, the global generators and dropout; and none of it without such rows."""
    settings = LoraSettings(targets="all_linear", rank=2, alpha=4, dropout=0.5)
    module = sft_module(add_lora(small_policy(torch.float64), settings, 0).train(), 3)
    assert module.validation_loss(4) is None
    module.validation_times = GridTimes(low=1e-3)
    module.validation_rows = [
        EncodedRow(row.prompt_ids, row.example, [n % 20] * (n % 5 + 1)) for n, row in enumerate(prompt_rows(6))
    ]
    module.layout = partial(canvas_layout, completion_length=8)
    found = [module.validation_loss(size) for size in (1, 4, 6, 6)]
    assert max(found) - min(found) < 1e-12 * abs(found[0])
    assert found[2] == found[3]
    assert module.policy.training
    batch = completion_batch(module.validation_rows, slice(0, 6), 0, module.layout, EOS, EOS)
    module.policy.eval()
    total = 0.0
    for n, t in enumerate(1e-3 + 0.999 * torch.linspace(0, 1, 6)):
        is_masked = module.mask(CounterDraws(0, step=-1), torch.tensor([n]), t[None], batch.is_target[n : n + 1])[0]
        noised = torch.where(is_masked, module.policy.mask_token_id, batch.ids[n])
        attention = None if batch.attention is None else batch.attention[n : n + 1]
        logits = module.policy.head(module.policy.hidden(noised[None], attention))[0].detach().double()
        nll = -torch.log_softmax(logits, -1).gather(-1, batch.ids[n][:, None])[:, 0]
        total += float((nll * is_masked).sum() / t.double())
    assert found[0] == pytest.approx(total / int(batch.is_target.sum()), rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_drawing_from_the_global_generators_changes_nothing(dropout):
    """Not even with dropout, which has no other source: it is seeded at every step."""
    settings = LoraSettings(targets="all_linear", rank=2, alpha=4, dropout=dropout)

    def grpo(*callbacks: Any) -> Any:
        return fit(make_module(add_lora(small_policy(), settings, 0)), 2, callbacks=callbacks)

    def sft(*callbacks: Any) -> Any:
        return fit_sft(sft_module(add_lora(small_policy(), settings, 0), 4), 2, callbacks)

    for stage in (grpo, sft):
        plain = stage()
        for seed in (1, 9):
            assert largest_shift(plain, stage(Noise(seed))) == 0.0


def test_an_approximate_sampler_is_compared_in_every_tenth_rollout(monkeypatch):
    """A comparison costs a forward a step, which is about what a cached rollout costs."""
    compared, replay = [], BlockSampler.replay

    def noted(self: BlockSampler, policy: Policy, rollout: Rollout, num_rows: int) -> Tensor:
        compared.append(module.global_step)
        return replay(self, policy, rollout, num_rows)

    monkeypatch.setattr(BlockSampler, "replay", noted)
    module = make_module(small_policy(), sampler=sampler(cache=DualCache(KVCache)), num_inner_updates=2, num_updates=42)
    fit(module)
    assert compared == [0, 20, 40], "optimizer steps at the start of rollouts 0, 10 and 20"
