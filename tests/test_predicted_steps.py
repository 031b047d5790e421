"""MDPO: what every denoising step predicts is kept, judged, weighed against the group's, and some of it trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from d1lit.advantages import ShuffledRewards, StepAdvantage, TreeAdvantage, group_mean, on_units
from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import evaluation_sampler
from d1lit.app.workloads import stage_work
from d1lit.costs import RolloutPlan, Work, rollout_flops
from d1lit.data import prompt_batch
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.predicted_steps import GUARD, PredictedStepsEstimator
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.footprint import network_shape
from d1lit.losses import ClippedPolicyLoss, check_steps, check_trajectory, check_tree
from d1lit.losses.clipped import SequenceClippedLoss
from d1lit.losses.terms import k2, k3, num_completion_tokens, sequence_sum, view_mean
from d1lit.models import KVCache, Policy
from d1lit.modules import DiffuGRPO
from d1lit.modules.experience import Experience, as_tree, dealt, restored
from d1lit.sampling import (
    CommitAll,
    DreamSchedule,
    DualCache,
    EvenSchedule,
    FixedQuota,
    LowestConfidence,
    PredictionChange,
    RandomOrder,
    StableThreshold,
    Threshold,
    TokenEditing,
)
from d1lit.types import Context, LogProbs, RewardBatch, Rollout, Tree
from tests.end_to_end import small
from tests.test_sampling import SmallNetwork, prompts, sampler

LOSS = ClippedPolicyLoss(0.2, 0.2, 0.02, k2, sequence_sum)
RCR: dict[str, Any] = {"commit": CommitAll(), "remask": LowestConfidence(EvenSchedule())}
KINDS: dict[str, dict[str, Any]] = {
    "quota": {},
    "whole": {"block_length": 16},
    "rcr": RCR,
    "stopped": {"stop_at_eos": True, "block_length": 4},
    "few": {"stop_at_eos": True, "block_length": 4, "rows_per_forward": 5},
    "random": {"confidence": RandomOrder()},
    "threshold": {"commit": Threshold(0.5)},
    "dream": {"commit": FixedQuota(DreamSchedule(0.1)), "block_length": 16},
    "guided": {"guidance": 0.7},
    "tree": {"tree": Tree(2, 2)},
    "more steps than tokens": {"num_steps": 40},
}


# -------------------------------------------------------------------------------------------------------------- rollouts


def network(seed: int = 0) -> SmallNetwork:
    made = SmallNetwork(seed, vocabulary=11)
    made.output.data *= 0.5  # a flat law: predictions of one token differ from step to step
    return made.eval()


QUICK = ("quota", "rcr", "few", "guided")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_every_step_keeps_its_whole_prediction_and_the_rollout_is_the_same(kind: str) -> None:
    policy, batch, temperature = network(), prompts(3, padded=True, vocabulary=11), 0.8
    plain = sampler(temperature=temperature, **KINDS[kind])
    made = plain.with_predictions()(policy, batch, 4, CounterDraws(0))
    without = plain(policy, batch, 4, CounterDraws(0))
    for name in ("completion_ids", "commit_step", "completion_mask"):
        assert torch.equal(getattr(made, name), getattr(without, name)), name
    torch.testing.assert_close(made.sampled_logprobs, without.sampled_logprobs)
    assert made.num_forwards == without.num_forwards
    assert without.predictions is None and made.trace is not None
    steps, mask, judged = made.steps, policy.mask_token_id, 0
    for k, n in torch.cartesian_prod(torch.arange(len(made.trace)), torch.arange(12)).tolist():
        canvas = torch.full((16,), mask) if k == 0 else made.trace[k - 1, n]
        took = bool(steps.taken[k, n])
        fixed = made.commit_step[n] == k
        if not took:
            assert not bool(fixed.any())
            continue
        assert torch.equal(steps.masked[k, n], canvas == mask)
        assert bool((steps.clean[k, n] != mask).all())
        assert torch.equal(steps.clean[k, n][canvas != mask], canvas[canvas != mask])
        assert torch.equal(steps.predictions[k, n, fixed], made.completion_ids[n, fixed])
        torch.testing.assert_close(steps.logprobs[k, n, fixed], made.sampled_logprobs[n, fixed])
        if kind != "guided" and (k + n) % 3 == 0:
            ids = torch.cat([made.prompt_ids[n], canvas])[None]
            seen = torch.cat([made.prompt_mask[n], torch.ones(16, dtype=torch.bool)])[None]
            logits = policy.head(policy.hidden(ids, seen))[0, -16:] / temperature
            logits = logits.detach().masked_fill(torch.arange(11) == mask, -torch.inf)
            for c in (canvas == mask).nonzero()[:, 0].tolist():
                expected = float(logits[c].log_softmax(0)[steps.predictions[k, n, c]])
                assert float(steps.logprobs[k, n, c]) == pytest.approx(expected, abs=1e-5)
                judged += 1
    assert judged > 30 or kind == "guided"
    part = made.rows(4, 8).steps
    for name in ("standing", "predictions", "logprobs"):
        assert torch.equal(getattr(part, name), getattr(steps, name)[:, 4:8])


def test_a_row_that_ended_takes_no_further_steps() -> None:
    policy = network(2)
    made = sampler(temperature=1.0, stop_at_eos=True, block_length=4).with_predictions()(
        policy, prompts(6, vocabulary=11), 4, CounterDraws(1)
    )
    taken, last = made.steps.taken, made.commit_step.amax(1)
    assert torch.equal(taken.sum(0), last + 1), "one step after another, up to the one that fixed the last token"
    assert 0 < int(last.min()) < int(last.max())
    # The text of the last step, up to its end, is the completion's.
    for n, k in enumerate(last.tolist()):
        length = int(made.completion_mask[n].sum())
        assert torch.equal(made.steps.clean[k, n, :length], made.completion_ids[n, :length])
    with pytest.raises(ValueError, match=r"^rollout: the predictions .* not recorded. Try: .*with_predictions"):
        _ = replace(made, predictions=None).steps


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"cache": DualCache(KVCache)}, "cache: DualCache"),
        ({"edit": TokenEditing(0.5, 2), "commit": Threshold(0.5)}, "edit: TokenEditing"),
        (
            {"memory": PredictionChange(2, looks_ahead=False), "commit": StableThreshold(0.5, 0.1, False)},
            "memory: PredictionChange",
        ),
    ],
)
def test_a_sampler_that_sees_the_block_alone_cannot_keep_predictions(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^sampler\.{key} looks at the active block alone.* Try: sampler=low_conf"):
        sampler(**changes).with_predictions()


# ------------------------------------------------------------------------------------------------------------ advantages


def longhand_advantages(value: list[list[float | None]], size: int, eps: float = 1e-4) -> list[list[float]]:
    """By loops over rollouts and steps; None where a step does not count."""
    raw: list[list[float | None]] = []
    for row in value:
        found: list[float | None] = []
        for k, reward in enumerate(row):
            if reward is None:
                found.append(None)
                continue
            earlier = [r for r in row[:k] if r is not None]
            later = [r for r in row[k + 1 :] if r is not None]
            future = sum(later) / len(later) if later else reward
            found.append(reward - (earlier[-1] if earlier else 0.0) + 1 + future)
        raw.append(found)
    result = [[0.0] * len(row) for row in raw]
    for n, row in enumerate(raw):
        family = raw[n // size * size : (n // size + 1) * size]
        for k, mine in enumerate(row):
            others = [other[k] for other in family if other[k] is not None]
            if mine is None:
                continue
            mean = sum(others) / len(others)
            spread = sum((x - mean) ** 2 for x in others) / max(1, len(others) - 1)
            result[n][k] = (mine - mean) / (spread**0.5 + eps)
    return result


def test_the_advantage_of_a_step_by_loops() -> None:
    g = torch.Generator().manual_seed(0)
    value = torch.rand(12, 6, 2, generator=g)
    valid = torch.rand(12, 6, generator=g) < 0.8
    valid[0], valid[1, 3:] = False, False  # never judged; ended after three steps
    weights = torch.tensor([1.0, 0.5])
    rewards = RewardBatch(value, valid[..., None].expand_as(value), weights)
    got = StepAdvantage()(rewards, 4)
    table = [[float(value[n, k] @ weights) if valid[n, k] else None for k in range(6)] for n in range(12)]
    torch.testing.assert_close(got, torch.tensor(longhand_advantages(table, 4)), atol=1e-5, rtol=1e-5)
    assert bool((got[~valid] == 0).all())
    padded = RewardBatch(*(torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (rewards.value, rewards.valid)), weights)
    assert torch.equal(StepAdvantage()(padded, 4)[:, :6], got), "steps that nobody took change nothing"
    shuffled = ShuffledRewards(StepAdvantage(), seed=1)
    assert shuffled.of_steps and not ShuffledRewards(group_mean, 1).of_steps
    assert shuffled(rewards, 4).shape == got.shape


# ------------------------------------------------------------------------------------------------------------- estimator


def recorded(seed: int = 0, **changes: Any) -> tuple[Rollout, SmallNetwork]:
    policy = network(seed)
    made = sampler(temperature=0.8, stop_at_eos=True, block_length=4, **changes).with_predictions()(
        policy, prompts(3, padded=True, vocabulary=11), 4, CounterDraws(seed)
    )
    return made, policy


def context_of(rollout: Rollout, policy: Any, advantages: Tensor) -> Context:
    return Context(rollout, advantages, 0, 1, policy.mask_token_id, CounterDraws(0))


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_the_steps_of_largest_advantage_are_the_views(num_steps: int) -> None:
    rollout, policy = recorded()
    total = len(rollout.steps.taken)
    g = torch.Generator().manual_seed(1)
    advantages = torch.randint(
        -2, 3, (12, total + 2), generator=g
    ).float()  # of a world with longer rollouts; many ties
    context = context_of(rollout, policy, advantages)
    estimator = PredictedStepsEstimator(num_steps, 0.8)
    corruption = estimator.corrupt(context)
    got = estimator.combine(torch.zeros_like(corruption.weight), corruption, context)
    assert got.value.shape == (12, num_steps * 16)
    spread = on_units(advantages, got)
    views = 0
    for n in range(12):
        taken = int(rollout.steps.taken[:, n].sum())
        order = sorted(range(taken), key=lambda k: (-abs(float(advantages[n, k])), k))[:num_steps]
        views += len(order)
        for place in range(num_steps):
            units = slice(place * 16, (place + 1) * 16)
            if place >= len(order):
                assert int(corruption.view_of[n, place]) == -1
                assert bool((got.weight[n, units] == 0).all())
                continue
            k = order[place]
            canvas = torch.cat(
                [rollout.prompt_ids[n], torch.where(rollout.steps.masked[k, n], 10, rollout.steps.standing[k, n])]
            )
            assert torch.equal(corruption.noised_ids[corruption.view_of[n, place]], canvas)
            hidden = (canvas[-16:] == policy.mask_token_id).nonzero()[:, 0].tolist()
            for c in range(16):
                unit = place * 16 + c
                probability = float(rollout.steps.logprobs[k, n, c].exp()) if c in hidden else 0.0
                assert float(got.weight[n, unit]) == pytest.approx(probability / (len(hidden) + GUARD), rel=1e-5)
                expected = float(advantages[n, k]) * 16 / (len(hidden) + GUARD)
                assert float(spread[n, unit]) == pytest.approx(expected, rel=1e-5)
                if c in hidden:
                    assert int(corruption.target_ids[n, place, c]) == int(rollout.steps.predictions[k, n, c])
    assert len(corruption.noised_ids) == views, "what is not chosen costs no pass"


def test_one_advantage_a_rollout_takes_the_first_steps_and_stays_as_it_is() -> None:
    rollout, policy = recorded()
    context, estimator = context_of(rollout, policy, torch.ones(12)), PredictedStepsEstimator(2, 0.8)
    corruption = estimator.corrupt(context)
    got = estimator.combine(torch.zeros_like(corruption.weight), corruption, context)
    assert got.parts["step"].view(12, 2, 16)[:, :, 0].tolist() == [[0, 1]] * 12
    assert on_units(context.advantages, got) is context.advantages
    assert on_units(torch.ones(12, 5), LogProbs(got.value, got.weight)).shape == (12, 5)
    with pytest.raises(ValueError, match=r"^estimator.num_steps: must be >= 1, got 0. Try: 8"):
        PredictedStepsEstimator(0, 1.0)


# ------------------------------------------------------------------------------------------------------ a whole update


class CountingPolicy(Policy):
    """Counts the views that go through the network."""

    views = 0

    def hidden(self, ids: Any, *args: Any, **named: Any) -> Any:
        self.views += len(ids)
        return super().hidden(ids, *args, **named)


def mdpo(policy: Policy | None = None, **changes: Any) -> DiffuGRPO:
    parts: dict[str, Any] = {
        "estimator": PredictedStepsEstimator(2, 1.0, exclude_mask=True),
        "advantage": StepAdvantage(),
        "loss": replace(LOSS, beta=0.0),
    }
    return small.make_module(small.small_policy() if policy is None else policy, **(parts | changes))


def step_logprobs(policy: Policy, rollout: Rollout, n: int, canvas: Tensor) -> Tensor:
    """Log-probs of all tokens at all places of one canvas, by a pass of its own."""
    ids = torch.cat([rollout.prompt_ids[n], canvas])[None]
    seen = torch.cat([rollout.prompt_mask[n], torch.ones(len(canvas), dtype=torch.bool)])[None]
    logits = policy.head(policy.hidden(ids, seen))[0, -len(canvas) :]
    return logits.masked_fill(torch.arange(small.VOCABULARY) == small.MASK, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("kind", ["quota", "rcr"])
def test_a_whole_update_is_that_of_loops(kind: str) -> None:
    """Two inner updates with a KL: canvases, texts, rewards, advantages, choice, loss and gradients, one at a time."""
    small.quiet()
    policy = CountingPolicy(small.small_policy(torch.float64).network)
    policy.keep_reference()
    module = mdpo(policy, sampler=small.sampler(**(RCR if kind == "rcr" else {})), loss=LOSS)
    module.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    rows = small.prompt_rows(4)
    (experience,) = module.collect(prompt_batch(rows, range(4), small.EOS), 0, 1)
    rollout, length = experience.rollout, small.COMPLETION
    assert rollout.trace is not None and rollout.predictions is not None
    group, judge = module.group_size, small.EvenTokens()

    # What each step saw and proposed.
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for n in range(12):
        first = rollout.completion_ids[n, :4]
        num_steps = 2 if bool((first == small.EOS).any()) else 4  # of two blocks of two steps
        mine = []
        for k in range(num_steps):
            canvas = torch.full((length,), small.MASK) if k == 0 else rollout.trace[k - 1, n]
            filled = torch.where(canvas == small.MASK, rollout.predictions[k, n], canvas)
            with torch.no_grad():
                there = step_logprobs(policy, rollout, n, canvas)
            mine.append((canvas, filled, there.gather(1, filled[:, None])[:, 0]))
        seen.append(mine)
    table: list[list[float | None]] = [
        [judge([small.decode(filled)], [{}])[0].value for _, filled, _ in mine] for mine in seen
    ]
    for n, row in enumerate(table):
        assert row[-1] == pytest.approx(float(experience.rewards[n]))
    table = [row + [None] * (4 - len(row)) for row in table]
    advantages = longhand_advantages(table, group)
    torch.testing.assert_close(experience.advantages, torch.tensor(advantages)[:, : experience.advantages.shape[1]])
    assert len({tuple(row) for row in table}) > 6

    total = 0
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    for inner in range(2):
        policy.views = 0
        value = module.update(experience, inner, 1)
        made = policy.views
        value.backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        optimizer.zero_grad()
        expected, total = torch.zeros((), dtype=torch.float64), 0
        for n in range(12):
            order = sorted(range(len(seen[n])), key=lambda k: (-abs(round(advantages[n][k], 5)), k))[:2]
            for k in order:
                canvas, filled, old = seen[n][k]
                here = (canvas == small.MASK).nonzero()[:, 0].tolist()
                logprobs = step_logprobs(policy, rollout, n, canvas)
                with torch.no_grad(), policy.reference():
                    reference = step_logprobs(policy, rollout, n, canvas)
                share, total = 1 / (len(here) + 1e-4), total + 1
                for c in here:
                    token = int(filled[c])
                    ratio = torch.exp(logprobs[c, token] - old[c])
                    gain = advantages[n][k] * length * share
                    surrogate = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
                    kl = 0.5 * (logprobs[c, token] - reference[c, token]) ** 2
                    expected = expected + old[c].exp() * share * (surrogate + 0.02 * kl) / 12
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        expected.backward()
        for got, p in zip(gradients, [p for p in policy.parameters() if p.grad is not None], strict=True):
            assert p.grad is not None
            torch.testing.assert_close(got, p.grad, atol=2e-5, rtol=1e-4)
        assert made == total <= 24 < sum(map(len, seen)), "a pass for each chosen step, and no other"
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"sampler": small.sampler(**RCR)}, {}, {"loss": ClippedPolicyLoss(0.2, 0.2, 0.0, k2, view_mean)}],
    ids=["rcr", "quota", "view_mean"],
)
def test_it_trains_and_micro_batches_change_nothing(changes: dict[str, Any]) -> None:
    start = {name: value.clone() for name, value in small.small_policy().state_dict().items()}
    whole = small.fit(mdpo(**changes))
    assert small.largest_shift(start, whole) > 1e-3
    assert small.largest_shift(whole, small.fit(mdpo(**changes), num_micro=2)) < 1e-5


@pytest.mark.slow
def test_chunks_change_nothing_and_the_rewards_of_steps_do() -> None:
    whole = small.fit(mdpo())
    assert small.largest_shift(whole, small.fit(mdpo(views_per_chunk=1))) < 1e-5
    assert small.largest_shift(whole, small.fit(mdpo(advantage=ShuffledRewards(StepAdvantage(), 0)))) > 1e-4


def test_predictions_survive_a_checkpoint_and_another_world() -> None:
    """Processes whose longest rollouts differ are joined: the shorter records take no further step."""
    rollout, _ = recorded()
    assert rollout.trace is not None and rollout.predictions is not None and rollout.prediction_logprobs is not None
    short = rollout.rows(0, 4)
    kept = int(short.steps.taken.any(1).sum())
    short = replace(
        short,
        trace=short.trace[:kept] if short.trace is not None else None,
        predictions=rollout.predictions[:kept, :4],
        prediction_logprobs=rollout.prediction_logprobs[:kept, :4],
    )
    total = len(rollout.trace)
    parts = [
        Experience(
            part,
            torch.ones(len(part.row_ids), total),
            torch.zeros(len(part.row_ids)),
            (None,),
            (None,),
            (1.0,),
            12.0,
            0,
        )
        for part in (short, rollout.rows(4, 8), rollout.rows(8, 12))
    ]
    back = [restored(as_tree(part), torch.device("cpu")) for part in parts]
    ((whole,),) = dealt([[part] for part in back], 1, 1)
    steps = whole.rollout.steps
    assert torch.equal(steps.predictions, rollout.predictions)
    assert torch.equal(steps.logprobs, rollout.prediction_logprobs)
    assert torch.equal(torch.where(steps.masked, 0, steps.clean), torch.where(steps.masked, 0, rollout.steps.clean))


# -------------------------------------------------------------------------------------------------------------- refusals

ESTIMATOR, ONE_STEP = PredictedStepsEstimator(2, 1.0), OneStepEstimator(0.0, 1, True)
SEQUENCE = SequenceClippedLoss(0.2, 0.2, 0.0, k3, num_completion_tokens)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"estimator": ONE_STEP}, "advantage: StepAdvantage .*, and OneStepEstimator does not say.* Try: estimator=mdpo"),
        ({"estimator": TraceEstimator(1, 1.0)}, "advantage: StepAdvantage .*, and TraceEstimator does not say"),
        ({"advantage": ShuffledRewards(StepAdvantage(), 0), "estimator": ONE_STEP}, "advantage: ShuffledRewards gives"),
        ({"loss": SEQUENCE}, "advantage: .*, and SequenceClippedLoss takes one a rollout. Try: loss=mdpo"),
        ({"sampler": lambda *_: None}, "sampler: function keeps no predictions of its steps"),
        ({"sampler": small.sampler(cache=DualCache(KVCache))}, "sampler.cache: DualCache looks at the active block alone"),
        ({"sampler": small.sampler(guidance=1.0)}, "sampler.guidance: 1, and PredictedStepsEstimator replays"),
        ({"num_refills": 1}, "module.num_refills: the predictions .* Try: 0"),
        ({"kl_in_reward": 0.1}, "module.kl_in_reward: StepAdvantage reads .* Try: loss.beta, or 0"),
        ({"length_penalty": lambda _: None}, "module.length_penalty: StepAdvantage reads .* Try: null"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_on_one_line(changes: dict[str, Any], line: str) -> None:
    parts: dict[str, Any] = {
        "estimator": ESTIMATOR,
        "loss": LOSS,
        "sampler": small.sampler(),
        "advantage": StepAdvantage(),
        "group_size": 4,
        "num_inner_updates": 1,
    }
    DiffuGRPO.check(**parts)
    DiffuGRPO.check(**parts | {"advantage": group_mean})
    with pytest.raises(ValueError, match=rf"^{line}") as refused:
        DiffuGRPO.check(**parts | changes)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.slow
def test_the_recipe_asks_for_predictions_in_training_alone_and_a_dry_run_counts_them() -> None:
    (config,) = compose_jobs("train", ["recipe=mdpo", "task=sudoku", "evaluation.rows=4"]).configs
    plan = plan_run(config)
    keywords = plan.stages[-1].module.keywords  # type: ignore[attr-defined]
    assert keywords["estimator"].num_steps == 4
    assert not plan.sampler.record_predictions
    recording = replace(plan, sampler=plan.sampler.with_predictions())
    assert evaluation_sampler(recording, None) == evaluation_sampler(plan, None)
    work = stage_work(plan, plan.stages[-1], 1)
    assert work.views == 8 * 8 * 4, "prompts, group, chosen steps"
    assert work.rollout is not None and work.rollout.looks_ahead
    assert work.rollout.most_predicted == plan.sampler.completion_length
    config.stages.grpo.module.kl_in_reward = 0.1
    with pytest.raises(ConfigError, match=r"module.kl_in_reward: StepAdvantage reads") as refused:
        plan_run(config)
    assert "\n" not in str(refused.value)


def test_a_plan_counts_what_the_sampler_computes() -> None:
    """Operations of a rollout with predictions, as planned and as the policy counted them."""
    policy = small.small_policy()
    made = small.sampler(stop_at_eos=False).with_predictions()
    before = Work().plus(policy.work)
    rows = [row for row in small.prompt_rows() if len(row.prompt_ids) == 4][:2]
    made(policy, prompt_batch(rows, range(len(rows)), small.EOS), 3, CounterDraws(0))
    plan = RolloutPlan(3 * len(rows), 4, 8, 4, 2, None, looks_ahead=True)
    assert policy.work.since(before).flops == rollout_flops(network_shape(policy.network.config), plan)
    assert plan.predicted == [8, 6, 4, 2]


def test_steps_and_edges_do_not_mix() -> None:
    """Either would be read as the other: both are numbers of a rollout's tokens."""
    clipped = ClippedPolicyLoss(0.2, 0.2, 0.0, k2, sequence_sum)
    branching, by_steps = sampler(tree=Tree(2, 2)), PredictedStepsEstimator(2, 1.0)
    with pytest.raises(ValueError, match=r"^advantage: StepAdvantage .*sampler\.tree count by edges.*Try: .*tree=null"):
        check_steps(branching, by_steps, StepAdvantage(1e-4), clipped)
    with pytest.raises(ValueError, match=r"^advantage: TreeAdvantage .*PredictedSteps.* counts by steps.*Try: "):
        check_tree(branching, by_steps, TreeAdvantage(Tree(2, 2)), clipped, 4)


def test_a_sampler_that_says_half_of_what_its_steps_do_is_refused() -> None:
    """What it does not say nobody would look for."""

    class Guided:
        guidance = 0.5

        def __call__(self, *arguments: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"^sampler: Guided has guidance but not reviser, .*Try: all of them, or none"):
        check_trajectory(PredictedStepsEstimator(2, 1.0), Guided())
    check_trajectory(PredictedStepsEstimator(2, 1.0), lambda *_: None)  # type: ignore[arg-type]


def test_a_micro_batch_is_stored_without_the_rest_of_its_rollout() -> None:
    """`copy.deepcopy` of a view copies what it is a view of."""
    whole = torch.zeros(6, 8, 10)
    stored = as_tree({"part": (whole[:, 2:4],)})["part"][0]
    assert stored.untyped_storage().nbytes() == 6 * 2 * 10 * 4
