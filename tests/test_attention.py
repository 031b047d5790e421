"""Who may attend to whom, pair by pair; and rollouts of block diffusion, scored as they were drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.attention import block_streams, order_streams, target_blocks
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.estimators.block_elbo import BlockELBOEstimator
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.packed_trace import PackedTraceEstimator
from d1lit.estimators.paired import CoupledEstimator
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.losses import ClippedPolicyLoss, check_trajectory
from d1lit.losses.filters import TopEntropyLoss
from d1lit.losses.terms import k3, token_mean
from d1lit.models.cache import KVCache
from d1lit.modules import DiffuGRPO
from d1lit.sampling import DualCache, Threshold
from d1lit.scoring import score
from d1lit.types import Context, PromptBatch
from tests.end_to_end.small import fit, make_module, small_policy
from tests.test_sampling import sampler

IDS = torch.tensor([[3, 4, 5, 6], [4, 4, 6, 3], [7, 9, 2, 2]])
PROMPTS = PromptBatch(IDS, torch.tensor([[True] * 4, [False] + [True] * 3, [True] * 4]), torch.arange(3))
TOP = TopEntropyLoss(ClippedPolicyLoss(0.5, 0.5, 0.0, k3, token_mean), 0.2)
BLOCK_OF = torch.tensor([[-1, -1, 0, 0, 1, 1], [-1, 0, 0, 1, 1, -1]])
SEEN = torch.tensor([[False, True, True, True, True, True], [True] * 5 + [False]])
"""The first row as rollouts are laid out, padded on the left; the second as d1's fine-tuning is, on the right."""


def test_blocks_are_counted_from_the_first_target() -> None:
    is_target = torch.tensor([[False, False, True, True, True, True], [False, True, True, True, True, False]])
    assert torch.equal(target_blocks(is_target, 2), BLOCK_OF)


@pytest.mark.parametrize("start", [0, 1])
def test_the_streams_of_blocks_pair_by_pair(start: int) -> None:
    pattern = block_streams(BLOCK_OF, SEEN, start)
    columns = [*((c, False) for c in range(6)), *((c, True) for c in range(start, 6))]
    for n in range(2):
        for q, (i, i_clean) in enumerate(columns):
            for k, (j, j_clean) in enumerate(columns):
                mine, its = int(BLOCK_OF[n, i]), int(BLOCK_OF[n, j])
                if its < 0:
                    allowed = not j_clean
                elif j_clean:
                    allowed = its < mine or (i_clean and its == mine)
                else:
                    allowed = not i_clean and its == mine
                assert bool(pattern[n, q, k]) == ((allowed and bool(SEEN[n, j])) or q == k), (n, i, i_clean, j, j_clean)


@pytest.mark.parametrize("start", [0, 1])
def test_the_streams_of_an_order_pair_by_pair(start: int) -> None:
    step = torch.tensor([[-1, -1, 1, 0, 1, 2], [-1, 3, 0, 2, 1, -1]])
    pattern = order_streams(step, SEEN, start)
    columns = [*((c, False) for c in range(6)), *((c, True) for c in range(start, 6))]
    for n in range(2):
        for q, (i, is_slot) in enumerate(columns):
            for k, (j, key_is_slot) in enumerate(columns):
                mine, its = int(step[n, i]), int(step[n, j])
                together = its == mine and j < i and not is_slot
                allowed = not key_is_slot and (its < 0 or its < mine or together)
                assert bool(pattern[n, q, k]) == ((allowed and bool(SEEN[n, j])) or q == k), (n, i, is_slot, j)


@pytest.mark.parametrize("changes", [{}, {"cache": DualCache(KVCache)}, {"num_steps": 8}])
@torch.no_grad()
def test_block_diffusion_is_scored_as_it_was_drawn(changes: dict[str, Any]) -> None:
    """The replayed trajectory has the log-probs that the sampler recorded; seen whole it would have others."""
    policy = small_policy(num_layers=3)
    settings = {"completion_length": 8, "block_length": 4, "num_steps": 4, "temperature": 0.8, "block_causal": True}
    drawer = sampler(**(settings | changes))
    rollout = drawer(policy, PROMPTS, 2, CounterDraws(3))
    context = Context(rollout, torch.zeros(6), 0, 1, policy.mask_token_id, CounterDraws(0))
    estimator = TraceEstimator(shrink=1, temperature=0.8, exclude_mask=True)
    whole = estimator.corrupt(context)
    valid = rollout.completion_mask & (rollout.commit_step >= 0)
    away = []
    for views in (drawer.attended(whole), whole):
        got = estimator.combine(score(policy, rollout, views).logprobs, views, context)
        away.append(float((got.value - rollout.sampled_logprobs)[valid].abs().max()))
    assert away[0] < 2e-5
    assert away[1] > 1e-2
    assert sampler(**settings | {"block_causal": False}).attended(whole) is whole
    two_streams = BlockELBOEstimator(2, 4, False, two_stream=True).corrupt(context)
    assert drawer.attended(two_streams) is two_streams


