"""Advantages and policy losses against the reference implementations: values and gradients at the tolerance.

Cases are discovered from the manifests; a case without a counterpart fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from d1lit import advantages as adv
from d1lit.app.composing import CONF
from d1lit.draws import CounterDraws
from d1lit.estimators.predicted_steps import PredictedStepsEstimator
from d1lit.losses import ClippedPolicyLoss, SequenceClippedLoss, terms
from d1lit.losses.filters import OffPolicyFilter, TopEntropyLoss
from d1lit.losses.policy_gradient import (
    CISPOLoss,
    MaskwiseBoundLoss,
    ReinforceLoss,
    SoftGateLoss,
    StableDRLLoss,
    VESPOLoss,
)
from d1lit.losses.weighted import (
    DDOLoss,
    DMPOLoss,
    GDSDLoss,
    PreferenceLoss,
    WD1Loss,
    Weights,
    dmpo_weights,
    importance_centering,
    mean_centering,
    negative_centering,
    no_centering,
)
from d1lit.types import Context, LogProbs, LossInputs, RewardBatch, Rollout, Tree
from tests.golden.reading import d1_entries, d1_tensors, method_cases, method_tensors, needs_golden
from tests.golden.replay import StoredCalls, assert_near, completion_corruption, longhand_scores

Case = dict[str, Any]
Tensors = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------- advantages


def _single(rewards: Tensor) -> RewardBatch:
    return RewardBatch(rewards[:, None], torch.ones(len(rewards), 1, dtype=torch.bool), torch.ones(1))


def trl_advantages(case: Case, t: Tensors) -> None:
    settings, size = case["settings"], case["settings"]["group_size"]
    batch = RewardBatch(t["in.rewards_per_func"], t["in.reward_valid"], t["in.weights"])
    choice = (settings["scale_rewards"], settings["multi_objective_aggregation"])
    function = {
        ("group", "sum_then_normalize"): adv.group_zscore,
        ("none", "sum_then_normalize"): adv.group_mean,
        ("batch", "sum_then_normalize"): adv.group_mean_batch_std,
        ("group", "normalize_then_sum"): adv.normalize_then_sum,
    }[choice]
    assert_near(case["name"], function(batch, size), t["out.advantages"])
    if choice[0] != "batch" and choice[1] == "sum_then_normalize":
        spread = adv.has_spread(batch, size).repeat_interleave(size)
        judged = t["in.reward_valid"].any(1)
        assert torch.equal(~spread[judged], t["out.is_std_zero"][judged])


def group_advantages(function: Callable[..., Tensor]) -> Callable[[Case, Tensors], None]:
    def check(case: Case, t: Tensors) -> None:
        got = function(_single(t["in.rewards"]), case["settings"]["group_size"])
        assert_near(case["name"], got, t["out.advantages"])

    return check


def strided_advantages(case: Case, t: Tensors) -> None:
    size = case["settings"]["group_size"]  # members of a group stand num_prompts apart there, side by side here
    rewards = t["in.rewards"].view(size, -1).T.reshape(-1)
    got = adv.group_zscore(_single(rewards), size).view(-1, size).T.reshape(-1)
    assert_near(case["name"], got, t["out.advantages"])


def rloo_advantages(case: Case, t: Tensors) -> None:
    settings = case["settings"]
    kl = ((t["in.old_logp"] - t["in.ref_logp"]) * t["in.completion_mask"]).sum(1)
    got = adv.leave_one_out(_single(t["in.rewards"] - settings["beta"] * kl), settings["group_size"])
    if settings["normalize_advantages"]:
        got = adv.whiten(got)
    assert_near(case["name"], got, t["out.advantages"])


def verl_advantages(case: Case, t: Tensors) -> None:
    index = t["in.group_index"]
    size = int((index == index[0]).sum())
    order = index.argsort(stable=True)
    function = {"adv_verl_grpo": partial(adv.group_zscore, eps=1e-6), "adv_verl_rloo": adv.leave_one_out}.get(
        case["name"], adv.group_mean
    )
    got = torch.empty_like(t["in.rewards"])
    got[order] = function(_single(t["in.rewards"][order]), size)
    if "reinforce_plus_plus" in case["name"]:
        assert_near(case["name"], adv.token_whitened(got, t["in.response_mask"].bool()), t["out.advantages"])
        return
    assert_near(case["name"], got[:, None] * t["in.response_mask"], t["out.advantages"])


def mdpo_advantages(case: Case, t: Tensors) -> None:
    value = t["in.step_rewards"][:, :, None]
    rewards = RewardBatch(value, torch.ones_like(value, dtype=torch.bool), torch.ones(1))
    got = adv.StepAdvantage(eps=case["settings"]["eps"])(rewards, len(value))
    assert_near(case["name"], got, t["out.advantages"])


def tree_advantages(case: Case, t: Tensors) -> None:
    leaf = t["in.leaf_rewards"].permute(2, 0, 1)  # [prompt, inner, leaf]
    num_prompts, num_inner, width = leaf.shape
    assert num_inner == width  # a tree of equal branches
    assert_near("inner values", leaf.mean(-1).T, t["out.inner_value"])
    assert_near("root values", leaf.mean((1, 2)), t["out.root_value"])
    total = leaf.flatten()
    edges = adv.TreeAdvantage(Tree(width, 2))(_single(total), width * width).view(num_prompts, width, width, 2)
    assert_near("inner advantages", edges[:, :, 0, 0].T, t["out.inner_adv"])
    assert_near("leaf advantages", edges[..., 1].permute(1, 2, 0), t["out.leaf_adv"])


# --------------------------------------------------------------------------------------------------------- token losses


def token_inputs(t: Tensors, **changes: Any) -> tuple[LossInputs, Tensor]:
    logp = t["in.logp"].clone().requires_grad_()
    mask = t["in.completion_mask"].bool()
    weight = mask.to(logp.dtype)
    entropy = t.get("in.entropies")
    values: dict[str, Any] = {
        "logprobs": LogProbs(logp, weight),
        "old": LogProbs(t["in.old_logp"], weight) if "in.old_logp" in t else None,
        "ref": LogProbs(t["in.ref_logp"], weight) if "in.ref_logp" in t else None,
        "advantages": t["in.advantages"],
        "rewards": t["in.advantages"],
        "group_size": len(logp),
        "completion_mask": mask,
        "entropy": entropy,
        "num_units": float(mask.sum()),
        "num_rollouts": float(len(logp)),
    }
    return LossInputs(**{**values, **changes}), logp


def _check(case: Case, loss: Any, inputs: LossInputs, leaf: Tensor, expected: Tensor, gradient: Tensor) -> dict:
    value, metrics = loss(inputs)
    assert_near(case["name"], value, expected.reshape(()))
    value.backward()
    assert leaf.grad is not None
    assert_near(f"{case['name']} gradient", leaf.grad, gradient)
    return metrics


def trl_loss(case: Case, t: Tensors) -> None:
    s = case["settings"]
    kind, low, high, beta = s["loss_type"], s["epsilon_low"], s["epsilon_high"], s["beta"]
    aggregate = {
        "grpo": terms.sequence_mean,
        "sapo": terms.sequence_mean,
        "bnpo": terms.micro_batch_token_mean,
        "dr_grpo": partial(terms.constant_length, length=s["max_completion_length"]),
        "dapo": terms.token_mean,
        "cispo": terms.token_mean,
    }.get(kind)
    if kind == "vespo":
        _vespo(case, t)
        return
    if kind == "luspo" or s["importance_sampling_level"] == "sequence":
        row_weight = terms.num_completion_tokens if kind == "luspo" else None
        loss: Any = SequenceClippedLoss(low, high, beta, terms.k3, terms.num_completion_tokens, row_weight)
    elif kind == "cispo":
        loss = CISPOLoss(high, beta, terms.k3, aggregate)
    elif kind == "sapo":
        loss = SoftGateLoss(1.0, 1.05, aggregate)
    else:
        loss = ClippedPolicyLoss(
            low, high, beta, terms.k3, aggregate, ratio_cap=s.get("delta"), weigh_kl=bool(s.get("bias"))
        )
    if "q" in s:
        loss = TopEntropyLoss(loss, share=s["q"])
    if "opm" in s:
        loss = OffPolicyFilter(loss, threshold=s["opm"])
    inputs, leaf = token_inputs(t, num_units=float(t["in.num_items_in_batch"]))
    if kind not in ("dapo", "cispo"):
        inputs, leaf = token_inputs(t)
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


def _vespo(case: Case, t: Tensors) -> None:
    """The stored gradient runs through the weight too: it was made without TRL's no_grad decorator around it."""
    loss = VESPOLoss(2.0, 3.0, 3.0, 2.0, terms.token_mean, through_weight=True)  # TRL's defaults
    inputs, leaf = token_inputs(t, num_units=float(t["in.num_items_in_batch"]))
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


