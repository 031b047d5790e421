"""Rollouts that branch (d-TreeRPO): what leaves share, what an edge is worth, how it is scored, and that it trains."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.advantages import ShuffledRewards, TreeAdvantage, group_mean, on_tokens
from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import evaluation_sampler
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.same_views import SameViews
from d1lit.estimators.tree_edges import TreeEdgesEstimator
from d1lit.losses import ClippedPolicyLoss, check_tree
from d1lit.losses.clipped import SequenceClippedLoss
from d1lit.losses.filters import TopEntropyLoss
from d1lit.losses.policy_gradient import ReinforceLoss
from d1lit.losses.terms import k2, k3, num_completion_tokens, sequence_sum, token_mean
from d1lit.losses.tree import WithSiblingDistillation, distillation_temperature, distillation_weight
from d1lit.models.cache import KVCache
from d1lit.modules.experience import Experience, as_tree, dealt, restored
from d1lit.sampling import DualCache, Gumbel, PlackettLuce, RandomOrder, Threshold, TokenProbability
from d1lit.sampling.sharing import edges
from d1lit.scoring import score
from d1lit.types import Context, LogProbs, LossInputs, RewardBatch, Rollout, Tree
from tests.end_to_end import small
from tests.test_sampling import SmallNetwork, pick, prompts, same_rows, sampler

TREES = (Tree(2, 3), Tree(4, 2), Tree(3, 1))


def common_edges(tree: Tree, one: int, other: int) -> int:
    """Edges that the paths to two leaves have in common, by walking down."""
    shared = 0
    for level in range(1, tree.height + 1):
        width = tree.branching ** (tree.height - level)
        if one // width != other // width:
            return shared
        shared = level
    return shared


def grown(tree: Tree | None, seed: int = 0, count: int = 3, **changes: Any) -> tuple[Rollout, SmallNetwork]:
    policy = SmallNetwork(seed, vocabulary=11)
    policy.output.data *= 0.3  # a flat law: siblings differ
    settings: dict[str, Any] = {"temperature": 0.9, "tree": tree} | changes
    group = 8 if tree is None else tree.leaves
    batch = prompts(count, seed=seed, padded=True, vocabulary=11)
    return sampler(**settings)(policy.eval(), batch, group, CounterDraws(seed)), policy


# -------------------------------------------------------------------------------------------------------------- rollouts


def test_edges_take_equal_shares_of_the_steps() -> None:
    assert Tree(4, 2).starts(128) == [0, 64]
    assert Tree(2, 3).starts(8) == [0, 2, 5]
    assert [Tree(2, 3).edge_of(step, 8) for step in range(8)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert edges(Tree(2, 3), torch.tensor([[4, -1, 0, 7]]), 8).tolist() == [[1, 3, 0, 2]]


KINDS: dict[str, dict[str, Any]] = {
    "quota": {},
    "random": {"confidence": RandomOrder()},
    "plackett_luce": {"confidence": PlackettLuce(TokenProbability(), 0.3)},
    "gumbel": {"proposal": Gumbel(double=False)},
    "guided": {"guidance": 0.7},
    "stopped": {"stop_at_eos": True, "block_length": 4},
    "few": {"stop_at_eos": True, "block_length": 4, "rows_per_forward": 20},
    "uneven": {"num_steps": 10, "block_length": 8},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_leaves_are_alike_until_they_branch_and_then_part(tree: Tree, changes: dict[str, Any]) -> None:
    parted = pairs = 0
    for seed in range(2):
        rollout, _ = grown(tree, seed, **changes)
        assert rollout.edge is not None
        num_steps = sampler(**changes).total_steps
        for n, c in torch.cartesian_prod(*map(torch.arange, rollout.edge.shape))[::7].tolist():
            step = int(rollout.commit_step[n, c])
            expected = max(k for k in range(tree.height) if step >= k * num_steps // tree.height) if step >= 0 else None
            assert int(rollout.edge[n, c]) == (tree.height if expected is None else expected)
        for group in range(3):
            for i, j in combinations(range(tree.leaves), 2):
                shared = common_edges(tree, i, j)
                one, other = group * tree.leaves + i, group * tree.leaves + j
                before, there = rollout.edge[one] < shared, rollout.edge[other] < shared
                assert torch.equal(before, there)
                for name in ("completion_ids", "commit_step", "sampled_logprobs", "confidence", "entropy"):
                    value = getattr(rollout, name)
                    assert torch.equal(value[one][before], value[other][before]), name  # bit for bit: one forward
                parted += int(not torch.equal(rollout.completion_ids[one], rollout.completion_ids[other]))
                pairs += 1
    assert parted > 0.8 * pairs, (parted, pairs)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_the_leftmost_leaf_is_the_rollout_that_no_tree_would_change(tree: Tree) -> None:
    """It draws by its own numbers, so every leaf, which draws by such numbers too, is a draw of the sampler's law."""
    rollout, policy = grown(tree)
    plain = sampler(temperature=0.9)(policy, prompts(3, padded=True, vocabulary=11), tree.leaves, CounterDraws(0))
    leftmost = torch.arange(0, 3 * tree.leaves, tree.leaves)
    same_rows(rollout, plain, leftmost, leftmost)
    assert plain.edge is None


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_rows_at_one_canvas_share_a_forward(tree: Tree) -> None:
    """1 row for the first step, then b, ..., b again where they branch: counted by the canvases that really differ."""
    rollout, policy = grown(tree, num_steps=8, record_trace=True)
    assert rollout.trace is not None
    rows = 3  # every prompt's masked canvas
    for step in range(7):
        canvas = rollout.trace[step].view(3, tree.leaves, -1)
        nodes = tree.branching ** (1 + max(k for k in range(tree.height) if step >= k * 8 // tree.height))
        assert all(len(group.unique(dim=0)) <= nodes for group in canvas)
        rows += 3 * nodes
    length = rollout.prompt_ids.shape[1] + 16
    assert rollout.num_tokens_forward == rows * length == sum(n * width for n, width in policy.calls)
    assert rollout.num_forwards == 8
    print(f"{tree}: {rows} rows of {8 * 3 * tree.leaves}")


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_tree_depends_on_nothing_but_its_prompt(tree: Tree) -> None:
    batch, size = prompts(4, seed=4, padded=True, vocabulary=11), tree.leaves
    policy = SmallNetwork(3, vocabulary=11).eval()
    policy.output.data *= 0.3
    settings: dict[str, Any] = {"temperature": 0.9, "tree": tree, "stop_at_eos": True, "block_length": 4}
    draws = CounterDraws(11, step=5)
    whole, everything = sampler(**settings)(policy, batch, size, draws), torch.arange(4 * size)
    few = sampler(**settings, rows_per_forward=size + 1)(policy, batch, size, draws)
    same_rows(whole, few, everything, everything)
    order = [3, 0, 2]
    shuffled = sampler(**settings)(policy, pick(batch, order), size, draws)
    same_rows(whole, shuffled, everything.view(4, size)[order].flatten(), torch.arange(3 * size))
    second_rank = sampler(**settings)(policy, batch.rows(2, 4), size, draws)
    same_rows(whole, second_rank, everything[2 * size :], torch.arange(2 * size))
    assert whole.edge is not None
    assert shuffled.edge is not None
    assert torch.equal(whole.edge.view(4, size, -1)[order].flatten(0, 1), shuffled.edge)
    assert torch.equal(whole.edge[size : 2 * size], whole.rows(size, 2 * size).edge)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"commit": Threshold(0.5)}, "sampler.tree: edges are equal shares"),
        ({"cache": DualCache(KVCache)}, "sampler.tree: .* no cache"),
        ({"num_steps": 2, "tree": Tree(2, 3)}, "sampler.tree.height: 3 edges are more than the 2 steps"),
        ({"num_steps": 32, "tree": Tree(2, 4)}, "sampler.tree: the steps of edge 1 fix no token"),
        ({"rows_per_forward": 7}, "sampler.rows_per_forward: no room for the 8 leaves"),
        ({"rows_per_forward": 15, "guidance": 1.0}, "sampler.rows_per_forward: no room"),
    ],
)
def test_samplers_that_cannot_branch_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}.*Try: "):
        sampler(**({"tree": Tree(2, 3)} | changes))


