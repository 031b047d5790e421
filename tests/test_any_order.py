"""d2-AnyOrder: one pass against a loop over steps, against the sampler that attends so, and what nobody may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.estimators.any_order import AnyOrderEstimator
from d1lit.estimators.block_elbo import BlockELBOEstimator
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.exact import completion_law
from d1lit.losses import check_place, check_trajectory
from d1lit.models import Policy
from d1lit.models.cache import KVCache
from d1lit.sampling import CommitAll, DualCache, EvenSchedule, LowestConfidence, Threshold
from d1lit.scoring import score
from d1lit.types import Context, LogProbs, PromptBatch, Rollout
from tests.end_to_end.small import small_policy
from tests.test_sampling import sampler

IDS = torch.tensor([[3, 4, 5, 6], [4, 4, 6, 3], [7, 9, 2, 2]])
PROMPTS = PromptBatch(IDS, torch.tensor([[True] * 4, [False] + [True] * 3, [True] * 4]), torch.arange(3))
EXACT = AnyOrderEstimator(temperature=0.8, exclude_mask=True)


def made(policy: Policy, prompts: PromptBatch = PROMPTS, **changes: Any) -> Rollout:
    """Rollouts of a real network that attends in the order of commitment, two tokens a step."""
    settings = {"completion_length": 8, "block_length": 4, "num_steps": 4, "temperature": 0.8, "any_order": True}
    return sampler(**(settings | changes))(policy, prompts, 2, CounterDraws(3))


def likelihood(policy: Policy, rollout: Rollout, estimator: AnyOrderEstimator = EXACT) -> LogProbs:
    context = Context(rollout, torch.zeros(len(rollout.row_ids)), 0, 1, policy.mask_token_id, CounterDraws(0))
    corruption = estimator.corrupt(context)
    assert corruption.noised_ids.shape == (len(rollout.row_ids), 4 + 2 * 8)
    return estimator.combine(score(policy, rollout, corruption).logprobs, corruption, context)


def longhand(policy: Policy, rollout: Rollout, n: int, token: int) -> Tensor:
    """log p of one token from a sequence that holds nothing but what it may see, in the order of commitment."""
    real = rollout.prompt_mask[n].nonzero()[:, 0]
    steps = rollout.commit_step[n].tolist()
    before = sorted((s, c) for c, s in enumerate(steps) if 0 <= s < steps[token])
    places = torch.tensor([c for _, c in before], dtype=torch.int64)
    ids = torch.cat(
        [rollout.prompt_ids[n, real], rollout.completion_ids[n, places], torch.tensor([policy.mask_token_id])]
    )
    positions = torch.cat([real, 4 + places, torch.tensor([4 + token])])
    attention = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    attention[: len(real), : len(real)] = True
    logits = policy.head(policy.hidden(ids[None], attention[None], positions[None]))[0, -1] / 0.8
    logits[policy.mask_token_id] = -torch.inf
    return logits.log_softmax(-1)[rollout.completion_ids[n, token]]


@torch.no_grad()
def test_one_pass_is_the_loop_over_tokens() -> None:
    policy = small_policy(num_layers=3)
    rollout = made(policy, stop_at_eos=True)
    got = likelihood(policy, rollout)
    assert torch.equal(got.weight > 0, rollout.completion_mask & (rollout.commit_step >= 0))
    for n, c in (got.weight > 0).nonzero().tolist():
        torch.testing.assert_close(got.value[n, c], longhand(policy, rollout, n, c), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"num_steps": 8}, {"commit": Threshold(0.05)}, {"block_length": 8}])
@torch.no_grad()
def test_one_pass_is_what_the_sampler_drew_from(changes: dict[str, Any]) -> None:
    """The recorded log-probs of the sampler that attends so, whatever the network; those of the plain one are others."""
    policy = small_policy(num_layers=3)
    rollout = made(policy, **changes)
    got = likelihood(policy, rollout)
    valid = got.weight > 0
    torch.testing.assert_close(got.value[valid], rollout.sampled_logprobs[valid], atol=2e-5, rtol=1e-4)
    plain = made(policy, any_order=False, **changes)
    away = (likelihood(policy, plain).value - plain.sampled_logprobs)[plain.completion_mask].abs()
    print(f"one pass on the plain sampler's trajectories: {float(away.mean()):.3f} nats a token away")
    assert float(away.max()) > 1e-2


@torch.no_grad()
def test_neither_padding_nor_the_length_of_the_canvas_moves_a_draw() -> None:
    policy = small_policy(num_layers=3)
    alone = PromptBatch(IDS[1:2, 1:], PROMPTS.prompt_mask[1:2, 1:], torch.tensor([1]))
    whole = made(policy)
    assert torch.equal(made(policy, alone).completion_ids, whole.completion_ids[2:4])
    longer = sampler(completion_length=8, block_length=4, num_steps=4, any_order=True)
    shorter = replace(longer, completion_length=4, num_steps=2)
    found = [one(policy, PROMPTS, 1, CounterDraws(0)).completion_ids[:, :4] for one in (longer, shorter)]
    assert torch.equal(*found)  # masks behind the block are seen by none (greedy: draws hang on the length)


@torch.no_grad()
def test_nobody_sees_later_tokens() -> None:
    """A token committed last may change without a trace in the likelihood of all others."""
    policy = small_policy(num_layers=3)
    rollout = made(policy, num_steps=8, stop_at_eos=False)
    last = rollout.commit_step == 7
    other = torch.where(last, (rollout.completion_ids + 1) % 20, rollout.completion_ids)
    changed = replace(rollout, completion_ids=other, completion_mask=torch.ones_like(last))
    rollout = replace(rollout, completion_mask=torch.ones_like(last))
    before, after = likelihood(policy, rollout).value, likelihood(policy, changed).value
    torch.testing.assert_close(before[~last], after[~last])
    assert not torch.allclose(before[last], after[last])


@torch.no_grad()
def test_one_step_is_the_one_step_likelihood_where_masks_see_each_other_not() -> None:
    """With all tokens in one step every slot sees the prompt and itself, as if the completion were one token long."""
    policy = small_policy(num_layers=3)
    rollout = made(policy, block_length=8, num_steps=1, stop_at_eos=False)
    alone = replace(rollout, commit_step=torch.where(torch.arange(8) == 5, 0, 1).expand(6, -1))
    torch.testing.assert_close(likelihood(policy, alone).value[:, 5], likelihood(policy, rollout).value[:, 5])


@torch.no_grad()
def test_what_was_drawn_is_replayed_under_the_same_attention() -> None:
    policy = small_policy(num_layers=3)
    for changes in ({"any_order": True}, {"block_causal": True}, {}):
        drawer = sampler(temperature=1.0, **changes)
        drawn = drawer(policy, PROMPTS, 2, CounterDraws(3))
        assert float(drawer.replay(policy, drawn, 4)) < 1e-5
        assert float(sampler(temperature=1.0).replay(policy, drawn, 4)) < 1e-5 or changes


@pytest.mark.parametrize("wrong", [TraceEstimator(1, 1.0), OneStepEstimator(0.0, 1, False)])
def test_attention_in_order_and_to_all_do_not_mix(wrong: Any) -> None:
    check_trajectory(EXACT, sampler(any_order=True))
    with pytest.raises(
        ValueError, match=r"^estimator: .*, which here is in the order of commitment.*Try: estimator=any_order"
    ):
        check_trajectory(wrong, sampler(any_order=True))
    with pytest.raises(
        ValueError, match=r"^estimator: AnyOrder.* which here is to the whole canvas.*Try: sampler=any_order"
    ):
        check_trajectory(EXACT, sampler())


def test_steps_under_guidance_are_not_replayed_without() -> None:
    with pytest.raises(ValueError, match=r"^sampler\.guidance: 0\.5, and TraceEstimator .*Try: sampler\.guidance=0"):
        check_trajectory(TraceEstimator(1, 1.0), sampler(guidance=0.5))
    check_trajectory(OneStepEstimator(0.0, 1, False), sampler(guidance=0.5))


def test_what_it_cannot_go_with_is_refused() -> None:
    giving = sampler(commit=CommitAll(), remask=LowestConfidence(EvenSchedule()))
    with pytest.raises(ValueError, match=r"^estimator: AnyOrderEstimator with LowestConfidence is refused.*Try: "):
        check_trajectory(EXACT, giving)
    with pytest.raises(ValueError, match=r"^estimator: AnyOrderEstimator needs a network .*Try: .*\[E207\]"):
        check_place(EXACT, is_shifted=True)
    check_place(EXACT, is_shifted=False)
    check_place(TraceEstimator(1, 1.0), is_shifted=True)
    check_place(BlockELBOEstimator(2, 4, False, two_stream=False), is_shifted=True)
    with pytest.raises(ValueError, match=r"^estimator: BlockELBOEstimator needs a network "):
        check_place(BlockELBOEstimator(2, 4, False, two_stream=True), is_shifted=True)
    for changes in ({"block_causal": True}, {"cache": DualCache(KVCache)}):
        with pytest.raises(ValueError, match=r"^sampler\.any_order: .*Try: "):
            sampler(any_order=True, **changes)
    with pytest.raises(ValueError, match=r"^sampler\.any_order: what a token sees hangs on the order.*Try: false"):
        completion_law(small_policy(num_layers=3), sampler(any_order=True, temperature=1.0), IDS[0])
    shifted = small_policy(num_layers=3)
    shifted.network.config.shift = True
    with pytest.raises(ValueError, match=r"^sampler\.any_order: it needs a network .*Try: "):
        made(shifted)