def trl_rloo(case: Case, t: Tensors) -> None:
    epsilon = case["settings"]["epsilon"]
    inputs, leaf = token_inputs(t)
    loss = SequenceClippedLoss(epsilon, epsilon, 0.0, terms.k3, terms.unit_length)
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


def d1_loss(case: Case, t: Tensors) -> None:
    s = case["settings"]
    inputs, leaf = token_inputs(t)
    loss = ClippedPolicyLoss(s["epsilon"], s["epsilon"], s["beta"], terms.k3, terms.token_mean)
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


def step_merge_loss(case: Case, t: Tensors) -> None:
    s = case["settings"]
    inputs, leaf = token_inputs(t)
    weight = inputs.logprobs.weight * t["in.segment_mask"] * s["N"]
    inputs, leaf = token_inputs(t, logprobs=LogProbs(leaf, weight))
    leaf = inputs.logprobs.value
    loss = ClippedPolicyLoss(s["epsilon"], s["epsilon"], s["beta"], terms.k3, terms.token_mean)
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


def mdpo_loss(case: Case, t: Tensors) -> None:
    """Through the estimator: one step, whose canvas hides the stored tokens and whose proposals were so confident."""
    s, masked = case["settings"], t["in.masked"]
    n = len(masked)
    ids, prompt, mask = torch.zeros_like(masked, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.int64), 9
    everywhere, zeros = torch.ones_like(masked), torch.zeros(masked.shape)
    rollout = Rollout(
        *(prompt, prompt == 0, ids, everywhere, torch.arange(n), n, ids, zeros, zeros, zeros),
        trace=ids[None],
        predictions=torch.where(masked, 0, -1)[None],
        prediction_logprobs=t["in.confidence"].log()[None],
    )
    estimator = PredictedStepsEstimator(num_steps=1, temperature=1.0)
    context = Context(rollout, t["in.advantages"][:, None], 0, 1, mask, CounterDraws(0))
    corruption = estimator.corrupt(context)
    assert torch.equal(corruption.noised_ids[:, 1:] == mask, masked)
    leaf = t["in.logp"].clone().requires_grad_()
    logprobs = estimator.combine(leaf[:, None], corruption, context)
    # In the stored case a process holds six rollouts and divides by the masked tokens of all; in the script it holds one.
    share = (masked.sum(1, keepdim=True) + 1e-4) / (masked.sum() + 1e-4)
    inputs, _ = token_inputs(
        t,
        logprobs=replace(logprobs, weight=logprobs.weight * share),
        advantages=adv.on_units(context.advantages, logprobs),
        num_rollouts=1.0,
    )
    config = OmegaConf.load(CONF / "loss" / "mdpo.yaml")
    assert (config.epsilon_low, config.epsilon_high) == (s["epsilon"], s["epsilon"])
    loss = instantiate(config, beta=s["beta"])
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


