"""Estimators against the reference implementations: noised ids exactly, log-probs and gradients at the tolerance.

Cases are discovered from the manifest; a case without a counterpart fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.advantages import group_mean
from d1lit.estimators import spg
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
from d1lit.estimators.sampled_steps import SurprisalStepsEstimator
from d1lit.estimators.step_merge import StepMergeEstimator, TraceEstimator
from d1lit.estimators.tree_edges import TreeEdgesEstimator
from d1lit.estimators.views import completion_views, segment_views, sequence_logprobs, token_logprobs
from d1lit.losses import ClippedPolicyLoss, terms, tree
from d1lit.losses.filters import LikelyTokenFilter
from d1lit.losses.policy_gradient import ReinforceLoss
from d1lit.models import Policy, load_network
from d1lit.scoring import score
from d1lit.types import LogProbs, LossInputs, RewardBatch, Rollout, Tree
from tests.golden.reading import (
    d1_entries,
    d1_model_folder,
    d1_tensors,
    entry_id,
    method_cases,
    method_tensors,
    needs_golden,
)
from tests.golden.replay import (
    ReplayDraws,
    StoredCalls,
    assert_near,
    keys_for_subset,
    likelihood,
    longhand_scores,
    make_context,
    make_rollout,
    uniform_below,
)

Case = dict[str, Any]
Tensors = dict[str, Tensor]


def _rollout(t: Tensors, group_size: int = 1, **more: Any):
    return make_rollout(
        t["in.prompt_ids"], t["in.completion_ids"], t.get("in.completion_mask"), group_size=group_size, **more
    )


def _compare(name: str, got: Tensor, expected: Tensor, t: Tensors, network: StoredCalls) -> None:
    """The value, and the gradient of sum(cotangent * value) with respect to every logit."""
    assert_near(name, got, expected)
    if "in.cotangent" in t:
        (got * t["in.cotangent"].reshape(got.shape)).sum().backward()
        assert network.logits.grad is not None and network.all_used()
        assert_near(f"{name} gradient", network.logits.grad, network.expected_grad)


def one_step(case: Case, t: Tensors) -> None:
    prob = case["settings"]["p_mask_prompt"]
    estimator = OneStepEstimator(prob, num_masks=1, share_within_group=False)
    uniform = uniform_below(t["rand.prompt_mask"], prob).flip(1)  # counted backward from the completion
    rollout = replace(_rollout(t), completion_mask=torch.ones_like(t["in.completion_ids"], dtype=torch.bool))
    network = StoredCalls(t)
    got, corruption = likelihood(
        estimator, make_context(rollout, ReplayDraws({"prompt_mask": uniform}), case["settings"]["mask_id"]), network
    )
    assert torch.equal(corruption.noised_ids, t["call0.input_ids"])
    assert_near("masked sum", (got.value * t["in.completion_mask"]).sum(1), t["out.seq_logp_masked_sum"])
    _compare(case["name"], got.value, t["out.token_logp"], t, network)


def coupled(case: Case, t: Tensors) -> None:
    estimator = CoupledEstimator(0.2, 0.8)
    values, network = [], StoredCalls(t, shifted=True)
    for j, ratio in enumerate(t["rand.mask_ratio"]):
        hidden = t["rand.mask_S"][j]
        uniform = torch.full((len(hidden),), (float(ratio) - 0.2) / 0.6)
        draws = ReplayDraws({"mask_ratio": uniform, "mask": torch.where(hidden, 0.0, 0.999)})
        got, corruption = likelihood(estimator, make_context(_rollout(t), draws, case["settings"]["mask_id"]), network)
        n = len(hidden)
        block = t["call0.input_ids"][3 * n * j : 3 * n * (j + 1)]
        assert torch.equal(corruption.noised_ids[:n], block[:n])
        assert torch.equal(corruption.noised_ids[n::2], block[n : 2 * n])
        assert torch.equal(corruption.noised_ids[n + 1 :: 2], block[2 * n :])
        values.append(got.value)
    _compare(case["name"], torch.stack(values, dim=1), t["out.token_logp"], t, network)


def _mask_draws(masks: Tensor, length: int) -> ReplayDraws:
    """Uniforms that give each row its stored subset and count, the count being drawn from 0 .. length."""
    values: dict[Any, Tensor] = {}
    for k, mask in enumerate(masks):
        values[("mask_count", k)] = (mask.sum(1) + 0.5) / (length + 1)
        values[("mask", k)] = keys_for_subset(mask)
    return ReplayDraws(values)


def espo(case: Case, t: Tensors) -> None:
    settings, masks = case["settings"], t["rand.mask_S"]
    n, c = t["in.completion_ids"].shape
    estimator = ESPOEstimator(settings["num_mc"], settings["reduce_var"], score_padding=True, round_sums=True)
    draws = _mask_draws(masks, c)
    for k, start in enumerate(t["rand.k"]):  # one start for the group; its rollouts are the strata
        draws.values[("mask_count", k)] = torch.full((n,), (float(start) + 0.5) / (c + 1))
    network = StoredCalls(t, shifted=settings["shifted_logits"])
    context = make_context(_rollout(t, group_size=n), draws, settings["mask_id"])
    got, corruption = likelihood(estimator, context, network)
    halves = corruption.noised_ids.view(n, settings["num_mc"], -1, corruption.noised_ids.shape[1])
    assert torch.equal((halves[:, :, 0, -c:] == settings["mask_id"]).transpose(0, 1), masks)
    _compare(case["name"], got.value, t["out.elbo"], t, network)


def espo_padding_aware(case: Case, t: Tensors) -> None:
    estimator = ESPOEstimator(1, complement=True, score_padding=False)
    hidden, length = t["rand.mask_S"], t["in.completion_mask"].sum(1)
    draws = ReplayDraws({"mask_count": (hidden.sum(1) + 0.5) / (length + 1), "mask": keys_for_subset(hidden.bool())})
    network = StoredCalls(t)
    got, _ = likelihood(estimator, make_context(_rollout(t), draws, case["settings"]["mask_id"]), network)
    _compare(case["name"], got.value[:, 0], t["out.elbo"], t, network)


def pair_score(case: Case, t: Tensors) -> None:
    num_masks, c = case["settings"]["num_mc"], t["in.completion_ids"].shape[1]
    centred = "tlc" in case["name"]  # equals ESPO's bound mask by mask: the centring is a no-op
    network, draws = StoredCalls(t), _mask_draws(t["rand.mask_S"], c)
    context = make_context(_rollout(t), draws, case["settings"]["mask_id"])
    if not centred:
        got, _ = likelihood(PairScoreEstimator(num_masks, score_padding=True), context, network)
        value = got.value
    else:
        corruption = ESPOEstimator(num_masks, complement=True, score_padding=True).corrupt(context)
        scores = longhand_scores(network, corruption) * corruption.weight * num_masks
        value = scores.sum(2).view(len(scores), num_masks, 2).sum(2)
    _compare(case["name"], value[:, :, None], t["out.seq_score"], t, network)


def llada_likelihood(case: Case, t: Tensors) -> None:
    masks, mask_id = t["rand.mask_S"], case["settings"]["mask_id"]
    num_batches, per_batch, c = masks.shape
    estimator, network, values = ELBOEstimator(per_batch, score_padding=True, round_sums=True), StoredCalls(t), []
    rollout = make_rollout(t["in.prompt_ids"][None], t["in.completion_ids"][None])
    for b in range(num_batches):
        draws: dict[Any, Tensor] = {("mask", k): keys_for_subset(masks[b, k][None]) for k in range(per_batch)}
        draws["mask_count"] = ((t["rand.num_masked"][b, :1] - 0.5) / c).to(torch.float32)
        got, corruption = likelihood(estimator, make_context(rollout, ReplayDraws(draws), mask_id), network)
        assert torch.equal(corruption.noised_ids, t[f"call{b}.input_ids"])
        values.append(got.value[0, 0])
    assert_near(case["name"], torch.stack(values).mean(), t["out.elbo"])


def spg_bounds(case: Case, t: Tensors) -> None:
    settings, mask_id = case["settings"], case["settings"]["mask_id"]
    n, c = t["in.completion_ids"].shape
    bound = settings["logp_estimation"]
    law = {"all": spg.hide_all, "random": spg.hide_random}.get(settings["forward_type"])
    if law is None:
        block = {"block_all": spg.hide_block, "block_random": spg.hide_in_block}[settings["forward_type"]]
        law = partial(block, block_length=settings["block_length"])
    estimator = spg.SPGEstimator(
        mask=law,
        num_masks=settings["num_t"],
        context_mask_prob=0.0,
        eubo_beta=settings["eubo_beta"],
        mix_weight={"mix": settings["mix_weight"], "eubo": 1.0}.get(bound, 0.0),
        ignore_negative=bound == "zero",
    )
    advantages = torch.where(t["in.positive"], 1.0, -1.0)
    rollout = make_rollout(
        t["in.prompt_ids"], t["in.completion_ids"], t["in.completion_mask"], prompt_mask=t["in.prompt_attention_mask"]
    )
    # The stored masks are handed in as the law: what they hide of the prompt is taken from the stored ids.
    hidden = t["rand.mask"][:, :, -c:] & rollout.completion_mask[:, None, :]
    handed = replace(estimator, mask=lambda context, num_masks: (hidden, torch.zeros_like(hidden)))
    context = make_context(rollout, ReplayDraws({}), mask_id, advantages)
    corruption = handed.corrupt(context)
    assert torch.equal(corruption.noised_ids.view(n, settings["num_t"], -1)[:, :, -c:], t["rand.noisy"][:, :, -c:])
    corruption = replace(corruption, noised_ids=t["rand.noisy"].flatten(0, 1))
    network = StoredCalls(t)
    got = estimator.combine(longhand_scores(network, corruption), corruption, context)
    assert torch.equal(got.weight[:, 0], t["in.completion_mask"].sum(1).float())
    _compare(case["name"], got.value[:, 0], t["out.seq_logp"][0], t, network)
    if not settings["use_mask_prompt"]:
        _spg_law_reproduces(estimator, context, t)


def _spg_law_reproduces(estimator: spg.SPGEstimator, context: Any, t: Tensors) -> None:
    """The mask law itself, fed with numbers that stand for the stored masks, gives the stored ids."""
    rollout, stored = context.rollout, t["rand.mask"][:, :, -context.rollout.completion_ids.shape[1] :]
    n, k, c = stored.shape
    length = rollout.completion_mask.sum(1)
    draws: dict[Any, Tensor] = {}
    valid = rollout.completion_mask
    chosen = torch.zeros(n, k, dtype=torch.int64)
    if isinstance(estimator.mask, partial):
        size = estimator.mask.keywords["block_length"]
        block, total = torch.arange(c) // size, c // size
        # the chosen block is the first one with a hidden valid token
        first = torch.where(stored & valid[:, None, :], block, total).amin(2)
        chosen, count = first, (length - 1) // size + 1
        order = torch.zeros(n, total)
        for i in range(n):
            # a permutation of all blocks whose leading entries, modulo the number of real blocks, are the chosen ones
            free = list(range(total))
            lead = []
            for j in range(k):
                pick = next(f for f in free if f % int(count[i]) == int(first[i, j]))
                free.remove(pick)
                lead.append(pick)
            for rank, name in enumerate(lead + free):
                order[i, name] = (rank + 0.5) / total
        draws["block"] = order
    for j in range(k):
        allowed = valid if not isinstance(estimator.mask, partial) else (block == chosen[:, j : j + 1]) & valid
        inside = stored[:, j] & allowed
        draws[("mask_count", j)] = (inside.sum(1) - 0.5) / allowed.sum(1)
        draws[("mask", j)] = keys_for_subset(inside)
    again = estimator.corrupt(replace(context, draws=ReplayDraws(draws)))
    assert torch.equal(again.noised_ids.view(n, k, -1), t["rand.noisy"])


def dmpo(case: Case, t: Tensors) -> None:
    settings = case["settings"]
    n, num_masks = len(t["in.completion_ids"]), settings["repeated_size"]
    estimator = ReplicateEstimator(num_masks, 0.1, settings["loss_antithetic"], score_padding=True)
    draws: dict[Any, Tensor] = {}
    for k in range(num_masks // 2 if settings["loss_antithetic"] else num_masks):
        draws[("mask_ratio", k)] = t["rand.u_lambda"][k * n : (k + 1) * n]
        draws[("mask", k)] = t["rand.u_mask"][k * n : (k + 1) * n]
    network = StoredCalls(t)
    context = make_context(_rollout(t), ReplayDraws(draws), settings["mask_id"])
    corruption = estimator.corrupt(context)
    noised = corruption.noised_ids.view(n, num_masks, -1).transpose(0, 1).flatten(0, 1)
    assert torch.equal(noised, t["call0.input_ids"])
    scores = longhand_scores(network, corruption)
    tokens = (scores * corruption.weight).sum(1)
    assert_near(f"{case['name']} tokens", tokens, t["out.token_logp"][:, -tokens.shape[1] :])
    assert_near(case["name"], estimator.combine(scores, corruption, context).value[:, 0], t["out.seq_logp"])


def left_to_right(case: Case, t: Tensors) -> None:
    settings = case["settings"]
    estimator, network = LeftToRightEstimator(1.0, settings["temperature"]), StoredCalls(t)
    got, corruption = likelihood(estimator, make_context(_rollout(t), ReplayDraws({}), settings["mask_id"]), network)
    n, c = t["in.completion_ids"].shape
    for k in range(c):
        assert torch.equal(corruption.noised_ids.view(n, c, -1)[:, k], t[f"call{k}.input_ids"])
    assert_near(case["name"], got.value, t["out.token_logp"])
    # The reference's loss at a ratio of 1 is -A log p, scaled by gain / length / mean(valid), summed over rows.
    scale = settings["gain"] / c / (t["in.valid_samples"].mean() + 1e-5)
    (-scale * t["out.advantages"][:, None] * got.value).sum().backward()
    assert network.logits.grad is not None
    assert_near(f"{case['name']} gradient", network.logits.grad, network.expected_grad)


def step_merge(case: Case, t: Tensors) -> None:
    settings, c = case["settings"], t["in.completion_ids"].shape[1]
    generated = [t[f"gen{s}.input_ids"][:, -c:] for s in range(settings["steps"])]
    commit = torch.stack([canvas == settings["mask_id"] for canvas in generated]).sum(0) - 1
    network = StoredCalls(t)
    estimator = StepMergeEstimator(settings["N"], temperature=1.0)
    context = make_context(_rollout(t, commit_step=commit), ReplayDraws({}), settings["mask_id"])
    got, corruption = likelihood(estimator, context, network)
    for k in range(settings["N"]):
        views = corruption.view_of[:, k]
        assert torch.equal(corruption.noised_ids[views], t["in.snapshots"][k])
        assert torch.equal(corruption.weight[:, k] > 0, t["in.segment_mask"][k].bool())
    _compare(case["name"], got.value, t["out.token_logp"].sum(0), {**t, "in.cotangent": t["in.cotangent"][0]}, network)


def tracerl(case: Case, t: Tensors) -> None:
    settings, c = case["settings"], t["in.completion_ids"].shape[1]
    network, ids = StoredCalls(t), t["in.completion_ids"]
    noised, scored = t["rand.noisy"], t["rand.score_mask"][:, -c:]
    if settings["method"] == "TraceRL":
        # post_num = k scores the completion and its first k pads; without it, all of them
        pads = (ids == 8).long().cumsum(1)
        keep = torch.ones_like(ids, dtype=torch.bool) if settings["post_num"] is None else pads <= settings["post_num"]
        rollout = make_rollout(t["in.prompt_ids"], ids, keep, commit_step=t["in.step_map"])
        context = make_context(rollout, ReplayDraws({}), settings["mask_id"])
        ours = TraceEstimator(settings["shrink"], temperature=1.0).corrupt(context)
        per_view = ours.weight.flatten(0, 1)[ours.view_of.flatten() >= 0] > 0
        kept = scored.any(1)
        assert torch.equal(ours.noised_ids, noised[kept]) and torch.equal(per_view, scored[kept])
    # the loss over the stored rows, each a rollout of its own: mean of a row's tokens, KL to the OLD policy summed
    clean = ids.repeat_interleave(len(noised) // len(ids), dim=0)
    if settings["method"] != "TraceRL":  # rows of random masks need not be sorted by rollout
        clean = torch.stack([_clean(row, ids, t["in.prompt_ids"], settings["mask_id"]) for row in noised])
    corruption = completion_views(
        make_rollout(noised[:, :-c], clean, scored), noised[:, None, -c:], scored[:, None].float(), noised[:, None, :-c]
    )
    got = token_logprobs(longhand_scores(network, corruption), corruption)
    old = LogProbs(t["in.old_logp"][:, -c:], got.weight)
    inputs = LossInputs(
        got,
        old,
        None,
        t["out.row_advantage"],
        t["out.row_advantage"],
        1,
        scored,
        None,
        float(scored.sum()),
        float(len(noised)),
    )
    kl = {"k1": terms.k1, "k2": terms.k2, "k3": terms.k3}[settings["kl"]]
    loss, _ = ClippedPolicyLoss(settings["eps"], settings["eps"], 0.0, kl, terms.sequence_mean)(inputs)
    loss = loss + settings["beta"] * terms.sequence_sum(kl(terms.log_ratio(got, old)), got.weight, inputs)
    assert_near(case["name"], loss, t["out.loss"])
    loss.backward()
    assert network.logits.grad is not None
    assert_near(f"{case['name']} gradient", network.logits.grad, network.expected_grad)


def _clean(noised: Tensor, ids: Tensor, prompts: Tensor, mask_id: int) -> Tensor:
    """The completion a noised row was made from: same prompt, and equal wherever it shows a token."""
    shown = noised != mask_id
    for whole in torch.cat([prompts, ids], dim=1):
        if bool((whole == noised)[shown].all()):
            return whole[-ids.shape[1] :]
    raise AssertionError("no completion fits this row")


def drift(case: Case, t: Tensors) -> None:
    if case["settings"]["strategy"] == "sequential_masking":
        _drift_views(case, t)
    _drift_losses(case, t)


def _drift_views(case: Case, t: Tensors) -> None:
    settings, n = case["settings"], len(t["in.completion_ids"])
    logprobs, step = t["in.token_probs"].log(), t["in.step_map"]
    rollout = _rollout(t, commit_step=step, sampled_logprobs=logprobs)
    wanted, num_steps = t["out.step_ids"], int(step.max()) + 1
    context = make_context(rollout, ReplayDraws({}), settings["mask_id"])
    corruption = segment_views(context, step, wanted, score_all_hidden=True)
    hidden = t["rand.should_mask"].bool()
    assert torch.equal(corruption.weight > 0, hidden & rollout.completion_mask[:, None, :])
    # the law: the stored steps are drawn where their Gumbel keys are the largest
    uniform = torch.full((n, num_steps), 1e-30)
    uniform.scatter_(1, wanted, 0.999999)
    estimator = SurprisalStepsEstimator(wanted.shape[1], 1.0, settings["low_prob_threshold"])
    context = make_context(rollout, ReplayDraws({"step": uniform}), settings["mask_id"])
    drawn = estimator.corrupt(context)
    for i in range(n):
        shown = {tuple(row) for row in drawn.noised_ids[drawn.view_of[i][drawn.view_of[i] >= 0]].tolist()}
        expected = {tuple(corruption.noised_ids[v].tolist()) for v in corruption.view_of[i] if v >= 0}
        assert shown == expected
    # which tokens the estimator calls a step's own
    own = estimator.combine(torch.zeros_like(drawn.weight), drawn, context).parts["of_step"].view_as(drawn.weight) > 0
    chosen = torch.where(drawn.weight > 0, step[:, None], num_steps).amin(2, keepdim=True)
    assert torch.equal(own, (step[:, None] == chosen) & rollout.completion_mask[:, None])


def _drift_losses(case: Case, t: Tensors) -> None:
    """PPO and REINFORCE on the stored views: all hidden tokens, less the unlikely ones of later steps."""
    settings, (n, c) = case["settings"], t["in.completion_ids"].shape
    num_views, hidden = t["out.step_ids"].shape[1], t["rand.should_mask"].bool()
    rollout = _rollout(t)
    weight = (hidden & rollout.completion_mask[:, None]).float()
    noised = torch.where(hidden, settings["mask_id"], rollout.completion_ids[:, None])
    corruption = completion_views(rollout, noised, weight)
    parts = {"of_step": t["out.current_pos"].float().flatten(1)}
    clipped = ClippedPolicyLoss(settings["epsilon_low"], settings["epsilon_high"], 0.02, terms.k3, terms.view_mean)
    plain = ReinforceLoss(terms.micro_batch_view_token_mean)
    reference = longhand_scores(StoredCalls(t, "ppo_ref"), corruption).detach().flatten(1)
    for name, loss in (("ppo", clipped), ("reinforce", plain)):
        network = StoredCalls(t, f"{name}_call")
        scores = longhand_scores(network, corruption).flatten(1)
        units = weight.flatten(1)
        old = LogProbs(t["in.old_logp"].transpose(0, 1).flatten(1), units) if loss.traits.needs_old else None
        ref = LogProbs(reference, units) if loss.traits.needs_reference else None
        inputs = LossInputs(
            LogProbs(scores, units, parts), old, ref, t["in.advantages"], t["in.advantages"], 1,
            rollout.completion_mask, None, float(units.sum()), float(n),
        )  # fmt: skip
        value, _ = LikelyTokenFilter(loss, settings["low_prob_threshold"])(inputs)
        assert_near(f"{case['name']} {name}", value, t[f"out.{name}_loss"])
        value.backward()
        assert network.logits.grad is not None
        assert_near(f"{case['name']} {name} gradient", network.logits.grad, network.expected_grad)
    assert scores.shape[1] == num_views * c


def tree_edge(case: Case, t: Tensors) -> None:
    mask_id, eos = case["settings"]["mask_id"], case["settings"]["eos_id"]
    c = t["in.old_logp"].shape[1]
    parent, child = t["in.parent_ids"][:, -c:], t["in.child_ids"][:, -c:]
    # an edge is one segment of a trajectory: shown by the parent, decoded on the edge, decoded later
    segment = torch.where(parent != mask_id, 0, torch.where(child != mask_id, 1, 2))
    ends = (child == eos).long().cumsum(1)
    valid = (ends - (child == eos).long() == 0) & (child != mask_id)
    rollout = make_rollout(t["in.parent_ids"][:, :-c], child, valid, commit_step=segment)
    context = make_context(rollout, ReplayDraws({}), mask_id)
    corruption = segment_views(context, segment, torch.ones(len(child), 1, dtype=torch.int64))
    network = StoredCalls({k: v for k, v in t.items() if k.startswith("call0")})
    scores = longhand_scores(network, corruption).sum(1)
    assert_near(case["name"], scores, t["out.edge_logp"])
    _tree_loss(case, t, network, scores, corruption.weight.sum(1))
    up_to_end = ends - (child == eos).long() == 0
    _tree_parts(case, t, replace(rollout, group_size=2, edge=segment - 1, completion_mask=up_to_end))


def _tree_parts(case: Case, t: Tensors, rollout: Rollout) -> None:
    """The same by the parts that train: each pair of children is a tree of one level below its parent."""
    s, pair = case["settings"], Tree(2, 1)
    context = make_context(rollout, ReplayDraws({}), s["mask_id"], t["in.advantages"])
    # policy term and distillation read the parents off one pass, so their gradients add up: the stored calls do too
    network = StoredCalls(t)
    got, corruption = likelihood(TreeEdgesEstimator(pair, 1.0), context, network)
    assert len(corruption.noised_ids) == 2  # one view a parent
    assert_near(f"{case['name']} estimator", got.value, t["out.edge_logp"])
    old, ref = (LogProbs(t[f"in.{name}_logp"], got.weight) for name in ("old", "ref"))
    inputs = LossInputs(
        got, old, ref, t["in.advantages"], t["in.advantages"], 2, rollout.completion_mask, None,
        float(got.weight.sum()), float(len(got.value)), progress=s["global_step"] / s["max_steps"],
    )  # fmt: skip
    clipped = ClippedPolicyLoss(s["epsilon"], s["epsilon"], s["beta"], terms.k3, terms.sequence_sum)
    numbers = (s["lambda_max"], float(s["gamma"]), float(s["tau_max"]), s["beta_tau"])
    loss, _ = tree.WithSiblingDistillation(clipped, pair, *numbers)(inputs)
    assert_near(f"{case['name']} loss of the parts", loss, t["out.loss"])
    loss.backward()
    assert network.logits.grad is not None
    assert_near("gradient of the parts", network.logits.grad, network.expected_grad)


def _tree_loss(case: Case, t: Tensors, network: StoredCalls, scores: Tensor, weight: Tensor) -> None:
    """The clipped loss on edges with its KL, and the self-distillation towards the better siblings."""
    s, n = case["settings"], len(scores)
    inputs = LossInputs(
        LogProbs(scores, weight), LogProbs(t["in.old_logp"], weight), LogProbs(t["in.ref_logp"], weight),
        t["in.advantages"], t["in.advantages"], 2, weight > 0, None, float(weight.sum()), float(n),
    )  # fmt: skip
    loss, _ = ClippedPolicyLoss(s["epsilon"], s["epsilon"], s["beta"], terms.k3, terms.sequence_mean)(inputs)
    groups = t["in.group_ids"]
    size = int((groups == groups[0]).sum())
    assert torch.equal(groups, groups[0] + torch.arange(n) // size)
    progress = s["global_step"] / s["max_steps"]
    child = t["in.child_ids"][:, -scores.shape[1] :]
    # the parents go through the network once more there: one row a group
    parents = StoredCalls({k.replace("call1", "call0"): v for k, v in t.items() if k.startswith("call1")})
    logits = parents(t["in.parent_ids"][::size])[:, -child.shape[1] :].repeat_interleave(size, 0)
    again = torch.log_softmax(logits, -1).gather(2, child[..., None])[..., 0]
    loss = loss + tree.distillation_weight(progress, s["lambda_max"], float(s["gamma"])) * tree.sibling_distillation(
        again, child, weight > 0, t["in.advantages"], size,
        tree.distillation_temperature(progress, float(s["tau_max"]), s["beta_tau"]),
    )  # fmt: skip
    assert_near(f"{case['name']} loss", loss, t["out.loss"])
    loss.backward()
    assert network.logits.grad is not None and parents.logits.grad is not None
    assert_near("gradient of the edges", network.logits.grad, network.expected_grad)
    assert_near("gradient of the parents", parents.logits.grad, parents.expected_grad)


def dare_masks(case: Case, t: Tensors) -> None:
    mask_id = case["settings"]["mask_id"]
    valid = t["in.attention_mask"].bool()
    start, stop = int(valid.nonzero()[0]), int(valid.nonzero()[-1]) + 1
    length = int(t["rand.1_randperm"].numel()) if "rand.1_randperm" in t else None
    if "ebpo" in case["name"] or "coupled" in case["name"] or "d1" in case["name"]:
        _dare_ports(case, t, valid)
        return
    assert length is not None
    ids, masks = t["in.batch"], t["out.mask"]
    prompt, completion = ids[:, : stop - length], ids[:, stop - length :]
    mark = torch.zeros_like(completion, dtype=torch.bool)
    mark[:, :length] = True
    prompt_mask = torch.zeros_like(prompt, dtype=torch.bool)
    prompt_mask[:, start:] = True
    n, hidden = len(ids), masks[:, stop - length :]
    begin = float(t["rand.0_randint"])
    if "espo" in case["name"]:  # four rows of one group, sizes 0 .. length
        rollout = make_rollout(prompt, completion, mark, group_size=n, prompt_mask=prompt_mask)
        draws = {"mask_count": torch.full((n,), (begin + 0.5) / (length + 1)), "mask": keys_for_subset(hidden)}
        context = make_context(rollout, ReplayDraws(draws), mask_id)
        noised = ESPOEstimator(1, complement=False, score_padding=False, round_sums=True).corrupt(context)
        shown = torch.where(noised.view_of >= 0, noised.view_of, 0)
        assert torch.equal(noised.noised_ids[shown[:, 0]], t["out.noisy"])
        return
    # the rows are the strata: one rollout seen under four masks
    rollout = make_rollout(prompt[:1], completion[:1], mark[:1], prompt_mask=prompt_mask[:1])
    values: dict[Any, Tensor] = {("mask", k): keys_for_subset(hidden[k : k + 1]) for k in range(n)}
    values["mask_count"] = torch.tensor([(begin - 0.5) / length])
    context = make_context(rollout, ReplayDraws(values), mask_id)
    estimator = MaskwiseELBOEstimator(n, False, True) if "bgpo" in case["name"] else ELBOEstimator(n, False, True)
    corruption = estimator.corrupt(context)
    assert torch.equal(corruption.noised_ids, t["out.noisy"])
    share = hidden.sum(1) / length
    assert_near(case["name"], share, t["out.p_mask"][:, -1])
    per_mask = corruption.weight[0].amax(1) * (1 if "bgpo" in case["name"] else n)
    assert_near(f"{case['name']} weight", per_mask, 1 / share)


def _dare_ports(case: Case, t: Tensors, valid: Tensor) -> None:
    """Ports that mask otherwise than the authors' own code: d1 (nothing past the end), coupled (pads too), EBPO."""
    mask_id, prompt_length, n = case["settings"]["mask_id"], 4, len(t["in.batch"])
    prompts, completions = t["in.batch"][:, :prompt_length], t["in.batch"][:, prompt_length:]
    prompt_mask = valid[:prompt_length].expand(n, -1)
    mark = valid[prompt_length:].expand(n, -1)
    rollout = make_rollout(prompts, completions, mark, prompt_mask=prompt_mask)
    c = completions.shape[1]
    if "d1" in case["name"]:
        prob = case["settings"]["p"]
        draws = ReplayDraws({"prompt_mask": t["rand.0_rand"].flip(1)})
        context = make_context(rollout, draws, mask_id)
        corruption = OneStepEstimator(prob, 1, share_within_group=False).corrupt(context)
        # the authors' code hides what stands past the end as well; the port shows it, and neither scores it
        noised = torch.where(mark, corruption.noised_ids[:, prompt_length:], completions)
        assert torch.equal(torch.cat([corruption.noised_ids[:, :prompt_length], noised], 1), t["out.noisy"])
        return
    if "coupled" in case["name"]:
        ratio = float(t["out.p_mask"][n : 2 * n].max())
        draws = ReplayDraws({"mask_ratio": torch.full((n,), (ratio - 0.2) / 0.6), "mask": t["rand.0_rand"][:, -c:]})
        everything = make_rollout(prompts, completions, prompt_mask=prompt_mask)
        corruption = CoupledEstimator(0.2, 0.8).corrupt(make_context(everything, draws, mask_id))
        noised = torch.cat([corruption.noised_ids[:n], corruption.noised_ids[n::2], corruption.noised_ids[n + 1 :: 2]])
        pads = ~prompt_mask.repeat(3, 1)  # the port masks left padding by the same numbers
        uniform = t["rand.0_rand"][:, :prompt_length]
        hidden = torch.cat([torch.ones_like(uniform).bool(), uniform < ratio, uniform > ratio]) & pads
        noised[:, :prompt_length] = torch.where(hidden, mask_id, noised[:, :prompt_length])
        assert torch.equal(noised, t["out.noisy"])
        return
    # rows are the noise levels of one completion; the port counts blocks from the first real prompt token or not
    from_prompt = case["settings"].get("block_origin") != "response"
    first = int(prompt_mask[0].sum()) if from_prompt else 0
    levels = int(mark[0].sum()), case["settings"]["block_length"]
    block = (first + torch.arange(levels[0])) // levels[1]
    block = block - block[0]
    num_blocks = int(block.max()) + 1
    permutations = [t[key] for key in sorted((k for k in t if "randperm" in k), key=lambda k: int(k[5:].split("_")[0]))]
    keys = torch.zeros(n, c)
    for number, order in enumerate(permutations):
        row, which = divmod(number, num_blocks)
        places = (block == which).nonzero()[:, 0]
        keys[row, places[order]] = (torch.arange(len(order)) + 0.5) / (len(order) + 1)
    values: dict[Any, Tensor] = {("mask", k): keys[k : k + 1] for k in range(n)}
    values["block_time"] = t["rand.0_rand"].reshape(1)
    one = make_rollout(prompts[:1], completions[:1], mark[:1], prompt_mask=prompt_mask[:1])
    estimator = BlockELBOEstimator(n, levels[1], from_prompt, two_stream=False)
    corruption = estimator.corrupt(make_context(one, ReplayDraws(values), mask_id))
    assert torch.equal(corruption.noised_ids, t["out.noisy"])
    weight = corruption.weight[0] * n
    assert_near(case["name"], torch.where(weight > 0, 1 / weight.clamp(min=1e-9), 0.0), t["out.p_mask"][:, -c:])


