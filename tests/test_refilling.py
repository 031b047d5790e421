"""Dynamic sampling, and parts of the reward that are read off tokens: lengths and the distance to the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from d1lit.advantages import group_mean, overlong_penalty
from d1lit.data import BatchPlan, PromptCycles, moved, prompt_batch
from d1lit.estimators import spg
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.policy_gradient import ReinforceLoss
from d1lit.losses.terms import KLEstimator, absolute, k1, k2, k3, token_mean, unit_length
from d1lit.losses.two_terms import WithSupervised
from d1lit.losses.weighted import PreferenceLoss
from d1lit.modules import DiffuGRPO
from d1lit.modules.refilling import JudgedRollout, group_sources, lacks_spread, refilled
from d1lit.rewards.parts import RewardParts
from d1lit.scoring import score
from d1lit.types import LogProbs, PolicyLoss, RewardBatch, Rollout, Verdict
from tests.end_to_end.small import EOS, EvenTokens, make_module, prompt_rows, quiet, sampler, small_policy

G = 3
PREFERENCE = PreferenceLoss(0.2, unit_length)


def rewards_of(spread: list[bool]) -> RewardBatch:
    """Groups of three; those with spread hold 0, 1, 2 and the others 5, 5, 5."""
    value = torch.tensor([[0.0, 1.0, 2.0] if yes else [5.0] * 3 for yes in spread]).flatten()[:, None]
    return RewardBatch(value, torch.ones_like(value).bool(), torch.ones(1))


def test_gaps_are_filled_in_order_and_on_their_own_rank() -> None:
    first = rewards_of([True, False, False, False, True, False])
    more = rewards_of([False, True, False, False, True, True])
    assert group_sources(first, more, G, 1).tolist() == [0, 7, 10, 11, 4, 5]  # three spare groups, four gaps
    assert group_sources(first, more, G, 2).tolist() == [0, 7, 2, 10, 4, 11]  # ranks of three groups each


def numbered(start: int, count: int, rewards: RewardBatch) -> JudgedRollout:
    """Rollouts that carry their global number everywhere."""
    row = torch.arange(start, start + count)
    ids = row[:, None].expand(-1, 4)
    blank = row[:, None].expand(-1, 4).float()
    rollout = Rollout(
        ids, ids > -1, ids, ids > -1, row, G, ids, blank, blank, blank, None,
        tuple(map(str, row.tolist())), tuple({"n": n} for n in row.tolist()), 2, 10,
    )  # fmt: skip
    return JudgedRollout(rollout, {"x": [Verdict(float(n)) for n in row.tolist()]}, rewards)


@pytest.mark.parametrize("world_size", [1, 2])
def test_rollout_verdicts_and_rewards_move_together(world_size: int) -> None:
    first, more = rewards_of([True, False, False, False]), rewards_of([True, False, False, True])
    per_rank = 4 // world_size
    for rank in range(world_size):
        here = slice(rank * per_rank, (rank + 1) * per_rank)
        start, count = rank * per_rank * G, per_rank * G
        old, new = numbered(start, count, first), numbered(100 + start, count, more)
        got = refilled(old, new, G, rank, world_size)
        source = group_sources(first, more, G, world_size)[here].tolist()
        rows = [(s * G if s < 4 else 100 + (s - 4) * G) + j for s in source for j in range(G)]
        assert got.rollout.row_ids.tolist() == rows
        assert got.rollout.completion_ids[:, 0].tolist() == rows
        assert [verdict.value for verdict in got.verdicts["x"]] == rows
        assert list(got.rollout.completions) == list(map(str, rows))
        assert [example["n"] for example in got.rollout.examples] == rows
        assert (got.rollout.num_forwards, got.rollout.num_tokens_forward) == (4, 20)
    whole = group_sources(first, more, G, world_size).tolist()
    assert [bool(group.std() > 0) for group in got.rewards.value.view(-1, G)] == [
        (first if s < 4 else more).value.view(-1, G)[s % 4].std() > 0 for s in whole
    ]


def test_reserves_are_other_prompts_and_travel_with_the_batch() -> None:
    rows = prompt_rows(12)
    plain = PromptCycles(rows, BatchPlan(2, 2), 2, 4, EOS, seed=1)
    cycles = replace(plain, num_refills=2)
    batch = moved(cycles[0], torch.device("cpu"))
    assert batch.prompts is not None and len(batch.reserves) == 2
    everyone = [batch.prompts, *batch.reserves]
    assert torch.cat([part.row_ids for part in everyone]).tolist() == list(range(6))  # their draws differ
    assert len({example["id"] for part in everyone for example in part.examples}) == 6
    assert cycles[1].reserves == () and plain[0].reserves == ()
    later = cycles[2]
    assert later.prompts is not None
    assert not {e["id"] for e in later.prompts.examples} & {e["id"] for p in everyone for e in p.examples}


class Uneven:
    """Nothing for any row but those of one prompt, which earn what their tokens say."""

    def __call__(self, completions: Any, examples: Any) -> list[Verdict]:
        even = EvenTokens()(completions, examples)
        return [v if e["id"] in ("3", "7") else Verdict(0.0) for v, e in zip(even, examples, strict=True)]


@pytest.fixture(scope="module")
def trainer() -> L.Trainer:
    quiet()
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def module_with(trainer: L.Trainer, **changes: Any) -> DiffuGRPO:
    module = make_module(small_policy(), **changes)
    module.trainer = trainer
    return module


def test_a_rollout_is_refilled_until_its_groups_differ(trainer: L.Trainer) -> None:
    module = module_with(trainer, reward=RewardParts({"even": Uneven()}, {"even": 1.0}))
    cycles = PromptCycles(prompt_rows(12), BatchPlan(2, 2), 2, 4, EOS, seed=1, num_refills=5)
    batch = cycles[0]
    assert batch.prompts is not None
    (experience,) = module.collect(batch.prompts, 0, 1, batch.reserves)
    assert {example["id"] for example in experience.rollout.examples} == {"3", "7"}
    assert bool((experience.advantages.view(2, -1).abs().sum(1) > 0).all())
    assert [v.value for v in module.verdicts["even"]] == experience.rewards.tolist()
    (plain,) = module.collect(batch.prompts, 0, 1)
    assert {e["id"] for e in plain.rollout.examples} == {e["id"] for e in batch.prompts.examples}
    rewards = RewardBatch(plain.rewards[:, None], torch.ones(6, 1).bool(), torch.ones(1))
    assert lacks_spread(JudgedRollout(plain.rollout, {}, rewards), 3)
    value = module.update(experience, 0, 1)
    assert torch.isfinite(value)


def test_overlong_penalty_longhand() -> None:
    lengths = torch.tensor([1, 4, 5, 6, 8])
    mask = torch.arange(8) < lengths[:, None]
    blank = torch.zeros(5, 8)
    rollout = Rollout(mask.long(), mask, mask.long(), mask, torch.arange(5), 1, mask.long(), blank, blank, blank)
    assert overlong_penalty(rollout, cache=4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_penalties_are_parts_of_the_reward(trainer: L.Trainer) -> None:
    prompts = prompt_batch(prompt_rows(2), range(2), EOS)
    plain = module_with(trainer)
    (before,) = plain.collect(prompts, 0, 1)
    module = module_with(trainer, length_penalty=partial(overlong_penalty, cache=8), kl_in_reward=0.5)
    policy = module.policy
    policy.keep_reference()
    with torch.no_grad():
        for p in policy.reference_model.parameters():  # type: ignore[union-attr]
            p.add_(0.05 * torch.sin(torch.arange(p.numel()).float()).view_as(p))
    (after,) = module.collect(prompts, 0, 1)
    assert torch.equal(before.rollout.completion_ids, after.rollout.completion_ids)
    context = module._context(after.rollout, torch.zeros(6), 0, 0)
    corruption = module.estimator.corrupt(context)
    with torch.no_grad():
        now = module.estimator.combine(score(policy, after.rollout, corruption).logprobs, corruption, context)
        with policy.reference():
            ref = module.estimator.combine(score(policy, after.rollout, corruption).logprobs, corruption, context)
    kl = ((now.value - ref.value) * now.weight).sum(1)
    assert float(kl.abs().max()) > 1e-3
    expected = before.rewards + overlong_penalty(after.rollout, 8) - 0.5 * kl
    torch.testing.assert_close(after.rewards, expected)
    batch = RewardBatch(expected[:, None], torch.ones(6, 1).bool(), torch.ones(1))
    torch.testing.assert_close(after.advantages, group_mean(batch, 3))


@pytest.mark.parametrize(
    ("estimator", "value"),
    [(k1, lambda d: d), (k2, lambda d: d**2 / 2), (k3, lambda d: torch.exp(-d) - 1 + d), (absolute, torch.abs)],
)
def test_the_kl_in_the_reward_has_its_closed_form(
    trainer: L.Trainer, monkeypatch: pytest.MonkeyPatch, estimator: KLEstimator, value: Callable[[Tensor], Tensor]
) -> None:
    """Log-probs are 0.1, 0.2 ... above the reference's, the last of each completion weighs nothing."""
    module = module_with(trainer, kl_in_reward=0.5, kl_in_reward_estimator=estimator)
    module.policy.keep_reference()
    d = torch.arange(1, 7).float()[:, None] * torch.tensor([0.1, -0.2, 9.0])
    weight = torch.tensor([1.0, 1.0, 0.0]).expand(6, 3)
    answers = iter([LogProbs(d, weight), LogProbs(torch.zeros(6, 3), weight)])
    monkeypatch.setattr(module, "_likelihood", lambda *_: (next(answers), None))
    mask, blank = torch.ones(6, 3).bool(), torch.zeros(6, 3)
    rollout = Rollout(mask.long(), mask, mask.long(), mask, torch.arange(6), 3, mask.long(), blank, blank, blank)
    rewards = RewardBatch(torch.ones(6, 1), torch.ones(6, 1).bool(), torch.ones(1))
    total = module._with_penalties(JudgedRollout(rollout, {}, rewards), 0)[0].total
    torch.testing.assert_close(total, 1.0 - 0.5 * (value(d[:, 0]) + value(d[:, 1])))