def test_a_group_is_the_leaves() -> None:
    with pytest.raises(ValueError, match=r"^sampler.tree: 8 leaves are no group of 6. Try: group_size=8"):
        sampler(tree=Tree(2, 3))(SmallNetwork(0), prompts(1), 6, CounterDraws(0))
    for wrong in ((1, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"^tree\.\w+: \d is below \d. Try: "):
            Tree(*wrong)


# ------------------------------------------------------------------------------------------------------------ advantages


def rewards_of(total: Tensor, valid: Tensor | None = None) -> RewardBatch:
    ok = torch.ones(len(total), 1, dtype=torch.bool) if valid is None else valid[:, None]
    return RewardBatch(total[:, None], ok, torch.ones(1))


def longhand_edges(tree: Tree, total: list[float | None], leaf: int) -> list[float]:
    """Of the edges to a leaf: recursive means over the children that anyone judged, None for nobody."""

    def value(level: int, node: int) -> float | None:
        if level == tree.height:
            return total[node]
        children = [value(level + 1, node * tree.branching + c) for c in range(tree.branching)]
        judged = [v for v in children if v is not None]
        return sum(judged) / len(judged) if judged else None

    found = []
    for level in range(1, tree.height + 1):
        node = leaf // tree.branching ** (tree.height - level)
        parent, own = node // tree.branching, value(level, node)
        siblings = [value(level, parent * tree.branching + c) for c in range(tree.branching)]
        others = [v for c, v in enumerate(siblings) if v is not None and parent * tree.branching + c != node]
        found.append(own - sum(others) / len(others) if own is not None and others else 0.0)
    return found


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("judged", [1.0, 0.6])
def test_advantages_of_edges_longhand(tree: Tree, judged: float) -> None:
    g = torch.Generator().manual_seed(1)
    total = torch.randn(4 * tree.leaves, generator=g)
    valid = torch.rand(len(total), generator=g) < judged
    got = TreeAdvantage(tree)(rewards_of(total, valid), tree.leaves)
    assert got.shape == (len(total), tree.height)
    for n in range(len(total)):
        group = slice(n // tree.leaves * tree.leaves, (n // tree.leaves + 1) * tree.leaves)
        given = [v if ok else None for v, ok in zip(total[group].tolist(), valid[group].tolist(), strict=True)]
        torch.testing.assert_close(got[n], torch.tensor(longhand_edges(tree, given, n % tree.leaves)))


def test_an_advantage_takes_groups_of_all_leaves() -> None:
    with pytest.raises(ValueError, match=r"group_size: 8, but the tree has 16 leaves. Try: 16"):
        TreeAdvantage(Tree(4, 2))(rewards_of(torch.zeros(32)), 8)


def test_a_token_has_the_advantage_of_its_edge() -> None:
    rollout, _ = grown(Tree(2, 3), stop_at_eos=True, block_length=4)
    assert rollout.edge is not None
    given = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    got = on_tokens(given, rollout)
    for n in range(24):
        for c in range(16):
            edge = int(rollout.edge[n, c])
            assert float(got[n, c]) == (float(given[n, edge]) if edge < 3 else 0.0)
    assert torch.equal(on_tokens(given[:, 0], rollout), given[:, 0])


# ------------------------------------------------------------------------------------------------ likelihoods and losses


def branched(tree: Tree, seed: int = 0, count: int = 2) -> tuple[Rollout, Any, Context]:
    """Trees of a small policy, and their context with advantages of tokens."""
    policy = small.small_policy(seed=seed)
    batch = prompts(count, length=4, seed=seed, padded=True, vocabulary=20)
    made = small.sampler(tree=tree, block_length=4, num_steps=4)
    rollout = made(policy, batch, tree.leaves, CounterDraws(seed))
    total = torch.randn(count * tree.leaves, generator=torch.Generator().manual_seed(seed))
    advantages = on_tokens(TreeAdvantage(tree)(rewards_of(total), tree.leaves), rollout)
    return rollout, policy, Context(rollout, advantages, 0, 1, policy.mask_token_id, CounterDraws(0))


def all_edges(tree: Tree, rollout: Rollout) -> list[tuple[int, int, list[int]]]:
    """Every (level, one leaf below the child, the tokens that count of the edge), once."""
    assert rollout.edge is not None
    found = []
    for level in range(tree.height):
        for n in range(0, len(rollout.row_ids), tree.branching ** (tree.height - level - 1)):
            tokens = []
            for p, (edge, token) in enumerate(
                zip(rollout.edge[n].tolist(), rollout.completion_ids[n].tolist(), strict=True)
            ):
                if edge == level:
                    tokens.append(p)
                if edge <= level and token == small.EOS:  # the child's canvas ends here
                    break
            found.append((level, n, tokens))
    return found


def parent_logprobs(policy: Any, rollout: Rollout, level: int, n: int, temperature: float) -> Tensor:
    """[C V] of the canvas where an edge starts: what earlier edges fixed, and masks."""
    assert rollout.edge is not None
    shown = torch.where(rollout.edge[n] < level, rollout.completion_ids[n], policy.mask_token_id)
    ids = torch.cat([rollout.prompt_ids[n], shown])[None]
    seen = torch.cat([rollout.prompt_mask[n], torch.ones_like(shown, dtype=torch.bool)])[None]
    logits = policy.head(policy.hidden(ids, seen))[0, -len(shown) :] / temperature
    logits = logits.index_fill(1, torch.tensor(policy.mask_token_id), -torch.inf)
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("tree", TREES, ids=str)
@torch.no_grad()
def test_an_edge_is_scored_from_its_parent_and_counts_once(tree: Tree) -> None:
    past_end = 0
    for seed in range(3):
        rollout, policy, context = branched(tree, seed)
        estimator = TreeEdgesEstimator(tree, 0.8, exclude_mask=True)
        corruption = estimator.corrupt(context)
        assert len(corruption.noised_ids) == 2 * sum(tree.branching**level for level in range(tree.height))
        scores = score(policy, rollout, corruption).logprobs
        got = estimator.combine(scores, corruption, context)
        mean = 0.0
        for level, n, tokens in all_edges(tree, rollout):
            expected = parent_logprobs(policy, rollout, level, n, 0.8)
            below = tree.branching ** (tree.height - level - 1)
            for leaf in range(n, n + below):
                for p in tokens:
                    value = expected[p, rollout.completion_ids[n, p]]
                    torch.testing.assert_close(got.value[leaf, p], value, atol=1e-5, rtol=1e-5)
            own = got.weight[n : n + below, tokens].sum()
            mean += sum(float(expected[p, rollout.completion_ids[n, p]]) for p in tokens) / max(1, len(tokens))
            num_edges = sum(tree.branching**k for k in range(1, tree.height + 1))  # of a group
            torch.testing.assert_close(float(own), tree.leaves / num_edges if tokens else 0.0)
        past_end += int((got.weight[~rollout.completion_mask] > 0).sum())
        inputs = loss_inputs(tree, got, context, rollout)
        summed = sequence_sum(got.value, got.weight, inputs)
        torch.testing.assert_close(float(summed), mean / len(all_edges(tree, rollout)), atol=1e-5, rtol=1e-5)
    print(f"{past_end} tokens count though a later edge ended the sequence before them")


def loss_inputs(tree: Tree, logprobs: LogProbs, context: Context, rollout: Rollout, **more: Any) -> LossInputs:
    total, count = torch.zeros(len(rollout.row_ids)), float(len(rollout.row_ids))
    shape = (tree.leaves, rollout.completion_mask, None, float(logprobs.weight.sum()), count)
    return LossInputs(logprobs, None, None, context.advantages, total, *shape, **more)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_the_loss_is_a_mean_over_edges_and_distils_from_better_siblings(tree: Tree) -> None:
    """Value and gradient of the whole loss against loops over edges, parents, positions and tokens."""
    rollout, policy, context = branched(tree, 1)
    estimator = TreeEdgesEstimator(tree, 1.0, exclude_mask=True)
    corruption = estimator.corrupt(context)
    got = estimator.combine(score(policy, rollout, corruption).logprobs, corruption, context)
    loss = WithSiblingDistillation(ReinforceLoss(sequence_sum), tree, 0.3, 2.0, 2.0, 0.7)
    inputs = loss_inputs(tree, got, context, rollout, progress=0.4)
    value, metrics = loss(inputs)

    every = all_edges(tree, rollout)
    expected, divergence, places = torch.zeros(()), torch.zeros(()), 0
    for level, n, tokens in every:
        logprobs = parent_logprobs(policy, rollout, level, n, 1.0)
        if tokens:
            terms = [-context.advantages[n, p] * logprobs[p, rollout.completion_ids[n, p]] for p in tokens]
            expected = expected + sum(terms) / len(tokens) / len(every)
    temperature = distillation_temperature(0.4, 2.0, 0.7)
    for level in range(tree.height):
        children = [(n, tokens) for at, n, tokens in every if at == level]
        for start in range(0, len(children), tree.branching):
            family = children[start : start + tree.branching]
            logprobs = parent_logprobs(policy, rollout, level, family[0][0], 1.0)
            for p in range(small.COMPLETION):
                target: dict[int, float] = {}
                for n, tokens in family:
                    if p in tokens and float(context.advantages[n, p]) > 0:
                        token = int(rollout.completion_ids[n, p])
                        say = torch.exp(context.advantages[n, p] / temperature)
                        target[token] = target.get(token, 0.0) + float(say)
                if target:
                    places += 1
                    q = torch.tensor(list(target.values())) / sum(target.values())
                    divergence = divergence + (q * (q.log() - logprobs[p, list(target)])).sum()
    assert places
    torch.testing.assert_close(metrics["distillation"], (divergence / places).detach(), atol=1e-5, rtol=1e-4)
    expected = expected + distillation_weight(0.4, 0.3, 2.0) * divergence / places
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    weights = [p for p in policy.parameters() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(value, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_rollouts_that_did_not_branch_are_refused() -> None:
    tree = Tree(2, 3)
    rollout, _ = grown(None)
    context = Context(rollout, torch.zeros(24), 0, 1, 10, CounterDraws(0))
    with pytest.raises(
        ValueError, match=r"^estimator: .* 8 leaves .* groups of 8 that did not branch. Try: sampler=tree"
    ):
        TreeEdgesEstimator(tree, 1.0).corrupt(context)
    with pytest.raises(ValueError, match=r"^estimator: .* 9 leaves .* groups of 8"):
        TreeEdgesEstimator(Tree(3, 2), 1.0).corrupt(context)


# --------------------------------------------------------------------------------------------------- parts and whole runs

TREE, OTHER = Tree(2, 2), Tree(4, 1)
CLIPPED = ClippedPolicyLoss(0.2, 0.2, 0.0, k3, sequence_sum)
EDGES, ONE_STEP = TreeEdgesEstimator(TREE, 1.0), OneStepEstimator(0.0, 1, False)
DISTILLING = WithSiblingDistillation(CLIPPED, TREE, 0.003, 2.0, 2.0, 0.7)
SEQUENCE = SequenceClippedLoss(0.2, 0.2, 0.0, k2, num_completion_tokens)


@pytest.mark.parametrize(
    ("tree", "estimator", "advantage", "loss", "size", "line"),
    [
        (
            TREE,
            EDGES,
            TreeAdvantage(TREE),
            CLIPPED,
            6,
            "module.group_size: 6, but a tree of 2 branches and 2 levels has 4",
        ),
        (
            OTHER,
            EDGES,
            TreeAdvantage(OTHER),
            CLIPPED,
            4,
            "estimator.tree: 2 branches over 2 levels, .* branch by 4 over 1",
        ),
        (None, ONE_STEP, TreeAdvantage(TREE), CLIPPED, 4, "advantage.tree: .* do not branch"),
        (TREE, EDGES, TreeAdvantage(OTHER), CLIPPED, 4, "advantage.tree: 4 branches over 1 levels"),
        (TREE, EDGES, TreeAdvantage(TREE), SEQUENCE, 4, "advantage: .* SequenceClippedLoss takes one a rollout"),
        (TREE, EDGES, group_mean, DISTILLING, 4, "advantage: group_mean has no number for an edge"),
        # what wraps a part says what the part says
        (OTHER, SameViews(EDGES), group_mean, CLIPPED, 4, "estimator.tree: 2 branches over 2 levels"),
        (OTHER, ONE_STEP, group_mean, TopEntropyLoss(DISTILLING, 0.5), 4, "loss.tree: 2 branches over 2 levels"),
        (None, ONE_STEP, ShuffledRewards(TreeAdvantage(TREE), 0), CLIPPED, 4, "advantage.tree: .* do not branch"),
    ],
)
def test_parts_that_disagree_are_refused(tree, estimator, advantage, loss, size, line) -> None:
    with pytest.raises(ValueError, match=rf"^{line}.* Try: .*\[E207\]$"):
        check_tree(small.sampler(tree=tree), estimator, advantage, loss, size)
    check_tree(small.sampler(tree=TREE), ONE_STEP, TreeAdvantage(TREE), CLIPPED, 4)
    check_tree(small.sampler(), ONE_STEP, group_mean, SEQUENCE, 6)


def test_the_recipe_refuses_on_one_line_and_evaluates_without_a_tree() -> None:
    (config,) = compose_jobs("train", ["recipe=d_tree_rpo", "task=sudoku"]).configs
    plan = plan_run(config)
    assert plan.sampler.tree == Tree(2, 3)
    assert evaluation_sampler(plan, None).tree is None
    inner = config.advantage
    config.advantage = {"_target_": "d1lit.advantages.ShuffledRewards", "advantage": inner, "seed": 0}
    assert plan_run(config).stages[-1].module.keywords["advantage"].tree == Tree(2, 3)
    config.advantage = inner
    config.stages.grpo.module.kl_in_reward = 0.1
    with pytest.raises(ConfigError, match=r"module.kl_in_reward: .* no KL of a completion. Try: loss.beta"):
        plan_run(config)
    config.stages.grpo.module.kl_in_reward = 0.0
    config.stages.grpo.module.group_size = 6
    with pytest.raises(ConfigError, match=r"module.group_size: 6, but a tree .* has 8 leaves. Try: 8") as refused:
        plan_run(config)
    assert "\n" not in str(refused.value)


def tree_module(**changes: Any) -> Any:
    loss = ClippedPolicyLoss(0.2, 0.2, 0.0, k3, changes.pop("aggregate", sequence_sum))
    parts: dict[str, Any] = {
        "sampler": small.sampler(tree=TREE),
        "estimator": EDGES,
        "advantage": TreeAdvantage(TREE),
        "loss": loss,
        "group_size": 4,
    }
    return small.make_module(small.small_policy(), **(parts | changes))


@pytest.mark.parametrize("aggregate", [sequence_sum, token_mean])
def test_it_trains_and_micro_batches_change_nothing(aggregate: Any) -> None:
    start = {name: value.clone() for name, value in small.small_policy().state_dict().items()}
    whole = small.fit(tree_module(aggregate=aggregate))
    assert small.largest_shift(start, whole) > 1e-3
    assert small.largest_shift(whole, small.fit(tree_module(aggregate=aggregate), num_micro=2)) < 1e-5


def test_distillation_trains_and_follows_the_progress_of_the_run() -> None:
    seen: list[float] = []

    class Noting(WithSiblingDistillation):
        def __call__(self, inputs: LossInputs) -> Any:
            seen.append(inputs.progress)
            return super().__call__(inputs)

    base = tree_module().loss
    plain = small.fit(tree_module())
    distilled = small.fit(tree_module(loss=Noting(base, TREE, 0.5, 2.0, 2.0, 0.7)))
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert small.largest_shift(plain, distilled) > 1e-5
    nothing = small.fit(tree_module(loss=WithSiblingDistillation(base, TREE, 0.0, 2.0, 2.0, 0.7)))
    assert small.largest_shift(plain, nothing) < 1e-6


def test_edges_survive_a_checkpoint_and_a_cut() -> None:
    rollout, _, context = branched(TREE, count=4)
    own = Experience(rollout, context.advantages, torch.zeros(16), (None,), (None,), (1.0,), 16.0, 0)
    back = restored(as_tree(own), torch.device("cpu"))
    halves = dealt([[back]], 2, 1)
    for half, rows in zip((halves[0][0], halves[1][0]), (slice(0, 8), slice(8, 16)), strict=True):
        assert rollout.edge is not None
        assert half.rollout.edge is not None
        assert torch.equal(half.rollout.edge, rollout.edge[rows])
        assert torch.equal(half.advantages, context.advantages[rows])
    assert replace(rollout, edge=None).rows(0, 4).edge is None