def composite_and_replay(case: Case, t: Tensors) -> None:
    trajectory, valid = t["in.cj_trajectory"].bool(), t["in.cj_response_mask"].bool()
    step = torch.where(trajectory.any(1), trajectory.long().argmax(1), torch.iinfo(torch.int64).max)
    n, num_steps, c = trajectory.shape
    rollout = make_rollout(torch.zeros(n, 1, dtype=torch.int64), torch.arange(c).expand(n, -1), valid)
    context = make_context(rollout, ReplayDraws({}), c + 1)
    corruption = segment_views(context, step, torch.arange(num_steps).expand(n, -1))
    estimator = TraceEstimator(shrink=1, temperature=1.0)
    got: LogProbs = estimator.combine(t["in.cj_step_logp"] * (corruption.weight > 0), corruption, context)
    assert_near("replayed tokens", got.value, t["out.cj_token_logp"])
    # EBPO: what each noise level says, summed over its blocks, then the mean or a weighted sum over levels
    contributions = torch.where(t["in.mask"], t["in.contrib"], 0.0)
    levels = contributions.shape[1]
    views = completion_views(
        make_rollout(torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, c, dtype=torch.int64)),
        torch.zeros(n, levels, c, dtype=torch.int64),
        torch.full((n, levels, c), 1 / levels),
    )
    assert_near("EBPO mean", sequence_logprobs(contributions, views).value[:, 0], t["out.mean"])
    weighted = replace(views, weight=t["in.weights"][:, None].expand(n, levels, c))
    assert_near("EBPO weighted", sequence_logprobs(contributions, weighted).value[:, 0], t["out.weighted"])