def wd1(case: Case, t: Tensors) -> None:
    inputs, leaf = token_inputs(t)
    loss = WD1Loss(psi=1.0, positive_only="positive" in case["name"])
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])


_DARE_AGGREGATE = {
    "token-mean": terms.token_mean,
    "seq-mean-token-sum": terms.sequence_sum,
    "seq-mean-token-mean": terms.sequence_mean,
    "seq-mean-token-sum-norm": terms.constant_length,
}


def dare_loss(case: Case, t: Tensors) -> None:
    s = case["settings"]
    low, high = s.get("cliprange_low", s.get("cliprange")), s.get("cliprange_high", s.get("cliprange"))
    aggregate = _DARE_AGGREGATE[s["loss_agg_mode"]]
    inputs, leaf = token_inputs(t)
    if s["loss_agg_mode"].endswith("norm"):  # a sum over rows there, a mean here
        inputs, leaf = token_inputs(t, num_rollouts=1.0)
    if "bgpo" in case["name"]:
        loss: Any = MaskwiseBoundLoss(low, high, aggregate, dual_clip=s.get("clip_ratio_c", 3.0))
    elif "espo" in case["name"]:
        loss = SequenceClippedLoss(
            low, high, 0.0, terms.k3, terms.num_completion_tokens
        )  # rows, whatever the mode's name
    else:
        loss = ClippedPolicyLoss(low, high, 0.0, terms.k3, aggregate, dual_clip=s.get("clip_ratio_c", 3.0))
    metrics = _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_logp"])
    if "clip_fraction" in metrics:
        assert_near("clip fraction", metrics["clip_fraction"], t["out.clipfrac"])


