"""Estimators on a toy network small enough to enumerate: exact values, unbiasedness, and what must not matter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from d1lit.app.composing import CONF
from d1lit.draws import CounterDraws
from d1lit.estimators import spg
from d1lit.estimators.any_order import AnyOrderEstimator
from d1lit.estimators.block_elbo import BlockELBOEstimator
from d1lit.estimators.elbo import (
    ELBOEstimator,
    MaskwiseELBOEstimator,
    QuadratureEstimator,
    ReplicateEstimator,
    gauss_legendre,
)
from d1lit.estimators.left_to_right import LeftToRightEstimator
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.paired import CoupledEstimator, ESPOEstimator, PairScoreEstimator
from d1lit.estimators.sampled_steps import EntropyStepsEstimator, SampledStepsEstimator, SurprisalStepsEstimator
from d1lit.estimators.step_merge import StepMergeEstimator, TraceEstimator
from d1lit.estimators.unigrpo import UniGRPOEstimator
from d1lit.losses import terms
from d1lit.losses.policy_gradient import ReinforceLoss
from d1lit.scoring import score as score_with_network
from d1lit.types import Context, Corruption, LogProbs, LossInputs, Rollout
from tests.end_to_end.small import small_policy
from tests.golden.replay import ReplayDraws

VOCAB, MASK, EOS = 5, 4, 3


def toy_network(ids: Tensor, attention: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """Logits [R, T, V] that depend on every attended token and its distance; the mask token is never predicted."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(6, VOCAB, generator=generator, dtype=torch.float64)
    place = torch.arange(ids.shape[1])[None] if position_ids is None else position_ids
    gap = (place[:, :, None] - place[:, None, :]).double()
    near = torch.exp(-0.4 * gap.abs()) * torch.cos(1.3 * gap)
    if attention is not None:
        near = near * (attention if attention.dim() == 3 else attention[:, None])
    logits = torch.tanh(near @ table[ids]) @ head * 1.5
    return logits.masked_fill(torch.arange(VOCAB) == MASK, -torch.inf)


def score(corruption: Corruption) -> Tensor:
    """[N, K, C] log-probabilities of the targets, 0 where not scored."""
    attention = corruption.attention
    logits = toy_network(corruption.noised_ids, attention, corruption.position_ids)
    logprobs = torch.log_softmax(logits / corruption.temperature, -1)
    c = corruption.target_ids.shape[2]
    picked = logprobs[:, corruption.score_from : corruption.score_from + c][corruption.view_of.clamp(min=0)]
    picked = picked.gather(-1, corruption.target_ids[..., None])[..., 0]
    return torch.where((corruption.weight != 0) & (corruption.view_of >= 0)[..., None], picked, 0.0).float()


