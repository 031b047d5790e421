"""Fixed views: what an estimator draws for the first inner update, at all of them."""

from dataclasses import replace

import pytest
import torch

from d1lit.estimators.elbo import ELBOEstimator
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.same_views import SameViews
from d1lit.estimators.spg import SPGEstimator, hide_random
from tests.test_estimators import make_context, make_rollout, score

ONE_STEP = OneStepEstimator(prompt_mask_prob=0.5, num_masks=2, share_within_group=False)
WRAPPED = {"one_step": ONE_STEP, "elbo": ELBOEstimator(2, True)}


@pytest.mark.parametrize("inner", WRAPPED.values(), ids=WRAPPED.keys())
def test_every_inner_update_sees_the_views_of_the_first(inner):
    rollout = make_rollout()
    first = inner.corrupt(make_context(rollout, inner=0, total=3))
    for number in range(3):
        context = make_context(rollout, inner=number, total=3)
        fixed = SameViews(inner).corrupt(context)
        assert torch.equal(fixed.noised_ids, first.noised_ids)
        assert torch.equal(fixed.weight, first.weight)
        said = SameViews(inner).combine(score(fixed), fixed, context)
        own = inner.combine(score(first), first, make_context(rollout, inner=0, total=3))
        assert torch.equal(said.value, own.value)
        assert torch.equal(said.weight, own.weight)
        if number:
            assert not torch.equal(inner.corrupt(context).noised_ids, first.noised_ids)


def test_another_rollout_has_other_views():
    rollout = make_rollout()
    context = make_context(rollout)
    later = replace(context, draws=context.draws.at(step=4))
    fixed = SameViews(ONE_STEP)
    assert not torch.equal(fixed.corrupt(context).noised_ids, fixed.corrupt(later).noised_ids)


def test_it_is_of_the_wrapped_kind():
    spg = SPGEstimator(hide_random, 2, 0.15, eubo_beta=1.5, mix_weight=0.5)
    assert SameViews(spg).traits == spg.traits
    assert SameViews(spg).traits.parts == {"elbo", "eubo"}
    assert SameViews(ONE_STEP).traits.unit == "token"
    assert SameViews(ONE_STEP).traits.is_mean_field