# ------------------------------------------------------------------------------------------------------ sequence losses


def sequence_inputs(value: Tensor, t: Tensors, **changes: Any) -> tuple[LossInputs, Tensor]:
    leaf = value.clone().requires_grad_()
    units = leaf if leaf.ndim == 2 else leaf[:, None]
    n = len(leaf)
    mask = t["in.completion_mask"].bool() if "in.completion_mask" in t else torch.ones(n, 1, dtype=torch.bool)
    values: dict[str, Any] = {
        "logprobs": LogProbs(units, torch.ones_like(units)),
        "old": None,
        "ref": None,
        "advantages": t["in.advantages"] if "in.advantages" in t else torch.zeros(n),
        "rewards": torch.zeros(n),
        "group_size": n,
        "completion_mask": mask,
        "entropy": None,
        "num_units": float(n),
        "num_rollouts": float(n),
    }
    return LossInputs(**{**values, **changes}), leaf


def _units(value: Tensor) -> LogProbs:
    value = value if value.ndim == 2 else value[:, None]
    return LogProbs(value, torch.ones_like(value))


def _canvas(n: int, length: int) -> Tensor:
    return torch.ones(n, length, dtype=torch.bool)


def spg(case: Case, t: Tensors) -> None:
    inputs, leaf = sequence_inputs(t["in.seq_logp"], t)
    length = t["in.completion_mask"].sum(1, keepdim=True).float()
    inputs, leaf = sequence_inputs(t["in.seq_logp"], t, num_units=float(length.sum()))
    inputs = LossInputs(**{**inputs.__dict__, "logprobs": LogProbs(inputs.logprobs.value, length)})
    _check(case, ReinforceLoss(terms.token_mean), inputs, leaf, t["out.loss"], t["out.grad_seq_logp"])


def espo(case: Case, t: Tensors) -> None:
    s = case["settings"]
    n = len(t["in.elbo"])
    inputs, leaf = sequence_inputs(
        t["in.elbo"],
        t,
        old=_units(t["in.old_elbo"]),
        ref=_units(t["in.ref_elbo"]),
        completion_mask=_canvas(n, s["L"]),
    )
    loss = SequenceClippedLoss(s["epsilon_low"], s["epsilon_high"], s["beta"], terms.k2, terms.canvas_length)
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_elbo"])


def gdsd(case: Case, t: Tensors) -> None:
    s, n = case["settings"], len(t["in.score"])
    inputs, leaf = sequence_inputs(
        t["in.score"],
        t,
        old=_units(t["in.old_score"]),
        ref=_units(t["in.ref_score"]),
        completion_mask=_canvas(n, s["L"]),
    )
    loss = GDSDLoss(s["epsilon"], s["psi"] * 1.0, s["beta"], terms.k2, terms.canvas_length)
    _check(case, loss, inputs, leaf, t["out.loss"], t["out.grad_score"])