def make_rollout(n: int = 12, group_size: int = 4, length: int = 6, seed: int = 0, pad: int = 0) -> Rollout:
    """Random completions, some of which end early; the sampler committed one token a step in random order."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 3, (n // group_size, 4), generator=generator).repeat_interleave(group_size, 0)
    prompts = torch.cat([torch.full((n, pad), EOS), prompts], dim=1)
    prompt_mask = torch.arange(prompts.shape[1]).expand(n, -1) >= pad
    completions = torch.randint(0, 3, (n, length), generator=generator)
    ends = torch.randint(2, length + 2, (n,), generator=generator)
    place = torch.arange(length)
    completions = torch.where(place >= ends[:, None], EOS, completions)
    order = torch.rand(n, length, generator=generator).argsort(1).argsort(1)
    return Rollout(
        prompt_ids=prompts,
        prompt_mask=prompt_mask,
        completion_ids=completions,
        completion_mask=place <= ends[:, None],
        row_ids=torch.arange(n) + 40,
        group_size=group_size,
        commit_step=order,
        sampled_logprobs=-torch.rand(n, length, generator=generator),
        confidence=torch.rand(n, length, generator=generator),
        entropy=torch.rand(n, length, generator=generator),
    )


def make_context(rollout: Rollout, seed: int = 1, inner: int = 0, total: int = 1) -> Context:
    advantages = torch.linspace(-1, 1, len(rollout.row_ids))
    return Context(rollout, advantages, inner, total, MASK, CounterDraws(seed, step=3, inner=inner))


def likelihood(estimator: Any, context: Context) -> LogProbs:
    corruption = estimator.corrupt(context)
    return estimator.combine(score(corruption), corruption, context)


def spg_with(law: Any, prob: float = 0.2) -> spg.SPGEstimator:
    return spg.SPGEstimator(law, 2, prob, eubo_beta=1.5, mix_weight=0.5)


ESTIMATORS: dict[str, Any] = {
    "one_step": OneStepEstimator(0.3, 2, share_within_group=False),
    "one_step_shared": OneStepEstimator(0.3, 2, share_within_group=True),
    "elbo": ELBOEstimator(3, score_padding=False),
    "elbo_canvas": ELBOEstimator(3, score_padding=True),
    "bgpo": MaskwiseELBOEstimator(3, score_padding=False),
    "gdpo": QuadratureEstimator(3, score_padding=False),
    "coupled": CoupledEstimator(0.2, 0.8),
    "espo": ESPOEstimator(2, complement=True, score_padding=True),
    "espo_plain": ESPOEstimator(2, complement=False, score_padding=False),
    "gdsd": PairScoreEstimator(2, score_padding=True),
    "unigrpo": UniGRPOEstimator(),
    "dmpo": ReplicateEstimator(4, 0.1, antithetic=True, score_padding=True),
    "spg": spg_with(partial(spg.hide_in_block, block_length=2)),
    "spg_block": spg_with(partial(spg.hide_block, block_length=2)),
    "spg_random": spg_with(spg.hide_random),
    "spg_all": spg_with(spg.hide_all),
    "left_to_right": LeftToRightEstimator(1.0, temperature=0.9),
    "left_to_right_fast": LeftToRightEstimator(0.5, temperature=0.9),
    "step_merge": StepMergeEstimator(3, temperature=0.9),
    "tracerl": TraceEstimator(2, temperature=0.9),
    "agrpo": SampledStepsEstimator(2, temperature=0.9),
    "egspo": EntropyStepsEstimator(2, temperature=0.9),
    "drift": SurprisalStepsEstimator(2, step_temperature=1.0, min_prob=0.6),
    "ebpo": BlockELBOEstimator(2, block_length=2, count_from_prompt=True, two_stream=False),
    "any_order": AnyOrderEstimator(temperature=0.9),
}
every = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


# ------------------------------------------------------------------------------------------------- what must not matter


@every
def test_shapes_and_finiteness(estimator: Any) -> None:
    context = make_context(make_rollout(pad=2))
    corruption = estimator.corrupt(context)
    got = likelihood(estimator, context)
    assert got.value.shape == got.weight.shape and len(got.value) == 12
    assert bool(torch.isfinite(got.value).all()) and bool((got.weight >= 0).all())
    assert int(corruption.view_of.max()) == len(corruption.noised_ids) - 1
    blank = estimator.combine(torch.zeros_like(corruption.weight), corruption, context)
    assert torch.equal(blank.weight, got.weight)  # the weight is known without the network
    assert torch.equal(corruption.target_ids, context.rollout.completion_ids[:, None].expand_as(corruption.target_ids))


@every
def test_scored_tokens_are_hidden(estimator: Any) -> None:
    corruption = estimator.corrupt(make_context(make_rollout(pad=1)))
    for n, k in itertools.product(*map(range, corruption.view_of.shape)):
        view = corruption.view_of[n, k]
        if view >= 0:
            shown = corruption.noised_ids[view, corruption.score_from :] != MASK
            assert not bool((shown & (corruption.weight[n, k] > 0)).any())


@every
def test_a_micro_batch_is_a_slice_of_the_batch(estimator: Any) -> None:
    rollout = make_rollout()
    whole, context = likelihood(estimator, make_context(rollout)), make_context(rollout)
    for start in range(0, 12, 4):
        part = replace(
            context, rollout=rollout.rows(start, start + 4), advantages=context.advantages[start : start + 4]
        )
        got = likelihood(estimator, part)
        width = min(got.value.shape[1], whole.value.shape[1])
        torch.testing.assert_close(got.value[:, :width], whole.value[start : start + 4, :width])
        torch.testing.assert_close(got.weight[:, :width], whole.weight[start : start + 4, :width])


@every
def test_left_padding_changes_nothing(estimator: Any) -> None:
    plain = likelihood(estimator, make_context(make_rollout()))
    padded = likelihood(estimator, make_context(make_rollout(pad=3)))
    torch.testing.assert_close(padded.value, plain.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["one_step", "elbo", "bgpo", "gdpo", "espo_plain", "spg", "spg_block", "spg_random", "spg_all", "unigrpo"]
)
def test_what_stands_behind_the_end_changes_nothing(name: str) -> None:
    rollout = make_rollout()
    other = torch.where(rollout.completion_mask, rollout.completion_ids, 0)
    plain = likelihood(ESTIMATORS[name], make_context(rollout))
    changed = likelihood(ESTIMATORS[name], make_context(replace(rollout, completion_ids=other)))
    torch.testing.assert_close(changed.value, plain.value)


@every
def test_inner_updates_see_different_masks_and_the_same_one_twice(estimator: Any) -> None:
    rollout = make_rollout()
    first, again = estimator.corrupt(make_context(rollout)), estimator.corrupt(make_context(rollout))
    assert torch.equal(first.noised_ids, again.noised_ids)
    if any(
        word in type(estimator).__name__ for word in ("LeftToRight", "StepMerge", "Trace", "EntropySteps", "AnyOrder")
    ):
        return  # these draw nothing
    if isinstance(estimator, spg.SPGEstimator) and estimator.mask is spg.hide_all:
        return  # only the prompt masks differ, and rarely on so short a prompt
    views = [estimator.corrupt(make_context(rollout, inner=j, total=4)) for j in range(4)]
    assert len({tuple(v.noised_ids.flatten().tolist()) for v in views}) == 4


# ------------------------------------------------------------------------------------------------------------ one step


def test_row_and_group_sharing_agree_without_prompt_masks() -> None:
    context = make_context(make_rollout())
    row, group = (OneStepEstimator(0.0, 1, share_within_group=share) for share in (False, True))
    assert len(row.corrupt(context).noised_ids) == 12 and len(group.corrupt(context).noised_ids) == 3
    torch.testing.assert_close(likelihood(row, context).value, likelihood(group, context).value)


def test_prompt_masks_have_the_stated_rate_and_spare_padding() -> None:
    rollout = make_rollout(n=4000, pad=2)
    corruption = OneStepEstimator(0.15, 1, share_within_group=False).corrupt(make_context(rollout))
    masked = corruption.noised_ids[:, :6] == MASK
    assert not bool(masked[:, :2].any())
    assert abs(float(masked[:, 2:].float().mean()) - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 16_000)
    compat = OneStepEstimator(0.15, 1, share_within_group=False, mask_padding=True).corrupt(make_context(rollout))
    assert bool((compat.noised_ids[:, :2] == MASK).any())


def test_several_masks_are_averaged() -> None:
    context = make_context(make_rollout())
    estimator = OneStepEstimator(0.5, 3, share_within_group=False)
    corruption = estimator.corrupt(context)
    longhand = score(corruption).mean(1) * context.rollout.completion_mask
    torch.testing.assert_close(estimator.combine(score(corruption), corruption, context).value, longhand)


@pytest.mark.parametrize(
    ("estimator", "key"),
    [
        (lambda: OneStepEstimator(1.5, 1, False), "prompt_mask_prob"),
        (lambda: OneStepEstimator(0.1, 0, False), "num_masks"),
        (lambda: CoupledEstimator(0.0, 0.8), "ratio_low"),
        (lambda: spg.SPGEstimator(spg.hide_all, 1, 0.0, 0.5, 0.5), "eubo_beta"),
        (lambda: ReplicateEstimator(3, 0.1, True, True), "num_masks"),
        (lambda: TraceEstimator(0, 1.0), "shrink"),
        (lambda: LeftToRightEstimator(0.0, 1.0), "fraction"),
    ],
)
def test_impossible_values_are_refused_by_name(estimator: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^estimator\.{key}: .* Try: "):
        estimator()


# -------------------------------------------------------------------------------------------------- bounds, enumerated


def exact_bound(rollout: Rollout, row: int) -> float:
    """The average over all sizes l and all subsets of that size of (n / l) sum log p, the tail not attended."""
    valid = rollout.completion_mask[row]
    n, p = int(valid.sum()), rollout.prompt_ids.shape[1]
    ids = torch.cat([rollout.prompt_ids[row], rollout.completion_ids[row]])
    attention = torch.cat([torch.ones(p, dtype=torch.bool), valid])[None]
    total = 0.0
    for size in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), size))
        noised = ids.repeat(len(subsets), 1)
        for i, subset in enumerate(subsets):
            noised[i, [p + j for j in subset]] = MASK
        logprobs = torch.log_softmax(toy_network(noised, attention.expand(len(subsets), -1)), -1)
        for i, subset in enumerate(subsets):
            summed = sum(float(logprobs[i, p + j, ids[p + j]]) for j in subset)
            total += n / size * summed / len(subsets) / n
    return total


def repeated(rollout: Rollout, row: int, times: int, group_size: int) -> Rollout:
    """One rollout many times, under row ids of its own each, so that many draws of its masks are seen at once."""
    fields = {
        name: getattr(rollout, name)[row : row + 1].repeat_interleave(times, 0)
        for name in (
            *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "commit_step"),
            *("sampled_logprobs", "confidence", "entropy"),
        )
    }
    return replace(rollout, **fields, row_ids=torch.arange(times), group_size=group_size)


@pytest.mark.parametrize(
    "estimator",
    [
        ELBOEstimator(1, score_padding=False),
        ELBOEstimator(3, score_padding=False),
        ESPOEstimator(1, complement=True, score_padding=False),
        ESPOEstimator(2, complement=False, score_padding=False),
    ],
)
@pytest.mark.parametrize("row", [0, 5])
def test_bounds_are_unbiased(estimator: Any, row: int) -> None:
    group_size, times = 4, 8000
    many = repeated(make_rollout(), row, times, group_size)
    value = likelihood(estimator, make_context(many, seed=row)).value[:, 0].view(-1, group_size).mean(1).double()
    error = float(value.std()) / math.sqrt(len(value))
    exact = exact_bound(make_rollout(), row)
    print(f"{type(estimator).__name__}: {float(value.mean()):.4f} +- {error:.4f}, exact {exact:.4f}")
    assert abs(float(value.mean()) - exact) < 4 * error


def test_the_bound_over_every_size_at_once_has_no_noise_from_the_size() -> None:
    """With one mask of each size, sizes are met exactly once, so only the places of the masks are random."""
    rollout = repeated(make_rollout(), 0, 50, 1)
    n = int(rollout.completion_mask[0].sum())
    corruption = ELBOEstimator(n, score_padding=False).corrupt(make_context(rollout))
    hidden = (corruption.weight > 0).sum(2).sort(1).values
    assert torch.equal(hidden, torch.arange(1, n + 1).expand(50, -1))


def test_quadrature_is_exact_for_polynomials() -> None:
    nodes, weights = gauss_legendre(3)
    for power in range(6):
        assert float((weights * nodes**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-14)


def test_maskwise_bounds_average_to_the_bound_per_token() -> None:
    context = make_context(make_rollout())
    whole = likelihood(ELBOEstimator(3, score_padding=False), context).value[:, 0]
    each = likelihood(MaskwiseELBOEstimator(3, score_padding=False), context).value
    torch.testing.assert_close(each.mean(1) * context.rollout.completion_mask.sum(1), whole)


def test_spg_takes_the_lower_bound_where_the_advantage_is_positive() -> None:
    context = make_context(make_rollout())
    got = likelihood(spg_with(spg.hide_random), context)
    positive = context.advantages > 0
    assert torch.equal(got.value[positive, 0], got.parts["elbo"][positive])
    mixed = 0.5 * got.parts["elbo"] + 0.5 * got.parts["eubo"]
    torch.testing.assert_close(got.value[~positive, 0], mixed[~positive])
    assert torch.equal(got.weight[:, 0], context.rollout.completion_mask.sum(1).float())


def test_spg_bounds_longhand() -> None:
    context = make_context(make_rollout())
    estimator = spg_with(spg.hide_random, prob=0.0)
    corruption = estimator.corrupt(context)
    lp, hidden = score(corruption), corruption.weight > 0
    got = estimator.combine(lp, corruption, context)
    for n in range(12):
        length = int(context.rollout.completion_mask[n].sum())
        terms, means = [], []
        for i in range(lp.shape[2]):
            inside = [
                math.exp(1.5 * float(lp[n, j, i])) / (int(hidden[n, j].sum()) / length)
                for j in range(2)
                if hidden[n, j, i]
            ]
            if inside:
                terms.append(math.log(sum(inside) / 2) / 1.5)
        for j in range(2):
            means.append(float(lp[n, j][hidden[n, j]].mean()))
        assert float(got.parts["eubo"][n]) == pytest.approx(sum(terms) / len(terms), abs=1e-5)
        assert float(got.parts["elbo"][n]) == pytest.approx(sum(means) / 2, abs=1e-5)


def test_spg_with_everything_hidden_has_equal_bounds_at_beta_one() -> None:
    estimator = spg.SPGEstimator(spg.hide_all, 1, 0.0, eubo_beta=1.0, mix_weight=1.0)
    got = likelihood(estimator, make_context(make_rollout()))
    torch.testing.assert_close(got.parts["elbo"], got.parts["eubo"])


# -------------------------------------------------------------------------------------------------------- trajectories


def all_valid(rollout: Rollout) -> Rollout:
    return replace(rollout, completion_mask=torch.ones_like(rollout.completion_mask))


def test_one_segment_is_the_one_step_estimator() -> None:
    context = make_context(make_rollout())
    one = likelihood(OneStepEstimator(0.0, 1, share_within_group=False), context)
    for estimator in (StepMergeEstimator(1, 1.0), TraceEstimator(100, 1.0)):
        torch.testing.assert_close(likelihood(estimator, context).value, one.value)


def test_a_segment_a_step_replays_the_trajectory() -> None:
    context = make_context(make_rollout())
    whole = likelihood(TraceEstimator(1, 1.0), context)
    torch.testing.assert_close(likelihood(StepMergeEstimator(6, 1.0), context).value, whole.value)
    rollout = context.rollout
    for n in range(12):  # longhand: each token from the canvas in which it was committed
        for i in range(6):
            if rollout.completion_mask[n, i]:
                canvas = torch.where(
                    rollout.commit_step[n] < rollout.commit_step[n, i], rollout.completion_ids[n], MASK
                )
                logits = toy_network(torch.cat([rollout.prompt_ids[n], canvas])[None])
                expected = torch.log_softmax(logits, -1)[0, 4 + i, rollout.completion_ids[n, i]]
                assert float(whole.value[n, i]) == pytest.approx(float(expected), abs=1e-5)


def test_left_to_right_is_the_trajectory_of_a_left_to_right_sampler() -> None:
    rollout = all_valid(make_rollout())
    rollout = replace(rollout, commit_step=torch.arange(6).expand(12, -1))
    context = make_context(rollout)
    trajectory = likelihood(TraceEstimator(1, 0.9), context)
    torch.testing.assert_close(likelihood(LeftToRightEstimator(1.0, 0.9), context).value, trajectory.value)


def test_left_to_right_probabilities_of_all_completions_sum_to_one() -> None:
    words = torch.tensor(list(itertools.product(range(4), repeat=3)))
    n = len(words)
    blank = torch.zeros(n, 3)
    rollout = Rollout(
        torch.tensor([[0, 1]]).expand(n, -1), torch.ones(n, 2, dtype=torch.bool), words,
        torch.ones(n, 3, dtype=torch.bool), torch.arange(n), 1, blank.long(), blank, blank, blank,
    )  # fmt: skip
    total = likelihood(LeftToRightEstimator(1.0, temperature=0.7), make_context(rollout)).value.sum(1).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["step_merge", "tracerl", "left_to_right", "any_order"])
def test_every_valid_token_is_scored_exactly_once(name: str) -> None:
    context = make_context(make_rollout())
    corruption = ESTIMATORS[name].corrupt(context)
    assert torch.equal((corruption.weight > 0).sum(1), context.rollout.completion_mask.long())


def test_no_view_is_computed_for_nothing() -> None:
    context = make_context(make_rollout())
    for name in ("left_to_right", "step_merge", "tracerl", "agrpo", "egspo"):
        corruption = ESTIMATORS[name].corrupt(context)
        used = corruption.view_of[(corruption.weight > 0).any(2)]
        assert sorted(used.tolist()) == list(range(len(corruption.noised_ids)))


def test_entropy_choices() -> None:
    context = make_context(make_rollout())
    rollout = context.rollout
    fast = ESTIMATORS["left_to_right_fast"].corrupt(context).weight.sum(1) > 0
    steps = ESTIMATORS["egspo"].corrupt(context).weight.sum(1) > 0
    for n in range(12):
        valid = rollout.completion_mask[n].nonzero()[:, 0].tolist()
        ranked = sorted(valid, key=lambda i: -float(rollout.entropy[n, i]))
        assert set(fast[n].nonzero()[:, 0].tolist()) == set(ranked[:3])
        assert set(steps[n].nonzero()[:, 0].tolist()) == set(ranked[:2])  # one token a step here


def test_sampled_steps_are_unbiased_for_the_whole_trajectory() -> None:
    single = make_rollout()
    whole = likelihood(TraceEstimator(1, 0.9), make_context(single)).value[2].sum()
    many = repeated(single, 2, 4000, 1)
    got = likelihood(SampledStepsEstimator(2, 0.9), make_context(many))
    value = (got.value * got.weight).sum(1)
    assert abs(float(value.mean() - whole)) < 4 * float(value.std()) / math.sqrt(len(value))


def test_agrpo_is_unbiased_where_the_loss_divides_by_a_constant() -> None:
    """Every single step drawn once, of 1, 2 and 3 tokens: the mean gradient is the trajectory's, but not by a token mean."""
    recipe = OmegaConf.load(CONF / "recipe" / "agrpo.yaml").loss.aggregate._target_
    assert recipe == "d1lit.losses.terms.constant_length"
    rollout = replace(make_rollout().rows(2, 3), group_size=1)
    valid = torch.ones(1, 6, dtype=torch.bool)
    rollout = replace(rollout, completion_mask=valid, commit_step=torch.tensor([[0, 1, 1, 2, 2, 2]]))

    def gradient(estimator: Any, step: int, aggregate: Any) -> Tensor:
        keys = torch.full((1, 3), 0.1).index_fill(1, torch.tensor(step), 0.9)
        context = replace(make_context(rollout), draws=ReplayDraws({"step": keys}))
        corruption = estimator.corrupt(context)
        said = torch.zeros_like(corruption.weight).requires_grad_()
        logprobs = estimator.combine(said, corruption, context)
        inputs = LossInputs(
            logprobs, None, None, torch.ones(1), torch.ones(1), 1, valid, None, float(logprobs.weight.sum()), 1.0
        )
        (pull,) = torch.autograd.grad(ReinforceLoss(aggregate)(inputs)[0], said)
        return pull.sum(1)

    for aggregate, is_unbiased in ((terms.constant_length, True), (terms.token_mean, False)):
        whole = gradient(TraceEstimator(1, 1.0), 0, aggregate)
        mean = torch.stack([gradient(SampledStepsEstimator(1, 1.0), step, aggregate) for step in range(3)]).mean(0)
        assert torch.allclose(mean, whole) == is_unbiased


