"""An order that a head of the network draws: its law by enumeration, its gradient, and where the head is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.estimators.learned_order import LearnedOrderEstimator
from d1lit.models import LoraSettings, Policy, add_lora, load_adapter, load_weights, merge_lora, save_weights
from d1lit.models.loading import export_model, load_network
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.modules import DiffuGRPO
from d1lit.sampling import BlockSampler, EvenSchedule, FixedQuota, InverseCDF, PlackettLuce
from d1lit.sampling.order_head import OrderScore
from d1lit.scoring import score
from d1lit.types import POSITION, Context, OrderPredictor, PromptBatch, Rollout
from tests.end_to_end.distributed_worker import main, read
from tests.end_to_end.small import fit, make_module, sampler, small_policy

WORDS, MASK, EOS = (0, 1, 2), 3, 2
PROMPT = torch.tensor([1, 0])
LORA = LoraSettings(("q_proj", "up_proj"), 2, 4, 0.0)
ORDER = PlackettLuce(OrderScore(), temperature=1.0)


def with_head(policy: Policy, seed: int = 0, scale: float = 1.0) -> Policy:
    """A head that says something: its second matrix is not 0."""
    policy.train_order_head(True, seed)
    head = policy.network.order_head
    assert head is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(head.outer.weight.shape, generator=generator) * scale
        head.outer.weight.copy_(drawn)
    return policy


def world() -> Policy:
    """Three words and a mask, in float64."""
    config = tiny_config(4, MASK, EOS, EOS, 8, 1, 2, 12, 100.0, 16, init_std=0.6)
    return with_head(Policy(fresh_network(config, seed=1, dtype=torch.float64)), scale=3.0)


def in_two_steps(**changes: Any) -> BlockSampler:
    """Three positions of one block: two are fixed in the first step, one in the second."""
    settings: dict[str, Any] = {
        "completion_length": 3,
        "num_steps": 2,
        "block_length": 3,
        "temperature": 0.7,
        "guidance": 0.0,
        "proposal": InverseCDF(),
        "confidence": ORDER,
        "commit": FixedQuota(EvenSchedule()),
        "stop_at_eos": False,
    }
    return BlockSampler(**{**settings, **changes})


Way = tuple[tuple[int, int, int], tuple[int, int, int]]
"""The order in which positions are fixed, and the tokens by position."""


def ways() -> Iterator[Way]:
    """All trajectories: two positions in an order, then the third, with any tokens."""
    yield from itertools.product(itertools.permutations(range(3)), itertools.product(WORDS, repeat=3))


def step_logprob(policy: Policy, canvas: list[int], fixed: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
    """One step by hand: draw a position from a softmax over those left, again and again; draw their tokens."""
    hidden = policy.hidden(torch.tensor([[*PROMPT.tolist(), *canvas]]))[0, len(PROMPT) :]
    scores, logits = policy.order_scores(hidden), policy.head(hidden)[:, list(WORDS)] / 0.7
    assert scores is not None
    left, total = [place for place in range(3) if canvas[place] == MASK], scores.new_zeros(())
    for place in fixed:
        total = total + scores[place] - torch.stack([scores[other] for other in left]).logsumexp(0)
        total = total + logits[place].log_softmax(0)[tokens[place]]
        left.remove(place)
    return total


def way_logprob(policy: Policy, way: Way) -> Tensor:
    """[2]: of the two steps."""
    order, tokens = way
    between = [tokens[place] if place in order[:2] else MASK for place in range(3)]
    first = step_logprob(policy, [MASK] * 3, order[:2], tokens)
    return torch.stack([first, step_logprob(policy, between, order[2:], tokens)])


def recorded(all_ways: list[Way]) -> Rollout:
    """The rollouts whose record these trajectories are; the completion has no end, so all of it counts."""
    count = len(all_ways)
    order = torch.tensor([order for order, _ in all_ways])
    rank = order.argsort(1)
    shape = torch.zeros(count, 3)
    return Rollout(
        prompt_ids=PROMPT.expand(count, -1),
        prompt_mask=torch.ones(count, 2, dtype=torch.bool),
        completion_ids=torch.tensor([tokens for _, tokens in all_ways]),
        completion_mask=torch.ones(count, 3, dtype=torch.bool),
        row_ids=torch.arange(count),
        group_size=1,
        commit_step=(rank == 2).long(),
        sampled_logprobs=shape,
        confidence=-rank.double(),
        entropy=shape,
    )


def likelihood(policy: Policy, rollout: Rollout, views_per_chunk: int | None = None) -> Any:
    estimator = LearnedOrderEstimator(block_length=3, temperature=0.7, exclude_mask=True)
    context = Context(rollout, torch.ones(len(rollout.row_ids)), 0, 1, MASK, CounterDraws(0))
    views = estimator.corrupt(context)
    said = score(policy, rollout, views, views_per_chunk=views_per_chunk)
    return estimator.combine(said.logprobs, views, context)


def test_every_trajectory_has_its_exact_probability_and_gradient():
    policy, all_ways = world(), list(ways())
    exact = torch.stack([way_logprob(policy, way) for way in all_ways])
    assert float((exact.sum(1).exp().sum() - 1).abs().detach()) < 1e-12
    got = likelihood(policy, recorded(all_ways))
    torch.testing.assert_close(got.value, exact, rtol=0, atol=1e-12)
    assert (got.weight == 1).all()
    torch.testing.assert_close(got.parts["tokens"] + got.parts["order"], got.value)
    torch.testing.assert_close(likelihood(policy, recorded(all_ways), views_per_chunk=7).value, got.value)

    # The score function weighed by the exact probabilities is the gradient of the expected reward, for all weights.
    reward = torch.tensor([float(tokens[0] == 1) + (order[0] == 2) * tokens[2] for order, tokens in all_ways]).double()
    value = (exact.sum(1).exp() * reward).sum()
    weights = list(policy.parameters())
    surrogate = (exact.sum(1).exp().detach() * reward * got.value.sum(1)).sum()
    ours = torch.autograd.grad(surrogate, weights)
    for one, other in zip(ours, torch.autograd.grad(value, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    head = policy.network.order_head
    assert head is not None
    moved = {id(weight): gradient for weight, gradient in zip(weights, ours, strict=True)}
    assert all(float(moved[id(weight)].abs().max()) > 1e-4 for weight in head.parameters())


def test_the_sampler_follows_the_law():
    """Frequencies of all 162 trajectories by Pearson's statistic."""
    policy, count, all_ways = world(), 20_000, list(ways())
    prompts = PromptBatch(PROMPT[None], torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    rollout = in_two_steps()(policy, prompts, count, CounterDraws(0))
    later = rollout.commit_step * 1e6 - rollout.confidence  # by step, then by falling key
    rank = later.argsort(1)
    places = {way: number for number, way in enumerate(all_ways)}
    drawn = zip(map(tuple, rank.tolist()), map(tuple, rollout.completion_ids.tolist()), strict=True)
    seen = torch.bincount(torch.tensor([places[way] for way in drawn]), minlength=len(all_ways)).double()
    with torch.no_grad():
        expected = torch.stack([way_logprob(policy, way) for way in all_ways]).sum(1).exp() * count
    common = expected >= 5
    seen, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (seen, expected))
    kept = expected > 0
    pearson, freedom = float(((seen - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1
    print(f"Pearson {pearson:.0f} at {freedom} degrees of freedom")
    assert abs(pearson - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_record_of_a_rollout_is_scored_as_it_was_drawn():
    """Two blocks, an end inside, another temperature: the tokens' part is what the sampler noted."""
    policy = with_head(small_policy())
    made = sampler(confidence=ORDER, temperature=0.8)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    prompts = PromptBatch(ids, torch.ones_like(ids).bool(), torch.arange(2))
    rollout = made(policy, prompts, 8, CounterDraws(3))
    estimator = LearnedOrderEstimator(block_length=4, temperature=0.8, exclude_mask=True)
    context = Context(rollout, torch.ones(16), 0, 1, policy.mask_token_id, CounterDraws(0))
    views = estimator.corrupt(context)
    got = estimator.combine(score(policy, rollout, views).logprobs, views, context)
    noted = rollout.sampled_logprobs * (rollout.completion_mask & (rollout.commit_step >= 0))
    torch.testing.assert_close(got.parts["tokens"].sum(1), noted.sum(1), rtol=1e-4, atol=1e-4)
    assert (views.target_ids[:, views.target_ids.shape[1] // 2 :] == POSITION).all()
    # The head sees no token: who commits what is drawn apart, so order and tokens of a prompt mix freely.
    assert (got.parts["order"] <= 1e-6).all()


def test_without_a_head_the_order_is_uniform():
    policy = small_policy()
    assert isinstance(policy, OrderPredictor)
    hidden = policy.hidden(torch.tensor([[1, 2, 22, 22]]))[0]
    assert policy.order_scores(hidden) is None
    asked = policy.logprobs(hidden, torch.tensor([[4, POSITION]] * 4))
    assert torch.equal(asked[:, 1], torch.zeros(4))
    assert torch.equal(asked[:, 0], policy.logprobs(hidden, torch.full((4, 1), 4))[:, 0])
    fresh = small_policy()
    fresh.train_order_head(True, 0)
    scores = fresh.order_scores(hidden)
    assert scores is not None
    assert torch.equal(scores, torch.zeros(4))  # so a stage begins as its base was measured


ESTIMATOR = LearnedOrderEstimator(block_length=4, temperature=1.0, exclude_mask=True)


def learning(policy: Policy) -> DiffuGRPO:
    return make_module(policy, estimator=ESTIMATOR, sampler=sampler(confidence=ORDER), num_updates=2)


@pytest.mark.parametrize("adapted", [False, True], ids=["all_weights", "adapter"])
def test_two_real_updates_move_head_and_network(adapted):
    policy = small_policy()
    if adapted:
        policy = add_lora(policy, LORA, seed=0)
    policy.train_order_head(True, seed=0)
    before = {name: value.detach().clone() for name, value in policy.state_dict().items()}
    after = fit(learning(policy))
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert {name for name in trained if "order_head" in name} <= moved
    assert {name for name in moved if "order_head" not in name}
    assert moved <= trained


def test_only_a_stage_that_asks_trains_the_head():
    policy = small_policy()
    policy.train_order_head(False, 0)
    assert policy.network.order_head is None
    policy.train_order_head(True, 0)
    head = policy.network.order_head
    assert head is not None
    policy.train_order_head(False, 0)
    assert policy.network.order_head is head
    assert not any(weight.requires_grad for weight in head.parameters())
    policy = merge_lora(add_lora(policy, LORA, 0))
    policy.train_order_head(True, 1)  # the next stage goes on with the head there is
    assert policy.network.order_head is head
    assert all(weight.requires_grad for weight in head.parameters())


def said_by(policy: Policy) -> Tensor:
    scores = policy.order_scores(policy.hidden(torch.tensor([[1, 2, 22, 22]])))
    assert scores is not None
    return scores.detach()


@pytest.mark.parametrize("adapted", [False, True], ids=["all_weights", "adapter"])
def test_the_reference_keeps_its_own_head(adapted):
    policy = with_head(add_lora(small_policy(), LORA, 0) if adapted else small_policy())
    with pytest.raises(ValueError, match=r"^loss\.beta: .* Try: "):
        policy.reference()
    policy.keep_reference()
    before = said_by(policy)
    with_head(policy, seed=7)
    with policy.reference():
        assert torch.equal(said_by(policy), before)
    now = said_by(policy)
    assert not torch.equal(now, before)
    policy.sync_reference()
    with policy.reference():
        assert torch.equal(said_by(policy), now)
    assert not any("reference" in name for name, weight in policy.named_parameters() if weight.requires_grad)
    policy.drop_reference()
    assert policy.reference_order_head is None


@pytest.mark.parametrize("adapted", [False, True], ids=["all_weights", "adapter"])
def test_the_head_is_in_what_a_stage_hands_over(adapted, tmp_path):
    def start() -> Policy:
        return add_lora(small_policy(), LORA, 0) if adapted else small_policy()

    policy = with_head(start())
    save_weights(policy, tmp_path)
    other = start()
    with pytest.raises(ValueError, match="order"):
        load_weights(other, tmp_path)  # a policy without one
    other.train_order_head(True, 9)
    load_weights(other, tmp_path)
    assert torch.equal(said_by(other), said_by(policy))
    if adapted:
        found = Policy(load_adapter(small_policy().network, str(tmp_path)))
        assert torch.equal(said_by(found), said_by(policy))
        headless = tmp_path / "headless"
        save_weights(start(), headless)
        with pytest.raises(ValueError, match=r"^model\.adapter: the order head .* Try: "):
            load_weights(other, headless)
    else:
        assert torch.equal(said_by(Policy(load_network(str(tmp_path)))), said_by(policy))


@pytest.mark.parametrize("layout", ["d1lit", "official"])
def test_the_head_is_in_an_exported_model(layout, tmp_path):
    policy = with_head(small_policy())
    export_model(policy.network, tmp_path, layout)
    assert torch.equal(said_by(Policy(load_network(str(tmp_path)))), said_by(policy))
    without = replace_head(small_policy(), tmp_path / "without", layout)
    assert without.network.order_head is None


def replace_head(policy: Policy, folder: Any, layout: Any) -> Policy:
    """The policy as a folder gives it back."""
    export_model(policy.network, folder, layout)
    return Policy(load_network(str(folder)))


def test_a_run_that_was_stopped_ends_with_the_same_head(tmp_path):
    """Beside an adapter, with a reference: stopped within a rollout's updates, and gone on with from the checkpoint."""
    name, threads = "grpo-lora-single-float32-3-order", torch.get_num_threads()
    for folder, words in (("whole", (name,)), ("stopped", (f"{name}@2", name))):
        for word in words:
            main(tmp_path / folder, [word])
    torch.set_num_threads(threads)
    whole, stopped = (read(tmp_path / folder / name) for folder in ("whole", "stopped"))
    assert {step.split(".")[0] for step in stopped.gradients} == {"002"}, "one update was left"
    assert {key.split(".")[-2] for key in whole.weights if "order_head" in key} == {"inner", "outer"}
    assert all(float(value.abs().max()) > 0 for key, value in whole.weights.items() if "order_head" in key)
    for key, value in whole.weights.items():
        assert torch.equal(value, stopped.weights[key]), key


def test_guidance_takes_the_order_of_the_conditional_half():
    policy = with_head(small_policy())
    ids = torch.tensor([[1, 2, 3]])
    prompts = PromptBatch(ids, torch.ones_like(ids).bool(), torch.arange(1))
    made = sampler(confidence=OrderScore(), temperature=0.0, stop_at_eos=False)
    plain, guided = (replace(made, guidance=s)(policy, prompts, 2, CounterDraws(0)) for s in (0.0, 1.0))
    first = plain.commit_step == 0
    assert torch.equal(first, guided.commit_step == 0)
    torch.testing.assert_close(plain.confidence[first], guided.confidence[first])