def stable_drl(case: Case, t: Tensors) -> None:
    cap = case["settings"]["ais_clip_iw"]
    if cap is None:  # without weights it is SPG's loss
        length = t["in.completion_mask"].sum(1, keepdim=True).float()
        inputs, leaf = sequence_inputs(t["in.seq_logp_bound"], t, num_units=float(length.sum()))
        inputs = LossInputs(**{**inputs.__dict__, "logprobs": LogProbs(inputs.logprobs.value, length)})
        _check(case, ReinforceLoss(terms.token_mean), inputs, leaf, t["out.loss"], t["out.grad_seq_logp_bound"])
        return
    inputs, leaf = sequence_inputs(t["in.seq_logp_bound"], t)
    weight = inputs.logprobs.weight
    now = LogProbs(inputs.logprobs.value, weight, {"elbo": t["in.elbo"]})
    old = LogProbs(t["in.seq_logp_bound"][:, None], weight, {"elbo": t["in.old_elbo"]})
    inputs = LossInputs(**{**inputs.__dict__, "logprobs": now, "old": old})
    _check(case, StableDRLLoss(float(cap)), inputs, leaf, t["out.loss"], t["out.grad_seq_logp_bound"])


def dmpo_group_weights(case: Case, t: Tensors) -> None:
    s = case["settings"]
    inputs, _ = sequence_inputs(
        t["in.cur_seq_logp"], t, ref=_units(t["in.ref_seq_logp"]), rewards=t["in.rewards"], group_size=s["group_size"]
    )
    for name, sign in (("out.weights", 1.0), ("out.negative_weights", -1.0)):
        assert_near(name, dmpo_weights(inputs, s["alpha"], s["coeff"], sign), t[name], rtol=1e-4)


def dmpo(case: Case, t: Tensors) -> None:
    s = case["settings"]
    network, replicas = StoredCalls(t), s["num_replicates"]
    n, c = t["in.completion_ids"].shape
    hidden = t["rand.mask"].view(replicas, n, c).transpose(0, 1)
    noised = t["call0.input_ids"].view(replicas, n, -1).transpose(0, 1)
    scored = hidden
    if s.get("loss_mask_non_eos"):
        scored = noised[:, :, -c:] == s["mask_id"]
    corruption = completion_corruption(noised, t["in.completion_ids"], scored.float())
    count = scored.sum(2).clamp(min=1)
    if s["loss"] == "ddo" or s.get("advantage_centering_unbias"):
        _dmpo_on_bounds(case, t, network, longhand_scores(network, corruption) * c / count[:, :, None])
        return
    value = ((longhand_scores(network, corruption) * scored).sum(2) / count).mean(1)  # -(mean cross-entropy)
    center: Any = no_centering
    if s.get("advantage_centering_neg"):
        center = partial(negative_centering, strength=s["centering_strength"])
    elif s.get("advantage_centering"):
        center = mean_centering
    fixed = _FixedWeights(center, t["in.weights"], t["in.negative_weights"])
    inputs = LossInputs(
        _units(value), None, None, torch.zeros(n), torch.zeros(n), n, _canvas(n, c), None, float(n), float(n)
    )
    loss, _ = DMPOLoss(0.0, 1.0, fixed, terms.unit_length)(inputs)
    assert_near(case["name"], loss, t["out.loss"])
    loss.backward()
    assert network.logits.grad is not None
    assert_near(f"{case['name']} gradient", network.logits.grad, network.expected_grad)


def _dmpo_on_bounds(case: Case, t: Tensors, network: StoredCalls, weighted: Tensor) -> None:
    """The variants that look at log p - log p_old of the bounds; `weighted` [N, R, C] sums to a bound a mask."""
    n, replicas, c = weighted.shape
    bound, ones = weighted.sum(2).mean(1)[:, None], torch.ones(n, 1)
    old = LogProbs(t["in.seq_logp_rollout"][:, None], ones)
    inputs = LossInputs(
        LogProbs(bound, ones), old, None, torch.zeros(n), t["in.weights"].log(), n, _canvas(n, c), None, float(n),
        float(n),
    )  # fmt: skip
    if case["settings"]["loss"] == "ddo":  # alpha 0, coefficient 1: softmax of log weights gives the weights back
        loss, _ = DDOLoss(0.0, 1.0, beta=0.1, fake_weight=1.0, replicates=replicas)(inputs)
    else:
        fixed = _FixedWeights(importance_centering, t["in.weights"], t["in.negative_weights"])
        loss, _ = DMPOLoss(0.0, 1.0, fixed, terms.canvas_length)(inputs)
    assert_near(case["name"], loss, t["out.loss"])
    loss.backward()
    assert network.logits.grad is not None
    assert_near(f"{case['name']} gradient", network.logits.grad, network.expected_grad)