def test_tokens_never_committed_are_hidden_everywhere_and_not_scored() -> None:
    rollout = make_rollout()
    never = ~rollout.completion_mask
    rollout = replace(rollout, commit_step=torch.where(never, -1, rollout.commit_step))
    assert torch.equal(ESTIMATORS["any_order"].corrupt(make_context(rollout)).weight[:, 0] > 0, ~never)
    for name in ("step_merge", "tracerl", "agrpo", "egspo", "drift"):
        corruption = ESTIMATORS[name].corrupt(make_context(rollout))
        for n, k in itertools.product(*map(range, corruption.view_of.shape)):
            if corruption.view_of[n, k] >= 0:
                canvas = corruption.noised_ids[corruption.view_of[n, k], 4:]
                assert bool((canvas[never[n]] == MASK).all())


# ----------------------------------------------------------------------------------------- as published, where we differ


def test_coupled_pairs_of_one_ratio() -> None:
    def ratios(estimator: Any) -> set[float]:
        corruption = estimator.corrupt(make_context(make_rollout()))
        first = corruption.weight[:, 1]
        return {round(float(0.5 / row.max()), 5) for row in first if row.max() > 0}

    assert len(ratios(CoupledEstimator(0.2, 0.8))) > 6
    assert len(ratios(CoupledEstimator(0.2, 0.8, one_ratio=True))) == 1