def quadrature(case: Case, t: Tensors) -> None:
    for num_nodes in sorted(int(k.removeprefix("out.nodes_N")) for k in t if k.startswith("out.nodes_N")):
        nodes, weights = gauss_legendre(num_nodes)
        assert_near(f"nodes {num_nodes}", nodes, t[f"out.nodes_N{num_nodes}"], rtol=1e-12, atol=1e-13)
        assert_near(f"weights {num_nodes}", weights, t[f"out.weights_N{num_nodes}"], rtol=1e-12, atol=1e-13)
    for num_nodes in sorted(int(k.removeprefix("out.elbo_N")) for k in t if k.startswith("out.elbo_N")):
        masks = torch.stack([t[f"rand.N{num_nodes}_mask{k}"] for k in range(num_nodes)])
        nodes, _ = gauss_legendre(num_nodes)
        draws = {("mask", k): uniform_below(masks[k], float(nodes[k])) for k in range(num_nodes)}
        # the stored masks reach past the end, where nothing is scored
        estimator, network = QuadratureEstimator(num_nodes, score_padding=True), StoredCalls(t, f"N{num_nodes}_call")
        context = make_context(_rollout(t), ReplayDraws(draws), case["settings"]["mask_id"])
        corruption = estimator.corrupt(context)
        corruption = replace(corruption, weight=corruption.weight * context.rollout.completion_mask[:, None])
        got = estimator.combine(longhand_scores(network, corruption), corruption, context)
        assert_near(f"ELBO with {num_nodes} nodes", got.value[:, 0], t[f"out.elbo_N{num_nodes}"])
        got.value.sum().backward()
        assert network.logits.grad is not None
        assert_near(f"gradient with {num_nodes} nodes", network.logits.grad, network.expected_grad)