class _FixedWeights:
    """A centring that puts the stored weights in the place of the computed ones."""

    def __init__(self, center: Any, weight: Tensor, negative: Tensor) -> None:
        self.center, self.weight, self.negative = center, weight, negative

    def __call__(self, weights: Weights, group_size: int) -> Tensor:
        return self.center(Weights(self.weight, self.negative, weights.gap), group_size)


# ---------------------------------------------------------------------------------------------------------- KL, pairs


def kl_estimators(case: Case, t: Tensors) -> None:
    ours = {
        "espo_k1": terms.k1_with_score,
        "espo_k2": terms.k2,
        "espo_k3": terms.k3,
        "drift_k1": terms.k1,
        "drift_k2": terms.k2,
        "drift_k3": terms.k3,
        "verl_k1": terms.k1,
        "verl_abs": terms.absolute,
        "verl_k2": terms.k2,
        "verl_k3": lambda d: terms.k3(d).clamp(-10, 10),
    }
    stored = {key.removeprefix("out.") for key in t if key.startswith("out.") and not key.endswith("_grad")}
    assert stored <= set(ours), stored
    for name in sorted(stored):
        logp = t["in.logp"].clone().requires_grad_()
        value = ours[name](terms.log_ratio(LogProbs(logp, torch.ones_like(logp)), LogProbs(t["in.ref_logp"], logp)))
        assert_near(name, value, t[f"out.{name}"])
        value.sum().backward()
        assert logp.grad is not None
        assert_near(f"{name} gradient", logp.grad, t[f"out.{name}_grad"])


def dare_sequence_level(case: Case, t: Tensors) -> None:
    valid = t["in.row_valid"].bool()
    rows = valid.nonzero()[:, 0]
    picked = {key: value[rows] for key, value in t.items() if key in ("in.elbo", "in.old_elbo", "in.advantages")}
    inputs, leaf = sequence_inputs(picked["in.elbo"], picked, old=_units(picked["in.old_elbo"]))
    for length in (terms.unit_length, terms.canvas_length):
        wide = LossInputs(
            **{**inputs.__dict__, "completion_mask": _canvas(len(rows), case["settings"]["normalization_length"])}
        )
        value, _ = SequenceClippedLoss(0.2, 0.28, 0.0, terms.k2, length)(wide)
        if torch.allclose(value, t["out.ebpo_loss"], rtol=1e-5, atol=1e-6):
            value.backward()
            assert leaf.grad is not None
            assert_near("EBPO gradient", leaf.grad, t["out.ebpo_grad"][rows])
            break
    else:
        raise AssertionError(f"EBPO loss {float(t['out.ebpo_loss'])} is neither the raw nor the normalised ratio's")
    length = t["in.response_mask"].sum(1, keepdim=True)
    inputs, leaf = sequence_inputs(t["in.elbo"], t, num_units=float(length.sum()))
    inputs = LossInputs(**{**inputs.__dict__, "logprobs": LogProbs(inputs.logprobs.value, length)})
    value, _ = ReinforceLoss(terms.token_mean)(inputs)
    assert_near("SPG", value, t["out.spg_loss"])
    value.backward()
    assert leaf.grad is not None
    assert_near("SPG gradient", leaf.grad, t["out.spg_grad"])