def test_left_to_right_may_score_what_stands_behind_the_end() -> None:
    context = make_context(make_rollout())
    valid = likelihood(LeftToRightEstimator(1.0, 0.9), context)
    whole = likelihood(LeftToRightEstimator(1.0, 0.9, score_padding=True), context)
    assert bool((whole.weight == 1).all()) and torch.equal(valid.weight > 0, context.rollout.completion_mask)
    torch.testing.assert_close(valid.value[valid.weight > 0], whole.value[valid.weight > 0])


def test_drift_may_score_a_steps_own_tokens_only() -> None:
    context = make_context(make_rollout())
    estimator = SurprisalStepsEstimator(2, step_temperature=1.0, min_prob=0.0)
    both = likelihood(estimator, context)
    own = likelihood(replace(estimator, score_later=False), context)
    assert torch.equal(own.weight > 0, both.parts["of_step"] > 0)
    assert torch.equal(own.parts["of_step"], own.weight)
    assert int((both.weight > 0).sum()) > int((own.weight > 0).sum())


def test_spg_may_leave_hidden_context_unscored() -> None:
    context = make_context(make_rollout())
    law = partial(spg.hide_in_block, block_length=2)
    estimator = spg.SPGEstimator(law, 2, 0.9, eubo_beta=1.5, mix_weight=0.5)
    with_context, without = estimator.corrupt(context), replace(estimator, score_context=False).corrupt(context)
    assert torch.equal(with_context.noised_ids, without.noised_ids)
    assert torch.equal(without.weight > 0, law(context, 2)[0])
    assert int((with_context.weight > 0).sum()) > int((without.weight > 0).sum())