FAMILIES: dict[str, Callable[[Case, Tensors], None]] = {
    "d1_mean_field": one_step,
    "wd1_loglikelihood": one_step,
    "coupled_grpo": coupled,
    "espo_elbo": espo,
    "dare_espo_elbo": espo_padding_aware,
    "gdsd": pair_score,
    "llada_mc": llada_likelihood,
    "spg": spg_bounds,
    "dmpo": dmpo,
    "justgrpo": left_to_right,
    "d2_stepmerge": step_merge,
    "tracerl": tracerl,
    "drift": drift,
    "dtreerpo": tree_edge,
    "dare_ebpo_composite": composite_and_replay,
    "dare": dare_masks,
    "gdpo": quadrature,
}
"""A case belongs to the longest prefix that fits its name."""

CASES = [(case, seed) for case in method_cases("2_estimators") for seed in case["seeds"]]


@needs_golden
@pytest.mark.parametrize(("case", "seed"), CASES, ids=[f"{case['name']}-seed{seed}" for case, seed in CASES])
def test_estimator_equals_the_reference(case: Case, seed: int) -> None:
    fitting = [prefix for prefix in FAMILIES if case["name"].startswith(prefix)]
    assert fitting, f"no counterpart of {case['name']}: {case['meaning'][:80]}"
    FAMILIES[max(fitting, key=len)](case, method_tensors(case, seed))


