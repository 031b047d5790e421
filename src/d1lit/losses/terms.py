"""The pieces policy losses are made of: log-ratios that cannot overflow, KL estimators, and aggregations.

An aggregation turns [N, U] terms and weights into this micro-batch's share of the global loss. It divides by GLOBAL
counts, so that the shares of all micro-batches and ranks add up to the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.types import LogProbs, LossInputs

Units = Float[Tensor, "N U"]
Scalar = Float[Tensor, ""]
KLEstimator = Callable[[Units], Units]
Aggregation = Callable[[Units, Units, LossInputs], Scalar]

LOG_RATIO_LIMIT = 20.0
"""|log-ratio| is cut here before exp: exp(20) = 4.9e8 still squares in float32. Beyond it the gradient is 0."""


def log_ratio(new: LogProbs, other: LogProbs | None) -> Units:
    """log p_new - log p_other where the unit counts, 0 elsewhere; with no other, the policy itself (a ratio of 1).

    The selection comes before any exp: an overflow at a masked position would turn into 0 * inf = NaN in backward.
    """
    other_value = new.value if other is None else other.value
    difference = torch.where(new.weight > 0, new.value - other_value.detach(), 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def per_unit(advantages: Float[Tensor, "..."]) -> Float[Tensor, "N ..."]:
    """Advantages [N] as [N, 1]; [N, U] as they are."""
    return advantages[:, None] if advantages.ndim == 1 else advantages


def weighted_mean(values: Units, weight: Units) -> Scalar:
    """Mean over the units of this micro-batch, detached: for metrics only."""
    return ((values * weight).sum() / weight.sum().clamp(min=1e-8)).detach()


def softmax_in_group(values: Float[Tensor, " N"], group_size: int) -> Float[Tensor, " N"]:
    """Softmax over each group of adjacent rollouts."""
    return torch.softmax(values.view(-1, group_size), dim=1).flatten()


# ------------------------------------------------------------------------------------------------------------------- KL


def k1(d: Units) -> Units:
    """d = log p - log p_ref: unbiased, of either sign; its own gradient has expectation zero."""
    return d


def k1_with_score(d: Units) -> Units:
    """k1 with the missing score-function term in its gradient: value d, gradient 1 + d (as ESPO codes it)."""
    return d + 0.5 * (d**2 - d.detach() ** 2)


def k2(d: Units) -> Units:
    """d^2 / 2: biased value, the gradient of reverse KL on-policy; works on ELBOs (ESPO, arXiv 2512.03759)."""
    return 0.5 * d**2


def k3(d: Units) -> Units:
    """exp(-d) + d - 1: unbiased and never negative (GRPO, d1)."""
    return torch.exp(-d) + d - 1


def absolute(d: Units) -> Units:
    """|d|."""
    return d.abs()


# ---------------------------------------------------------------------------------------------------------- aggregation


def token_mean(terms: Units, weight: Units, inputs: LossInputs) -> Scalar:
    """Sum over units / units of the GLOBAL batch (DAPO, arXiv 2503.14476; d1 where its micro-batch is the batch)."""
    return (terms * weight).sum() / inputs.num_units


def micro_batch_token_mean(terms: Units, weight: Units, inputs: LossInputs) -> Scalar:
    """Sum over units / units of THIS micro-batch, averaged over micro-batches (d1's code, TRL's `bnpo`).

    Depends on how the batch was cut: tokens of a micro-batch of short completions count for more.
    """
    share = terms.shape[0] / inputs.num_rollouts
    return share * (terms * weight).sum() / weight.sum().clamp(min=1e-8)


def sequence_mean(terms: Units, weight: Units, inputs: LossInputs) -> Scalar:
    """Mean over the units of each rollout, then over rollouts (GRPO, arXiv 2402.03300; the d1 paper's Eq. 4)."""
    row_mean = (terms * weight).sum(1) / weight.sum(1).clamp(min=1e-8)
    return row_mean.sum() / inputs.num_rollouts


def sequence_sum(terms: Units, weight: Units, inputs: LossInputs) -> Scalar:
    """Sum over the units of each rollout, then the mean over rollouts."""
    return (terms * weight).sum() / inputs.num_rollouts


def view_mean(terms: Units, weight: Units, inputs: LossInputs) -> Scalar:
    """Mean over the tokens of each view of a rollout, then over views and rollouts (Drift, arXiv 2605.25638).

    Units in the order (view, token); a view in which nothing counts is a 0 in the mean, as in the authors' code.
    """
    length = inputs.completion_mask.shape[1]
    per_view, counted = (x.view(len(x), -1, length).sum(2) for x in (terms * weight, weight))
    return (per_view / counted.clamp(min=1e-8)).mean(1).sum() / inputs.num_rollouts


def micro_batch_view_token_mean(terms: Units, weight: Units, inputs: LossInputs) -> Scalar:
    """Sum over the tokens of the k-th views / their number in THIS micro-batch, averaged over k (Drift's REINFORCE).

    Units in the order (view, token). Depends on how the batch was cut.
    """
    length, share = inputs.completion_mask.shape[1], terms.shape[0] / inputs.num_rollouts
    per_view, counted = (x.view(len(x), -1, length).sum((0, 2)) for x in (terms * weight, weight))
    return share * (per_view / counted.clamp(min=1e-8)).mean()


def constant_length(terms: Units, weight: Units, inputs: LossInputs, length: int | None = None) -> Scalar:
    """Sum over units / (rollouts * a constant length) (Dr.GRPO, arXiv 2503.20783).

    Args:
        terms: one term a unit.
        weight: how much each unit counts.
        inputs: the global counts.
        length: the constant, at least 1; the length of the canvas where None.
    """
    length = inputs.completion_mask.shape[1] if length is None else length
    return (terms * weight).sum() / (inputs.num_rollouts * length)


# -------------------------------------------------------------------------------------------------------------- lengths


def canvas_length(inputs: LossInputs) -> Float[Tensor, " N"]:
    """The length of the canvas for every rollout (ESPO)."""
    return inputs.rewards.new_full((inputs.completion_mask.shape[0],), inputs.completion_mask.shape[1])


def num_completion_tokens(inputs: LossInputs) -> Float[Tensor, " N"]:
    """Tokens of each completion up to and including the first end of sequence, as a length or as a weight."""
    return inputs.completion_mask.sum(1).clamp(min=1).to(inputs.rewards.dtype)


def unit_length(inputs: LossInputs) -> Float[Tensor, " N"]:
    """1: the ratio of whole sequences, not normalised."""
    return torch.ones_like(inputs.rewards)