# --------------------------------------------------------------------------------------------------------------- pairs


def test_coupled_longhand_and_its_shared_view() -> None:
    context = make_context(make_rollout())
    corruption = ESTIMATORS["coupled"].corrupt(context)
    assert len(corruption.noised_ids) == 3 + 2 * 12
    lp = score(corruption)
    got = likelihood(ESTIMATORS["coupled"], context).value
    ratio = 0.2 + 0.6 * context.draws.uniform("mask_ratio", context.rollout.row_ids, ())
    for n, i in itertools.product(range(12), range(6)):
        if context.rollout.completion_mask[n, i]:
            first = corruption.noised_ids[corruption.view_of[n, 1], 4 + i] == MASK
            weight = 1 / float(ratio[n]) if first else 1 / (1 - float(ratio[n]))
            expected = 0.5 * (float(lp[n, 0, i]) + weight * float(lp[n, 1 if first else 2, i]))
            assert float(got[n, i]) == pytest.approx(expected, abs=1e-5)


def test_unigrpo_sweeps_the_noise_levels() -> None:
    rollout = all_valid(make_rollout(n=400))
    counts = torch.stack(
        [(UniGRPOEstimator().corrupt(make_context(rollout, inner=j, total=6)).weight > 0).sum((1, 2)) for j in range(6)]
    )
    assert torch.equal(counts.sort(0).values.unique(dim=1), torch.arange(1, 7)[:, None])