@needs_golden
def test_every_case_of_the_manifest_is_met() -> None:
    assert len(CASES) >= len(method_cases("2_estimators")) > 0


# ---------------------------------------------------------------------------------------- d1 and LLaDA, with a network


def _policy(entry: Case) -> Policy:
    return Policy(load_network(str(d1_model_folder(entry))), attend_padding=True)


def _one_step_through_the_network(
    entry: Case, prompts: Tensor, completions: Tensor, masks: Tensor, guidance: float = 0.0, padded: bool = False
) -> Tensor:
    """Log-probs of every inner update, the stored masks replayed through `corrupt`."""
    policy, prob, values = _policy(entry), 0.5, []
    for mask in masks:
        draws = ReplayDraws({"prompt_mask": uniform_below(mask[:, : prompts.shape[1]], prob).flip(1)})
        estimator = OneStepEstimator(prob, 1, share_within_group=False, mask_padding=padded, guidance=guidance)
        context = make_context(make_rollout(prompts, completions), draws, policy.mask_token_id)
        corruption = estimator.corrupt(context)
        assert torch.equal(
            corruption.noised_ids, torch.where(mask, policy.mask_token_id, torch.cat([prompts, completions], dim=1))
        )
        scores = score(policy, context.rollout, corruption)
        values.append(estimator.combine(scores.logprobs, corruption, context).value)
    return torch.stack(values)


