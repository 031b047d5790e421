"""Losses: longhand values, identities, safety of ratios, and that micro-batches add up to the whole batch."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.estimators.elbo import ELBOEstimator, MaskwiseELBOEstimator
from d1lit.estimators.left_to_right import LeftToRightEstimator
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.same_views import SameViews
from d1lit.estimators.spg import SPGEstimator, hide_all
from d1lit.losses import ClippedPolicyLoss, MaskedCrossEntropy, SequenceClippedLoss, check_pair, terms, tree
from d1lit.losses.clipped import inverse_length
from d1lit.losses.filters import LikelyTokenFilter, OffPolicyFilter, TopEntropyLoss
from d1lit.losses.policy_gradient import (
    CISPOLoss,
    MaskwiseBoundLoss,
    ReinforceLoss,
    SoftGateLoss,
    StableDRLLoss,
    VESPOLoss,
    gamma_kernel,
)
from d1lit.losses.supervised import batch_mean, per_row, per_target_token
from d1lit.losses.two_terms import OrderClippedLoss, WithSupervised, scored_units
from d1lit.losses.weighted import DDOLoss, DMPOLoss, GDSDLoss, PreferenceLoss, WD1Loss, mean_centering
from d1lit.types import LogProbs, LossInputs

N, C, GROUP = 12, 7, 4


def clipped(aggregate: Any = terms.token_mean, beta: float = 0.04, **more: Any) -> ClippedPolicyLoss:
    return ClippedPolicyLoss(0.2, 0.28, beta, terms.k3, aggregate, **more)


TOKEN_LOSSES: dict[str, Any] = {
    "clipped": clipped(),
    "sequence_mean": clipped(terms.sequence_mean),
    "sequence_sum": clipped(terms.sequence_sum),
    "constant_length": clipped(terms.constant_length),
    "dual_clip": clipped(dual_clip=3.0),
    "ratio_cap": clipped(ratio_cap=1.5, weigh_kl=True),
    "gspo": SequenceClippedLoss(3e-4, 4e-4, 0.04, terms.k3, terms.num_completion_tokens),
    "luspo": SequenceClippedLoss(
        2e-3, 3e-3, 0.0, terms.k3, terms.num_completion_tokens, row_weight=terms.num_completion_tokens
    ),
    "cispo": CISPOLoss(1.3, 0.02, terms.k3, terms.token_mean),
    "soft_gate": SoftGateLoss(1.0, 1.05, terms.sequence_mean),
    "reinforce": ReinforceLoss(terms.sequence_sum),
    "wd1": WD1Loss(1.0, positive_only=False),
    "off_policy_filter": OffPolicyFilter(clipped(), 0.05),
    "vespo": VESPOLoss(2.0, 3.0, 3.0, 2.0, terms.token_mean),
    "clipped_sft": WithSupervised(clipped(), 0.05),
}
SEQUENCE_LOSSES: dict[str, Any] = {
    "espo": SequenceClippedLoss(0.2, 0.2, 3e-3, terms.k2, terms.canvas_length),
    "spg": ReinforceLoss(terms.token_mean),
    "stable_drl": StableDRLLoss(5.0),
    "bgpo": MaskwiseBoundLoss(0.2, 0.2, terms.sequence_mean),
    "dmpo": DMPOLoss(0.5, 0.5, partial(mean_centering, strength=1.0), terms.canvas_length),
    "ddo": DDOLoss(0.5, 0.5, beta=0.3, fake_weight=1.0),
    "gdsd": GDSDLoss(0.1, 1.0, 1e-3, terms.k2, terms.canvas_length),
}
LOSSES = TOKEN_LOSSES | SEQUENCE_LOSSES


def make_inputs(sequence: bool = False, seed: int = 0, spread: float = 0.3) -> tuple[LossInputs, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    units = 1 if sequence else C
    value = (-2 * torch.rand(N, units, generator=generator)).requires_grad_()
    lengths = torch.randint(2, C + 1, (N,), generator=generator)
    mask = torch.arange(C) < lengths[:, None]
    weight = torch.ones(N, 1) if sequence else mask.float()

    def other(scale: float) -> LogProbs:
        noise = scale * torch.randn(N, units, generator=generator)
        return LogProbs(value.detach() + noise, weight, {"elbo": (value.detach() + noise)[:, 0]})

    advantages = torch.randn(N, generator=generator).view(-1, GROUP)
    advantages = (advantages - advantages.mean(1, keepdim=True)).flatten()
    inputs = LossInputs(
        logprobs=LogProbs(value, weight, {"elbo": value[:, 0]}),
        old=other(spread),
        ref=other(spread),
        advantages=advantages,
        rewards=torch.rand(N, generator=generator),
        group_size=GROUP,
        completion_mask=mask,
        entropy=torch.rand(N, C, generator=generator),
        num_units=float(weight.sum()),
        num_rollouts=float(N),
    )
    return inputs, value


def _pick(inputs: LossInputs, rows: Tensor | slice) -> LossInputs:
    def part(likelihood: LogProbs | None) -> LogProbs | None:
        if likelihood is None:
            return None
        return LogProbs(
            likelihood.value[rows], likelihood.weight[rows], {k: v[rows] for k, v in likelihood.parts.items()}
        )

    logprobs = part(inputs.logprobs)
    assert logprobs is not None
    return replace(
        inputs,
        logprobs=logprobs,
        old=part(inputs.old),
        ref=part(inputs.ref),
        advantages=inputs.advantages[rows],
        rewards=inputs.rewards[rows],
        completion_mask=inputs.completion_mask[rows],
        entropy=None if inputs.entropy is None else inputs.entropy[rows],
    )


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return grad


every = pytest.mark.parametrize("name", LOSSES)


# ---------------------------------------------------------------------------------------------------------- all losses


@every
def test_micro_batches_add_up_to_the_whole_batch(name: str) -> None:
    inputs, leaf = make_inputs(name in SEQUENCE_LOSSES)
    whole, _ = LOSSES[name](inputs)
    parts = [LOSSES[name](_pick(inputs, slice(i, i + GROUP)))[0] for i in range(0, N, GROUP)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    torch.testing.assert_close(sum(_gradient(p, leaf) for p in parts), _gradient(whole, leaf))


@every
def test_the_order_of_rollouts_in_a_group_and_of_groups_does_not_matter(name: str) -> None:
    inputs, _ = make_inputs(name in SEQUENCE_LOSSES)
    order = torch.arange(N).view(-1, GROUP)[[2, 0, 1]][:, [3, 1, 0, 2]].flatten()
    torch.testing.assert_close(LOSSES[name](_pick(inputs, order))[0], LOSSES[name](inputs)[0])


@every
def test_metrics_are_detached_and_finite(name: str) -> None:
    inputs, _ = make_inputs(name in SEQUENCE_LOSSES)
    loss, metrics = LOSSES[name](inputs)
    assert loss.requires_grad and metrics
    assert all(not value.requires_grad and bool(torch.isfinite(value)) for value in metrics.values())


@every
def test_losses_say_what_they_need(name: str) -> None:
    loss = LOSSES[name]
    inputs, _ = make_inputs(name in SEQUENCE_LOSSES)
    spared = inputs
    if not loss.traits.needs_reference:
        spared = replace(spared, ref=None)
    if not loss.traits.needs_entropy:
        spared = replace(spared, entropy=None)
    if not loss.traits.needs_old:
        spared = replace(spared, old=None)
    torch.testing.assert_close(loss(spared)[0], loss(inputs)[0])


@pytest.mark.parametrize("name", [n for n in TOKEN_LOSSES if n != "wd1"])
def test_equal_rewards_give_no_gradient_without_kl(name: str) -> None:
    inputs, leaf = make_inputs()
    silent = replace(inputs, advantages=torch.zeros(N), ref=inputs.logprobs)
    loss, _ = LOSSES[name](silent)
    torch.testing.assert_close(_gradient(loss, leaf), torch.zeros_like(leaf))


def test_wd1_weights_cancel_in_a_group_of_equal_rewards() -> None:
    inputs, leaf = make_inputs()
    loss, _ = WD1Loss(1.0, positive_only=False)(replace(inputs, advantages=torch.zeros(N)))
    torch.testing.assert_close(_gradient(loss, leaf), torch.zeros_like(leaf))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_masked_units_have_no_gradient(name: str) -> None:
    inputs, leaf = make_inputs()
    assert not bool(_gradient(LOSSES[name](inputs)[0], leaf)[inputs.logprobs.weight == 0].any())


@pytest.mark.parametrize("name", ["clipped", "sequence_mean", "cispo", "soft_gate", "dual_clip"])
def test_at_a_ratio_of_one_the_gradient_is_reinforce(name: str) -> None:
    inputs, leaf = make_inputs()
    loss = LOSSES[name]
    inputs = replace(inputs, old=LogProbs(leaf.detach(), inputs.logprobs.weight), ref=inputs.logprobs)
    plain = ReinforceLoss(loss.aggregate)
    got, expected = _gradient(loss(inputs)[0], leaf), _gradient(plain(inputs)[0], leaf)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(_gradient(loss(replace(inputs, old=None))[0], leaf), expected)


# -------------------------------------------------------------------------------------------------------------- ratios


@pytest.mark.parametrize("name", [n for n in TOKEN_LOSSES if n not in ("reinforce", "wd1")])
@pytest.mark.parametrize("where", ["masked", "valid"])
def test_huge_log_ratios_stay_finite_and_equal_float64(name: str, where: str) -> None:
    """|log-ratio| = 200 overflows exp in float32: at masked positions it must not matter, at valid ones it is cut."""
    inputs, leaf = make_inputs()
    assert inputs.old is not None and inputs.ref is not None
    signs = torch.where(torch.arange(N * C).view(N, C) % 2 == 0, 200.0, -200.0)
    chosen = (inputs.logprobs.weight == 0) if where == "masked" else (torch.arange(C) == 1).expand(N, C)
    results = []
    for dtype in (torch.float32, torch.float64):
        value = leaf.detach().to(dtype).requires_grad_()
        weight = inputs.logprobs.weight.to(dtype)
        far = torch.where(chosen, leaf.detach() + signs, inputs.old.value).to(dtype)
        far_ref = torch.where(chosen, leaf.detach() - signs, inputs.ref.value).to(dtype)
        wide = replace(
            inputs,
            logprobs=LogProbs(value, weight),
            old=LogProbs(far, weight),
            ref=LogProbs(far_ref, weight),
            advantages=inputs.advantages.to(dtype),
            rewards=inputs.rewards.to(dtype),
        )
        loss, _ = LOSSES[name](wide)
        results.append((loss.double(), _gradient(loss, value).double()))
    (loss, grad), (exact_loss, exact_grad) = results
    assert bool(torch.isfinite(grad).all()) and bool(torch.isfinite(loss))
    # The manifest of a float32 sum that holds exp(20): relative to the largest term.
    scale = max(1.0, float(exact_grad.abs().max()))
    assert float((grad - exact_grad).abs().max()) <= 1e-6 * scale
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", [n for n in TOKEN_LOSSES if n not in ("reinforce", "wd1")])
@pytest.mark.parametrize("there", [float("inf"), float("nan")])
def test_what_stands_at_masked_positions_does_not_matter(name: str, there: float) -> None:
    """Not even where it is no number: the selection comes before every sum."""
    inputs, leaf = make_inputs()
    assert inputs.old is not None and inputs.ref is not None
    masked = inputs.logprobs.weight == 0
    old, ref = (torch.where(masked, there, part.value) for part in (inputs.old, inputs.ref))
    weight = inputs.logprobs.weight
    odd = replace(inputs, old=LogProbs(old, weight), ref=LogProbs(ref, weight))
    loss, grad = (found := LOSSES[name](inputs)[0]), _gradient(found, leaf)
    other = LOSSES[name](odd)[0]
    assert bool(masked.any()) and torch.equal(loss, other) and torch.equal(grad, _gradient(other, leaf))


def test_k3_is_never_negative_and_k1_k2_have_their_gradients() -> None:
    d = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    assert bool((terms.k3(d[None]) >= 0).all())
    for estimator, slope in (
        (terms.k1, torch.ones_like(d)),
        (terms.k2, d.detach()),
        (terms.k3, 1 - torch.exp(-d.detach())),
        (terms.k1_with_score, 1 + d.detach()),
    ):
        torch.testing.assert_close(_gradient(estimator(d[None]).sum(), d), slope)
    torch.testing.assert_close(terms.k1_with_score(d[None])[0], d)


def test_k1_and_k3_estimate_the_same_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    d = (p.log() - q.log())[None]
    exact = float((p * d[0]).sum())
    for estimator in (terms.k1, terms.k3):
        assert float((p * estimator(d)[0]).sum()) == pytest.approx(exact, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ longhand


def test_clipped_loss_longhand() -> None:
    inputs, _ = make_inputs()
    assert inputs.old is not None and inputs.ref is not None
    total, count, stopped = 0.0, 0, 0
    for i in range(N):
        for j in range(C):
            if inputs.completion_mask[i, j]:
                a = float(inputs.advantages[i])
                ratio = math.exp(float(inputs.logprobs.value[i, j].detach() - inputs.old.value[i, j]))
                d = float(inputs.logprobs.value[i, j].detach() - inputs.ref.value[i, j])
                total += -min(ratio * a, min(max(ratio, 0.8), 1.28) * a) + 0.04 * (math.exp(-d) + d - 1)
                stopped += (ratio > 1.28 and a > 0) or (ratio < 0.8 and a < 0)
                count += 1
    loss, metrics = clipped()(inputs)
    assert float(loss) == pytest.approx(total / count, abs=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(stopped / count, abs=1e-6)


def test_gdpo_divides_by_the_length_outside_its_ratio() -> None:
    inputs, value = make_inputs(sequence=True)
    assert inputs.old is not None
    ratio = torch.exp(value[:, 0] - inputs.old.value[:, 0])
    clipped_rows = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.5, 1.5) * inputs.advantages)
    expected = -(clipped_rows / inputs.completion_mask.sum(1)).mean()
    gdpo = SequenceClippedLoss(0.5, 0.5, 0.0, terms.k2, terms.unit_length, inverse_length)
    loss, _ = gdpo(inputs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(_gradient(loss, value), _gradient(expected, value))


def test_aggregations_longhand() -> None:
    inputs, _ = make_inputs()
    values, weight = torch.randn(N, C), inputs.logprobs.weight
    rows = [[float(values[i, j]) for j in range(C) if weight[i, j]] for i in range(N)]
    flat = [v for row in rows for v in row]
    expected = {
        terms.token_mean: sum(flat) / len(flat),
        terms.micro_batch_token_mean: sum(flat) / len(flat),
        terms.sequence_mean: sum(sum(r) / len(r) for r in rows) / N,
        terms.sequence_sum: sum(flat) / N,
        terms.constant_length: sum(flat) / (N * C),
    }
    for aggregate, value in expected.items():
        assert float(aggregate(values, weight, inputs)) == pytest.approx(value, abs=1e-5)
    assert float(terms.constant_length(values, weight, inputs, 10)) == pytest.approx(sum(flat) / (N * 10), abs=1e-5)


def test_the_micro_batch_mean_depends_on_the_cut() -> None:
    """Why it is not the default: tokens of a micro-batch of short completions count for more."""
    inputs, _ = make_inputs()
    loss = clipped(terms.micro_batch_token_mean)
    parts = sum(float(loss(_pick(inputs, slice(i, i + GROUP)))[0]) for i in range(0, N, GROUP))
    assert abs(parts - float(loss(inputs)[0])) > 1e-4


def test_wd1_longhand() -> None:
    inputs, _ = make_inputs()
    total = 0.0
    for first in range(0, N, GROUP):
        group = range(first, first + GROUP)
        up = [math.exp(float(inputs.advantages[i])) for i in group]
        down = [math.exp(-float(inputs.advantages[i])) for i in group]
        for k, i in enumerate(group):
            logp = float((inputs.logprobs.value[i] * inputs.logprobs.weight[i]).sum())
            total += (-up[k] / sum(up) + down[k] / sum(down)) * logp
    loss, _ = WD1Loss(1.0, positive_only=False)(inputs)
    assert float(loss) == pytest.approx(total / (N / GROUP), abs=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_softmax_over_groups_or_over_the_micro_batch(whole: bool) -> None:
    """As wd1's and StableDRL's codes have it, equal where the micro-batch is one group."""
    inputs, value = make_inputs(sequence=True)
    rows, size = value[:, 0], N if whole else GROUP

    def share(scores: Tensor) -> Tensor:
        return scores.view(-1, size).softmax(1).flatten()

    wd1 = (share(-inputs.advantages) - share(inputs.advantages)) * rows
    got = WD1Loss(1.0, False, over_micro_batch=whole)(inputs)[0]
    torch.testing.assert_close(got, wd1.sum() * size / N)
    assert inputs.old is not None
    ratio = (rows - inputs.old.value[:, 0]).exp().clamp(0.8, 1.2)
    stable = ratio / ratio.view(-1, size).sum(1).repeat_interleave(size) * inputs.advantages * rows
    got = StableDRLLoss(1.2, ratio_floor=0.8, over_micro_batch=whole)(inputs)[0]
    torch.testing.assert_close(got, -stable.sum() * size / N)


def test_vespos_weight_is_held_out_of_the_gradient_unless_asked_for() -> None:
    inputs, leaf = make_inputs()
    held = LOSSES["vespo"]
    through = replace(held, through_weight=True)
    torch.testing.assert_close(held(inputs)[0], through(inputs)[0])
    assert not torch.allclose(_gradient(held(inputs)[0], leaf), _gradient(through(inputs)[0], leaf))
    assert not any(value.requires_grad for value in through(inputs)[1].values())


def test_preference_loss_longhand_and_ties() -> None:
    inputs, leaf = make_inputs(sequence=True)
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 1, 0, 0, 1, 1, 0])
    inputs = replace(inputs, rewards=rewards, group_size=2)
    assert inputs.ref is not None
    gain = (inputs.logprobs.value - inputs.ref.value)[:, 0]
    total = 0.0
    for i in range(0, N, 2):
        if rewards[i] != rewards[i + 1]:
            win, lose = (i, i + 1) if rewards[i] > rewards[i + 1] else (i + 1, i)
            total += math.log1p(math.exp(-0.2 * float(gain[win] - gain[lose])))
    loss, _ = PreferenceLoss(0.2, terms.unit_length)(inputs)
    assert float(loss) == pytest.approx(total / (N / 2), abs=1e-5)
    assert not bool(_gradient(loss, leaf)[4:6].any())


def test_linear_bound_of_bgpo_survives_where_its_logarithm_would_not() -> None:
    inputs, leaf = make_inputs(sequence=True)
    old = LogProbs(leaf.detach() + 3, inputs.logprobs.weight)  # 1 + d = -2
    loss, _ = MaskwiseBoundLoss(0.2, 0.2, terms.sequence_mean)(replace(inputs, old=old))
    assert bool(torch.isfinite(_gradient(loss, leaf)).all())


def test_top_entropy_keeps_the_uncertain_tokens() -> None:
    inputs, leaf = make_inputs()
    assert inputs.entropy is not None
    loss, _ = TopEntropyLoss(clipped(beta=0.0), share=0.5)(inputs)
    kept = _gradient(loss, leaf) != 0
    counted = inputs.completion_mask
    lowest = inputs.entropy[kept].min()
    assert float(lowest) >= float(inputs.entropy[counted].median()) - 1e-6


def test_off_policy_filter_drops_only_bad_rollouts_that_were_left() -> None:
    inputs, leaf = make_inputs()
    drift = 0.2 * torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)
    old = LogProbs(leaf.detach() + drift[:, None], inputs.logprobs.weight)
    loss, metrics = OffPolicyFilter(ReinforceLoss(terms.token_mean), 0.1)(replace(inputs, old=old))
    dropped = (inputs.advantages < 0) & (drift > 0.1)
    assert torch.equal((_gradient(loss, leaf) == 0).all(1), dropped)
    assert float(metrics["dropped_fraction"]) == pytest.approx(float(dropped.float().mean()))


def test_stable_drl_names_the_estimator_it_wants() -> None:
    with pytest.raises(ValueError, match=r"^loss: StableDRLLoss .* Try: estimator=spg"):
        check_pair(ELBOEstimator(2, score_padding=False), StableDRLLoss(5.0), allow=True)


# ---------------------------------------------------------------------------------------------------------- supervised


@pytest.mark.parametrize("normalize", [per_target_token, per_row, batch_mean])
def test_supervised_micro_batches_add_up(normalize: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    nll, t = torch.rand(8, 9, generator=generator), torch.rand(8, generator=generator)
    target = torch.arange(9) >= torch.randint(1, 6, (8, 1), generator=generator)
    hidden = (torch.rand(8, 9, generator=generator) < 0.5) & target
    loss, count = MaskedCrossEntropy(normalize), int(target.sum())
    whole = loss(nll, 1 / t, hidden, target, count, 8)
    parts = [
        loss(nll[i : i + 2], 1 / t[i : i + 2], hidden[i : i + 2], target[i : i + 2], count, 8) for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    per_token = loss(nll, (1 / t)[:, None].expand(-1, 9), hidden, target, count, 8)
    torch.testing.assert_close(per_token, whole)


def test_supervised_loss_ignores_what_is_not_hidden_even_if_infinite() -> None:
    nll = torch.tensor([[1.0, math.inf, 2.0]], requires_grad=True)
    hidden, target = torch.tensor([[True, False, True]]), torch.tensor([[True, True, True]])
    loss = MaskedCrossEntropy(per_target_token)(nll, torch.tensor([2.0]), hidden, target, 3, 1)
    assert float(loss) == pytest.approx(2.0)
    assert _gradient(loss, nll).tolist()[0] == pytest.approx([2 / 3, 0, 2 / 3])


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_known_not_to_learn_are_refused_with_reason_and_override() -> None:
    bound, upper = ELBOEstimator(2, False), SPGEstimator(hide_all, 2, 0.0, eubo_beta=1.5, mix_weight=1.0)
    mean_field = OneStepEstimator(0.1, 1, False)
    k3_on_bound = SequenceClippedLoss(0.2, 0.2, 0.1, partial(terms.k3), terms.canvas_length)
    cases = [
        (mean_field, LOSSES["gspo"], "mean-field"),
        (SameViews(mean_field), LOSSES["espo"], "mean-field"),
        (mean_field, WithSupervised(LOSSES["gspo"], 0.1), "mean-field"),
        (bound, k3_on_bound, "k1 and k3 fail"),
        (MaskwiseELBOEstimator(2, False), clipped(beta=0.1), "k1 and k3 fail"),
        (upper, LOSSES["spg"], "upper bound alone"),
    ]
    for estimator, loss, reason in cases:
        with pytest.raises(ValueError, match=rf"^loss: .* is refused: .*{reason}.* Try: .*allow_unsound_pair=true"):
            check_pair(estimator, loss)
        check_pair(estimator, loss, allow=True)
    check_pair(bound, replace(k3_on_bound, beta=0.0))
    check_pair(bound, replace(k3_on_bound, kl=partial(terms.k2)))
    check_pair(replace(upper, mix_weight=0.5), LOSSES["spg"])
    check_pair(replace(upper, ignore_negative=True), LOSSES["spg"])
    check_pair(LeftToRightEstimator(1.0, 1.0), LOSSES["gspo"])


def test_token_clipping_on_a_sequence_bound_is_refused_by_name() -> None:
    bound = ELBOEstimator(2, score_padding=False)
    with pytest.raises(ValueError, match=r"^loss: ClippedPolicyLoss with ELBOEstimator is refused: .* Try: loss=espo"):
        check_pair(bound, clipped())
    check_pair(bound, clipped(), allow=True)
    check_pair(bound, SEQUENCE_LOSSES["espo"])
    check_pair(OneStepEstimator(0.1, 1, False), clipped())


def test_other_impossible_pairs_are_refused_too() -> None:
    with pytest.raises(ValueError, match="not token ones"):
        check_pair(OneStepEstimator(0.1, 1, False), SEQUENCE_LOSSES["stable_drl"])
    with pytest.raises(ValueError, match=r"VESPOLoss weighs .* likelihoods; one ELBO a sequence has none"):
        check_pair(ELBOEstimator(2, False), LOSSES["vespo"])
    with pytest.raises(ValueError, match="not view ones"):
        check_pair(MaskwiseELBOEstimator(2, False), SEQUENCE_LOSSES["dmpo"])


@pytest.mark.parametrize("wrapper", [partial(OffPolicyFilter, threshold=0.1), partial(WithSupervised, gamma=0.1)])
def test_a_wrapper_hides_nothing_of_what_it_wraps(wrapper: Any) -> None:
    wrapped = wrapper(SEQUENCE_LOSSES["stable_drl"])
    with pytest.raises(ValueError, match=r"the loss reads elbo, .* Try: estimator=spg"):
        check_pair(ELBOEstimator(2, False), wrapped)
    assert wrapper(PreferenceLoss(0.2, terms.unit_length)).traits.group_size == 2
    order = OrderClippedLoss(0.2, 0.2, 1.0, scored_units)
    assert LikelyTokenFilter(wrapper(order), 0.1).traits.needs_parts == {"tokens", "order", "of_step"}


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: ClippedPolicyLoss(1.0, 0.2, 0.0, terms.k3, terms.token_mean), "epsilon_low"),
        (lambda: ClippedPolicyLoss(0.2, -0.1, 0.0, terms.k3, terms.token_mean), "epsilon_high"),
        (lambda: SequenceClippedLoss(0.2, 0.2, -1.0, terms.k2, terms.unit_length), "beta"),
        (lambda: GDSDLoss(0.0, 1.0, 0.0, terms.k2, terms.unit_length), "epsilon"),
    ],
)
def test_impossible_values_are_refused_by_name(build: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.{key}: .* Try: "):
        build()


# --------------------------------------------------------------------------------------------------------- two terms


def test_order_and_tokens_are_clipped_apart() -> None:
    g = torch.Generator().manual_seed(1)
    inputs, _ = make_inputs()
    weight = (torch.rand(N, 5, generator=g) < 0.8).float()
    tokens, order = (torch.randn(N, 5, generator=g).requires_grad_() for _ in range(2))
    old = {"tokens": tokens.detach() + 0.1, "order": order.detach() - 2.0}  # the order has moved far, the tokens little
    logprobs = LogProbs(tokens + order, weight, {"tokens": tokens, "order": order})
    inputs = replace(inputs, logprobs=logprobs, old=LogProbs(tokens.detach(), weight, old))
    loss, metrics = OrderClippedLoss(0.2, 0.3, 0.5, scored_units)(inputs)
    expected = 0.0
    for n in range(N):
        here, a = weight[n] > 0, float(inputs.advantages[n])
        for part, epsilon, share in ((tokens, 0.2, 1.0), (order, 0.3, 0.5)):
            name = "tokens" if part is tokens else "order"
            ratio = math.exp(float((part[n] - old[name][n])[here].mean()))
            expected -= share * min(ratio * a, min(max(ratio, 1 - epsilon), 1 + epsilon) * a) / N
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    better = inputs.advantages > 0
    assert bool((_gradient(loss, order)[better] == 0).all())  # clipped, and the tokens go on learning
    assert bool((_gradient(loss, tokens)[better] != 0).any(1).all())
    assert float(metrics["order_clip_fraction"]) == pytest.approx(float(better.float().mean()))


def test_the_supervised_term_is_the_likelihood_of_the_better_rollouts() -> None:
    inputs, leaf = make_inputs()
    gamma, plain = 0.3, clipped()
    got = WithSupervised(plain, gamma)(inputs)[0] - plain(inputs)[0]
    mask = inputs.completion_mask
    rows = [-float(leaf[n][mask[n]].mean()) for n in range(N) if inputs.advantages[n] > 0]
    assert float(got) == pytest.approx(gamma * sum(rows) / N, rel=1e-5)


# ------------------------------------------------------------------------------------------- Drift, VESPO, DDO, the tree


def view_inputs(views: int = 3) -> tuple[LossInputs, Tensor]:
    """Units in the order (view, token), with the views' own tokens named."""
    inputs, _ = make_inputs()
    g = torch.Generator().manual_seed(4)
    leaf = (-2 * torch.rand(N, views * C, generator=g)).requires_grad_()
    weight = (torch.rand(N, views, C, generator=g) < 0.6) & inputs.completion_mask[:, None]
    weight[0, 0] = False  # a view that scores nothing
    own = (torch.rand(N, views, C, generator=g) < 0.3) & weight
    old = leaf.detach() + 0.2 * torch.randn(leaf.shape, generator=g)
    units = weight.float().flatten(1)
    logprobs = LogProbs(leaf, units, {"of_step": own.float().flatten(1)})
    return replace(inputs, logprobs=logprobs, old=LogProbs(old, units), ref=None), leaf