def test_replicates_weigh_each_mask_alike() -> None:
    context = make_context(make_rollout())
    corruption = ESTIMATORS["dmpo"].corrupt(context)
    sums = corruption.weight.sum(2)
    hidden = (corruption.weight > 0).any(2)
    torch.testing.assert_close(sums[hidden], torch.full_like(sums[hidden], 6 / 4))


# ----------------------------------------------------------------------------------------------------------------- EBPO


def test_block_bound_longhand() -> None:
    """Levels evenly spaced over (view, block) cells, floor(t n) + 1 hidden tokens a block, each weighing n / l / K."""
    rollout = make_rollout(pad=1)
    context = make_context(rollout)
    views, size = 3, 2
    corruption = BlockELBOEstimator(views, size, count_from_prompt=False, two_stream=False).corrupt(context)
    start = context.draws.uniform("block_time", rollout.row_ids, ())
    for n, length in enumerate(rollout.completion_mask.sum(1).tolist()):
        blocks = -(-length // size)
        for k, b in itertools.product(range(views), range(blocks)):
            here = slice(b * size, min((b + 1) * size, length))
            tokens = here.stop - here.start
            level = (float(start[n]) + (k * blocks + b) / (views * blocks)) % 1
            count = min(int(level * tokens) + 1, tokens)
            weight = corruption.weight[n, k, here]
            assert int((weight > 0).sum()) == count
            assert weight[weight > 0].tolist() == pytest.approx([tokens / count / views] * count)
        assert float(corruption.weight[n, :, length:].sum()) == 0


@torch.no_grad()
def test_two_streams_are_a_block_diffusion() -> None:
    """A block's log-probabilities are those given the prompt, the clean blocks before it and its own noised block."""
    policy = small_policy()
    g = torch.Generator().manual_seed(0)
    prompt, completion, size = torch.randint(0, 20, (1, 3), generator=g), torch.randint(0, 20, (1, 6), generator=g), 2
    rollout = replace(make_rollout(), **one_row(prompt, completion))
    context = Context(rollout, torch.zeros(1), 0, 1, policy.mask_token_id, CounterDraws(0))
    estimator = BlockELBOEstimator(2, size, count_from_prompt=False, two_stream=True)
    corruption = estimator.corrupt(context)
    scores = score_with_network(policy, rollout, corruption).logprobs
    noised = corruption.noised_ids[:, 3:9]
    for k in range(2):
        for b in range(3):
            ids = torch.cat([prompt, completion[:, : b * size], noised[k : k + 1, b * size : (b + 1) * size]], 1)
            place = torch.arange(ids.shape[1])
            block = torch.where(place < 3, -1, (place - 3) // size)  # the prompt is a block of its own
            attention = (block[None, :] <= block[:, None])[None]
            logprobs = torch.log_softmax(policy.head(policy.hidden(ids, attention)), -1)
            for p in range(b * size, (b + 1) * size):
                if corruption.weight[0, k, p] > 0:
                    expected = logprobs[0, 3 + p, completion[0, p]]
                    torch.testing.assert_close(scores[0, k, p], expected)


def one_row(prompt: torch.Tensor, completion: torch.Tensor) -> dict[str, Any]:
    blank = torch.zeros(completion.shape)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt, dtype=torch.bool),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion, dtype=torch.bool),
        "row_ids": torch.arange(1),
        "group_size": 1,
        "commit_step": torch.zeros_like(completion),
        "sampled_logprobs": blank,
        "confidence": blank,
        "entropy": blank,
    }