@needs_golden
@pytest.mark.parametrize("entry", d1_entries("D_estimator"), ids=entry_id)
@torch.no_grad()
def test_one_step_estimator_equals_d1(entry: Case) -> None:
    t = d1_tensors(entry)
    for case in entry["settings"]["cases"]:
        sequences, mask, expected = (t[f"{case['case']}.{name}"] for name in ("sequences", "mask", "logps"))
        length = case["prompt_length"]
        got = _one_step_through_the_network(
            entry, sequences[:, :length], sequences[:, length:], mask, case["cfg_scale"], padded=True
        )
        assert_near(f"{entry_id(entry)} {case['case']}", got, expected, **entry["tolerance"])


@needs_golden
@pytest.mark.parametrize("entry", d1_entries("E2_rollout"), ids=entry_id)
@torch.no_grad()
def test_rollout_bookkeeping_equals_d1(entry: Case) -> None:
    t = d1_tensors(entry)
    for case in entry["settings"]["cases"]:
        part = {key.removeprefix(f"{case['case']}."): v for key, v in t.items() if key.startswith(f"{case['case']}.")}
        rewards = RewardBatch(part["rewards"][:, None], torch.ones(len(part["rewards"]), 1).bool(), torch.ones(1))
        assert_near(f"{case['case']} advantages", group_mean(rewards, case["num_generations"]), part["advantages"])
        got = _one_step_through_the_network(
            entry, part["prompt_ids"], part["completion_ids"], part["mask"], padded=True
        )
        assert_near(f"{entry_id(entry)} {case['case']}", got, part["old_logps"], **entry["tolerance"]["logps"])
        if "ref_logps" in part:
            assert_near(f"{case['case']} reference", got, part["ref_logps"], **entry["tolerance"]["logps"])