@pytest.mark.parametrize("block_causal", [True, False])
def test_policy_optimisation_scores_what_the_sampler_saw(block_causal: bool) -> None:
    away = []

    class Compared(DiffuGRPO):
        @torch.no_grad()
        def collect(self, *args: Any) -> Any:
            experience = super().collect(*args)
            for part in experience:
                rollout = part.rollout
                value = self._likelihood(rollout, part.advantages, part.step, 0)[0].value
                away.append(float((value - rollout.sampled_logprobs)[rollout.completion_mask].abs().max()))
            return experience

    drawer = sampler(completion_length=8, block_length=4, num_steps=4, temperature=1.0, block_causal=block_causal)
    estimator = TraceEstimator(shrink=1, temperature=1.0, exclude_mask=True)
    fit(make_module(small_policy(num_layers=3), Compared, sampler=drawer, estimator=estimator), 2)
    assert len(away) == 4
    assert max(away) < 2e-5


@pytest.mark.parametrize("changes", [{}, {"stop_at_eos": True}, {"commit": Threshold(0.2)}, {"num_steps": 8}])
def test_all_steps_in_one_pass_are_each_step_in_its_own(changes: dict[str, Any]) -> None:
    """Values and gradients of the packed view equal those of a view a step, whatever the rollouts' numbers of steps."""
    policy = small_policy(torch.float64, num_layers=3)
    settings = {"completion_length": 8, "block_length": 4, "num_steps": 4, "temperature": 0.8, "block_causal": True}
    drawer = sampler(**(settings | changes))
    rollout = drawer(policy, PROMPTS, 2, CounterDraws(3))
    context = Context(rollout, torch.zeros(6), 0, 1, policy.mask_token_id, CounterDraws(0))
    found = []
    for estimator in (PackedTraceEstimator(4, 0.8, exclude_mask=True), TraceEstimator(1, 0.8, exclude_mask=True)):
        views = drawer.attended(estimator.corrupt(context))
        got = estimator.combine(score(policy, rollout, views).logprobs, views, context)
        policy.zero_grad()
        (got.value * torch.linspace(-1, 1, 48, dtype=torch.float64).view(6, 8)).sum().backward()
        found.append((len(views.noised_ids), got, [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    (packed, one, gradients), (apart, each, others) = found
    assert packed == 6 < apart
    assert torch.equal(one.weight, each.weight)
    torch.testing.assert_close(one.value, each.value, atol=1e-9, rtol=1e-9)
    for here, there in zip(gradients, others, strict=True):
        torch.testing.assert_close(here, there, atol=1e-9, rtol=1e-7)


def test_entropies_are_weighed_and_not_scaled_by_the_weights_of_views() -> None:
    """All predictions uniform: each token's entropy is log V, whatever its views weigh."""
    policy = small_policy()
    policy.network.head_weight.data.zero_()
    for estimator in (CoupledEstimator(0.2, 0.8), TraceEstimator(1, 1.0), PackedTraceEstimator(4, 1.0)):
        module = make_module(policy, sampler=sampler(block_length=4, num_steps=8), estimator=estimator, loss=TOP)
        rollout = module.sampler(policy, PROMPTS, 3, CounterDraws(1))
        logprobs, entropy = module._likelihood(rollout, torch.zeros(9), 0, 0)
        assert entropy is not None
        scored = logprobs.weight > 0
        assert bool(scored.any())
        expected = torch.full_like(entropy[scored], math.log(len(policy.network.head_weight)))
        torch.testing.assert_close(entropy[scored], expected)


def test_an_evaluation_may_decode_as_no_stage_could_train() -> None:
    (config,) = compose_jobs("train", ["recipe=block_diffusion", "sampler=low_confidence", "task=sudoku"]).configs
    with pytest.raises(ConfigError, match=r"^(view|sampler|estimator)"):
        plan_run(config)
    plan_run(config, trains=False)


def test_views_in_a_pattern_of_their_own_want_such_a_sampler() -> None:
    two_streams = BlockELBOEstimator(2, 8, False, two_stream=True)
    in_blocks = sampler(block_causal=True)
    for estimator in (
        two_streams,
        PackedTraceEstimator(8, 1.0),
        TraceEstimator(1, 1.0),
        OneStepEstimator(0.0, 1, False),
    ):
        check_trajectory(estimator, in_blocks)
    for other in (sampler(), sampler(block_causal=True, block_length=4), sampler(any_order=True)):
        with pytest.raises(
            ValueError, match=r"^estimator: Packed.* in blocks of 8, which here is .*Try: sampler=block_d"
        ):
            check_trajectory(PackedTraceEstimator(8, 1.0), other)
    from_prompt = BlockELBOEstimator(2, 8, count_from_prompt=True, two_stream=True)
    with pytest.raises(ValueError, match=r"^estimator: BlockELBO.* in blocks from the prompt on, .*Try: "):
        check_trajectory(from_prompt, in_blocks)
    shifted = small_policy()
    shifted.network.config.shift = True
    with pytest.raises(ValueError, match=r"^sampler\.block_causal: it needs a network .*Try: "):
        in_blocks(shifted, PROMPTS, 1, CounterDraws(0))