def vrpo(case: Case, t: Tensors) -> None:
    s, length = case["settings"], int(t["in.response_length"])
    values: dict[str, Tensor] = {}
    leaves: list[Tensor] = []
    for name, prefix in (("now", "call"), ("ref", "ref_call")):
        rows: list[Tensor] = []
        for number in range(t["in.input_ids"].shape[0] * s["mc_num"]):
            mc, row = divmod(number, t["in.input_ids"].shape[0])
            logits = t[f"{prefix}{number}.logits"].clone().requires_grad_(name == "now")
            leaves += [logits] if name == "now" else []
            mask = t["rand.mask"][row, mc]
            picked = torch.log_softmax(logits, -1).gather(1, t["in.input_ids"][row][:, None])[:, 0]
            rows.append((torch.where(mask, picked, 0.0) / t["in.p_mask"][row, mc]).sum())
        values[name] = torch.stack(rows).view(s["mc_num"], -1).mean(0)
    assert_near("ELBO / length", values["now"] / length, t["out.elbo_over_length"])
    assert_near("reference ELBO / length", values["ref"] / length, t["out.ref_elbo_over_length"])
    n = len(values["now"])
    rewards = torch.tensor([1.0, 0.0]).repeat(n // 2)
    inputs = LossInputs(
        _units(values["now"]), None, _units(values["ref"].detach()), torch.zeros(n), rewards, 2, _canvas(n, length),
        None, float(n), float(n),
    )  # fmt: skip
    loss, _ = PreferenceLoss(s["beta"], terms.canvas_length)(inputs)
    assert_near(case["name"], loss, t["out.dpo_loss"])
    loss.backward()
    for number, leaf in enumerate(leaves):
        assert leaf.grad is not None
        assert_near(f"gradient of call {number}", leaf.grad, t[f"call{number}.grad_logits"])


FAMILIES: dict[str, Callable[[Case, Tensors], None]] = {
    "adv_trl_": trl_advantages,
    "adv_trl_rloo": rloo_advantages,
    "adv_diffucoder_loo": group_advantages(adv.leave_one_out),
    "adv_diffucoder_loo_scaled": group_advantages(adv.leave_one_out_zscore),
    "adv_espo_loo": group_advantages(adv.leave_one_out),
    "adv_gdsd": group_advantages(adv.leave_one_out),
    "adv_d1": group_advantages(adv.group_mean),
    "adv_wd1": group_advantages(adv.group_mean),
    "adv_justgrpo": strided_advantages,
    "adv_verl": verl_advantages,
    "adv_mdpo": mdpo_advantages,
    "adv_dtreerpo": tree_advantages,
    "dmpo_weights": dmpo_group_weights,
    "loss_trl_": trl_loss,
    "loss_trl_rloo": trl_rloo,
    "loss_d1": d1_loss,
    "loss_diffucoder": d1_loss,
    "loss_wd1": wd1,
    "loss_spg": spg,
    "loss_espo": espo,
    "loss_gdsd": gdsd,
    "loss_dmpo": dmpo,
    "loss_d2": step_merge_loss,
    "loss_mdpo": mdpo_loss,
    "loss_dare_": dare_loss,
    "loss_dare_sequence_level": dare_sequence_level,
    "kl_estimators": kl_estimators,
    "vrpo": vrpo,
    "loss_stabledrl": stable_drl,
}
"""A case belongs to the longest prefix that fits its name."""

CASES = [(case, seed) for case in method_cases("3_advantages_losses") for seed in case["seeds"]]


@needs_golden
@pytest.mark.parametrize(("case", "seed"), CASES, ids=[f"{case['name']}-seed{seed}" for case, seed in CASES])
def test_advantage_or_loss_equals_the_reference(case: Case, seed: int) -> None:
    fitting = [prefix for prefix in FAMILIES if case["name"].startswith(prefix)]
    assert fitting, f"no counterpart of {case['name']}: {case['meaning'][:80]}"
    FAMILIES[max(fitting, key=len)](case, method_tensors(case, seed))


D1_LOSSES = [
    (entry, name)
    for entry in d1_entries("E_grpo_loss")
    for name in sorted({key.split(".")[0] for key in entry["tensors"]})
]


@needs_golden
@pytest.mark.parametrize(("entry", "name"), D1_LOSSES, ids=[f"{name}-seed{entry['seed']}" for entry, name in D1_LOSSES])
def test_loss_equals_d1(entry: Case, name: str) -> None:
    tensors = d1_tensors(entry)
    t = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    (settings,) = [case for case in entry["settings"]["cases"] if case["case"] == name]
    stored = {f"in.{key.replace('logps', 'logp')}": value for key, value in t.items()}
    stored["in.logp"] = t["logps"]
    inputs, leaf = token_inputs(stored)
    epsilon, beta = settings["epsilon"], settings["beta"]
    loss = ClippedPolicyLoss(epsilon, epsilon, beta, terms.k3, terms.token_mean)
    metrics = _check({"name": name}, loss, inputs, leaf, t["loss"], t["grad_logps"])
    if beta:
        assert_near("kl", metrics["kl"], t["kl"].reshape(()))