def test_drift_longhand() -> None:
    inputs, leaf = view_inputs()
    loss, _ = LikelyTokenFilter(clipped(terms.view_mean, beta=0.0), 0.3)(inputs)
    total, own = 0.0, inputs.logprobs.parts["of_step"]
    assert inputs.old is not None
    for n in range(N):
        for k in range(3):
            values = []
            for p in range(k * C, (k + 1) * C):
                kept = float(inputs.old.value[n, p]) > math.log(0.3) or own[n, p] > 0
                if inputs.logprobs.weight[n, p] > 0 and kept:
                    ratio, a = math.exp(float(leaf[n, p] - inputs.old.value[n, p])), float(inputs.advantages[n])
                    values.append(-min(ratio * a, min(max(ratio, 0.8), 1.28) * a))
            total += sum(values) / max(len(values), 1)
    assert float(loss) == pytest.approx(total / (3 * N), rel=1e-5)
    one, _ = make_inputs()  # one view: the mean over sequences
    torch.testing.assert_close(clipped(terms.view_mean)(one)[0], clipped(terms.sequence_mean)(one)[0])


def test_drift_reinforce_longhand() -> None:
    inputs, leaf = view_inputs()
    loss, _ = ReinforceLoss(terms.micro_batch_view_token_mean)(inputs)
    expected = []
    for k in range(3):
        here = slice(k * C, (k + 1) * C)
        weight = inputs.logprobs.weight[:, here]
        expected.append((-inputs.advantages[:, None] * leaf[:, here] * weight).sum() / weight.sum())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_gamma_kernel_is_one_at_one_and_largest_at_shape_over_rate() -> None:
    w = torch.linspace(0.01, 4, 4001, dtype=torch.float64)
    for shape, rate in ((2.0, 3.0), (3.0, 2.0)):
        phi = gamma_kernel(w.log(), shape, rate)
        assert float(gamma_kernel(torch.zeros(1), shape, rate)) == 1.0
        assert float(w[phi.argmax()]) == pytest.approx(shape / rate, abs=2e-3)