@pytest.mark.parametrize(
    ("changes", "cause"), [({"num_refills": -1}, "num_refills: -1"), ({"kl_in_reward": 0.1}, "kl_in_reward: SPGEst")]
)
def test_impossible_values_are_refused(changes: dict[str, Any], cause: str) -> None:
    estimator = spg.SPGEstimator(spg.hide_all, 2, 0.0, eubo_beta=1.5, mix_weight=0.5)
    loss = ReinforceLoss(token_mean)
    if "num_refills" in changes:
        estimator, loss = OneStepEstimator(0.1, 1, False), ClippedPolicyLoss(0.2, 0.2, 0.0, k3, token_mean)
    with pytest.raises(ValueError, match=rf"^module\.{cause}.*Try: "):
        DiffuGRPO.check(estimator, loss, sampler(), group_size=2, num_inner_updates=1, **changes)


@pytest.mark.parametrize("loss", [PREFERENCE, WithSupervised(PREFERENCE, 0.1)])
def test_preferences_are_between_two(loss: PolicyLoss) -> None:
    estimator = OneStepEstimator(0.1, 1, False)
    DiffuGRPO.check(estimator, loss, sampler(), group_size=2, num_inner_updates=1)
    with pytest.raises(ValueError, match=r"^module\.group_size: 4, but \w+ takes 2\. Try: 2"):
        DiffuGRPO.check(estimator, loss, sampler(), group_size=4, num_inner_updates=1)


def test_traces_do_not_mix() -> None:
    judged = numbered(0, 6, rewards_of([True, False]))
    traced = replace(judged, rollout=replace(judged.rollout, trace=torch.zeros(1, 6, 4, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"^module\.num_refills: traces .*Try: "):
        refilled(traced, traced, G, 0, 1)
