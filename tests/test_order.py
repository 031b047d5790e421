"""Likelihoods of orders, longhand and by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from d1lit.draws import CounterDraws
from d1lit.estimators.learned_order import LearnedOrderEstimator
from d1lit.estimators.order import OrderedTraceEstimator, plackett_luce
from d1lit.losses import check_trajectory
from d1lit.sampling import (
    BlockSampler,
    EvenSchedule,
    FixedQuota,
    InverseCDF,
    PlackettLuce,
    SampledLogProb,
    Threshold,
    TokenProbability,
)
from d1lit.sampling.order_head import OrderScore
from d1lit.types import Context, OrderLaw, Rollout


def order_logprob(scores: list[float], order: tuple[int, ...], places: list[int] | range) -> float:
    """One by one from a softmax over what is left."""
    left, total = list(places), 0.0
    for place in order:
        total += scores[place] - math.log(sum(math.exp(scores[j]) for j in left))
        left.remove(place)
    return total


def test_plackett_luce_longhand_and_its_orders_sum_to_one():
    scores = [0.3, -1.2, 2.0, 0.5]
    total = 0.0
    for order in itertools.permutations(range(4), 2):
        keys = torch.zeros(4)
        keys[list(order)] = torch.tensor([2.0, 1.0])
        chosen = torch.zeros(1, 1, 4, dtype=torch.bool)
        chosen[..., list(order)] = True
        got = plackett_luce(torch.tensor(scores)[None, None], keys[None], chosen, torch.ones_like(chosen))
        assert abs(float(got) - order_logprob(scores, order, range(4))) < 1e-6
        total += math.exp(float(got))
    assert abs(total - 1) < 1e-6


def test_gradient_is_finite_where_nothing_is_chosen():
    scores = torch.randn(2, 3, 4, requires_grad=True)
    chosen = torch.zeros(2, 3, 4, dtype=torch.bool)
    chosen[0, 0, 1] = True
    open_ = torch.ones_like(chosen)
    open_[1] = False
    plackett_luce(scores, torch.rand(2, 4), chosen, open_).sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].abs().sum() == 0


def test_estimator_longhand():
    """Two blocks of two, recorded out of order; the last token lies behind the end of the sequence."""
    confidence = torch.tensor([[0.1, 0.9, 0.4, 0.2]])
    rollout = Rollout(
        prompt_ids=torch.tensor([[1, 2]]),
        prompt_mask=torch.ones(1, 2, dtype=torch.bool),
        completion_ids=torch.tensor([[1, 2, 3, 0]]),
        completion_mask=torch.tensor([[True, True, True, False]]),
        row_ids=torch.tensor([0]),
        group_size=1,
        commit_step=torch.tensor([[0, 0, 2, 1]]),
        sampled_logprobs=torch.zeros(1, 4),
        confidence=confidence,
        entropy=torch.zeros(1, 4),
    )
    context = Context(rollout, torch.ones(1), 0, 1, 9, CounterDraws(0))
    estimator = OrderedTraceEstimator(block_length=2, order_temperature=0.5, temperature=1.0)
    views = estimator.corrupt(context)
    assert views.noised_ids.tolist() == [[1, 2, 9, 9, 9, 9], [1, 2, 1, 2, 9, 9], [1, 2, 1, 2, 9, 0]]
    assert (views.weight[0] > 0).tolist() == [
        [True, True, False, False],
        [False, False, True, True],
        [False, False, True, False],
    ]
    said = torch.tensor([[[-0.3, -1.0, 0.0, 0.0], [0.0, 0.0, -2.0, -0.5], [0.0, 0.0, -0.7, 0.0]]])
    got = estimator.combine(said, views, context)
    first = -0.3 - 1.0 + order_logprob([-0.6, -2.0], (1, 0), range(2))
    second = order_logprob([-4.0, -1.0], (1,), range(2))  # the last position was drawn, its token does not count
    torch.testing.assert_close(got.value, torch.tensor([[first, second, -0.7]]))
    assert got.weight.tolist() == [[1.0, 1.0, 1.0]]


def test_steps_after_the_last_valid_token_say_nothing():
    """The end stands in the first block; what the second block does changes no reward."""
    rollout = Rollout(
        prompt_ids=torch.tensor([[1]]),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        completion_ids=torch.tensor([[0, 3, 3, 3]]),
        completion_mask=torch.tensor([[True, False, False, False]]),
        row_ids=torch.tensor([0]),
        group_size=1,
        commit_step=torch.tensor([[1, 0, 2, 3]]),
        sampled_logprobs=torch.zeros(1, 4),
        confidence=torch.zeros(1, 4),
        entropy=torch.zeros(1, 4),
    )
    context = Context(rollout, torch.ones(1), 0, 1, 9, CounterDraws(0))
    views = OrderedTraceEstimator(block_length=2, order_temperature=1.0, temperature=1.0).corrupt(context)
    assert (views.weight[0] > 0).sum(1).tolist() == [2, 1, 0, 0]


def test_an_order_is_scored_only_where_the_sampler_draws_it_so():
    """By rank, by another score, at another temperature, or as many at a time as the predictions say: not so."""
    quota, token, head = (
        FixedQuota(EvenSchedule()),
        PlackettLuce(SampledLogProb(), 0.5),
        PlackettLuce(OrderScore(), 1.0),
    )
    laws = [
        (TokenProbability(), quota, None),
        (PlackettLuce(TokenProbability(), 0.5), quota, OrderLaw("other", 0.5)),
        (token, quota, OrderLaw("token", 0.5)),
        (PlackettLuce(SampledLogProb(), 0.3), quota, OrderLaw("token", 0.3)),
        (head, quota, OrderLaw("head", 1.0)),
        (PlackettLuce(OrderScore(), 0.3), quota, OrderLaw("head", 0.3)),
        (head, Threshold(0.5), None),
    ]
    for estimator in (OrderedTraceEstimator(2, 0.5, 1.0), LearnedOrderEstimator(2, 1.0)):
        accepted = []
        for confidence, commit, law in laws:
            sampler = BlockSampler(4, 4, 2, 1.0, 0.0, InverseCDF(), confidence, commit, True)
            assert sampler.order_law == law
            if law == estimator.traits.order:
                check_trajectory(estimator, sampler)
                accepted.append(law)
                continue
            with pytest.raises(
                ValueError, match=r"^estimator: \w+ scores positions drawn by .*\. Try: sampler=.*\[E207\]$"
            ):
                check_trajectory(estimator, sampler)
        assert accepted == [estimator.traits.order]