def test_ddo_at_the_old_policy_has_the_gradient_of_its_weights() -> None:
    """At d = 0: -beta/2 (w - fake_weight) for each log p."""
    inputs, leaf = make_inputs(sequence=True)
    inputs = replace(inputs, old=replace(inputs.logprobs, value=leaf.detach()))
    loss = DDOLoss(0.0, 1.0, beta=0.6, fake_weight=0.25)
    weight = torch.softmax(inputs.rewards.view(-1, GROUP), 1).flatten()
    torch.testing.assert_close(_gradient(loss(inputs)[0], leaf)[:, 0], -0.3 * (weight - 0.25) / N)


def test_sibling_distillation_longhand() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, C, 5, generator=g).requires_grad_()
    tokens = torch.randint(0, 5, (2 * GROUP, C), generator=g)
    active = torch.rand(2 * GROUP, C, generator=g) < 0.5
    advantages = torch.randn(2 * GROUP, generator=g)
    advantages[GROUP:] = -advantages[GROUP:].abs()  # a parent without a better child teaches nothing
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.repeat_interleave(GROUP, 0).gather(2, tokens[..., None])[..., 0]
    got = tree.sibling_distillation(own, tokens, active, advantages, GROUP, temperature=0.7)
    terms_, count = 0.0, 0
    better = [i for i in range(GROUP) if advantages[i] > 0]
    share = torch.softmax(advantages[better] / 0.7, 0)
    for p in range(C):
        q = torch.zeros(5)
        for weight, child in zip(share.tolist(), better, strict=True):
            if active[child, p]:
                q[tokens[child, p]] += weight
        if q.sum() > 0:
            q, count = q / q.sum(), count + 1
            terms_ = terms_ + (q[q > 0] * (q[q > 0].log() - logprobs[0, p][q > 0])).sum()
    torch.testing.assert_close(got, terms_ / count)
    assert tree.distillation_weight(1.0, 3e-3, 2.0) == pytest.approx(3e-3)
    assert tree.distillation_temperature(0.0, 2.0, 0.7) == 2.0