@needs_golden
@pytest.mark.parametrize("entry", d1_entries("G_log_likelihood"), ids=entry_id)
@torch.no_grad()
def test_likelihood_bound_equals_llada(entry: Case) -> None:
    t, policy = d1_tensors(entry), _policy(entry)
    for case in entry["settings"]["cases"]:
        part = {key.removeprefix(f"{case['case']}."): v for key, v in t.items() if key.startswith(f"{case['case']}.")}
        c, per_batch = len(part["answer"]), case["batch_size"]
        rollout, values = make_rollout(part["prompt"][None], part["answer"][None]), []
        for mask, counts in zip(part["mask"], part["masked_counts"], strict=True):
            hidden = mask[:, -c:]
            draws: dict[Any, Tensor] = {("mask", k): keys_for_subset(hidden[k : k + 1]) for k in range(per_batch)}
            draws["mask_count"] = (counts[:1] - 0.5) / c
            estimator = ELBOEstimator(per_batch, score_padding=True, round_sums=True)
            context = make_context(rollout, ReplayDraws(draws), policy.mask_token_id)
            corruption = replace(estimator.corrupt(context), guidance=case["cfg_scale"])
            clean = torch.cat([part["prompt"], part["answer"]])
            assert torch.equal(corruption.noised_ids, torch.where(mask, policy.mask_token_id, clean))
            scores = score(policy, rollout, corruption)
            values.append(estimator.combine(scores.logprobs, corruption, context).value[0, 0])
        got = torch.stack(values)
        assert_near(f"{case['case']} batches", got, part["per_batch_values"], **entry["tolerance"])
        assert_near(f"{entry_id(entry)} {case['case']}", got.mean(), part["value"].reshape(()), **entry["tolerance"])
