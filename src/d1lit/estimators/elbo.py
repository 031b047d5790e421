"""Monte-Carlo estimates of the masked-diffusion likelihood bound, by number or share of hidden tokens or by quadrature.

    ELBO(o | q) = E over l ~ U{1..n}, |S| = l of  (n / l) sum_{i in S} log p_i        (LLaDA, arXiv 2502.09992)

What is scored is the completion up to its end, which is then all that may be attended, or the whole canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.draws import random_subset, spread_counts
from d1lit.estimators.views import completion_views, sequence_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


def scored_tokens(context: Context, score_padding: bool) -> tuple[Bool[Tensor, "N C"], Int[Tensor, " N"]]:
    """Which tokens a bound is over, and how many."""
    mask = context.rollout.completion_mask
    scored = torch.ones_like(mask) if score_padding else mask
    return scored, scored.sum(1).clamp(min=1)


def subset_views(
    context: Context, hidden: Bool[Tensor, "N K C"], weight: Float[Tensor, "N K C"], score_padding: bool
) -> Corruption:
    """Views that hide the given tokens; past the end nothing is attended unless it is scored."""
    noised = torch.where(hidden, context.mask_token_id, context.rollout.completion_ids[:, None, :])
    return completion_views(context.rollout, noised, weight, attend_padding=score_padding)


def _uniform_counts(
    context: Context, length: Int[Tensor, " N"], num_masks: int, round_sums: bool
) -> Int[Tensor, "N K"]:
    """Numbers of hidden tokens, uniform over 1 .. length, spread evenly over the K masks of a rollout."""
    uniform = context.draws.uniform("mask_count", context.rollout.row_ids, ())
    start = ((uniform * length).to(torch.int64) + 1)[:, None].expand(-1, num_masks)
    index = torch.arange(num_masks, device=length.device).expand(len(length), -1)
    counts = spread_counts(start, index, num_masks, length[:, None].expand(-1, num_masks), round_sums)
    return (counts - 1) % length[:, None] + 1


def _exact_count_views(context: Context, choice: ELBOEstimator | MaskwiseELBOEstimator, share: float) -> Corruption:
    scored, length = scored_tokens(context, choice.score_padding)
    counts = _uniform_counts(context, length, choice.num_masks, choice.round_sums)
    rows, width = context.rollout.row_ids, scored.shape[1]
    hidden = torch.stack(
        [
            random_subset(context.draws.uniform("mask", rows, (width,), step=k), counts[:, k], scored)
            for k in range(choice.num_masks)
        ],
        dim=1,
    )
    weight = hidden * (length[:, None] / counts).to(torch.float32)[:, :, None] * share
    return subset_views(context, hidden, weight, choice.score_padding)


@dataclass(frozen=True)
class ELBOEstimator:
    """The likelihood bound from K masks of exact size (LLaDA, arXiv 2502.09992), sizes stratified over the masks.

    VRPO (arXiv 2505.19223) is this with K masks of K different sizes, shared by policy and reference, which the
    corruption sees to.
    """

    num_masks: int
    score_padding: bool
    """Score and attend the whole canvas instead of the completion up to its end."""
    round_sums: bool = False
    """Round the numbers of hidden tokens as the published code does (`draws.spread_counts`): biased at some lengths."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("sequence")

    def corrupt(self, context: Context) -> Corruption:
        """K views of each rollout."""
        return _exact_count_views(context, self, 1 / self.num_masks)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The mean over masks of (n / l) times the summed log-probabilities."""
        return sequence_logprobs(view_logprobs, corruption)


@dataclass(frozen=True)
class MaskwiseELBOEstimator:
    """The same masks, each kept as a likelihood of its own (BGPO, arXiv 2510.11683: one term of the loss a mask).

    Values are divided by the length, as BGPO does, so a unit is in nats a token.
    """

    num_masks: int
    score_padding: bool
    round_sums: bool = False
    """As in `ELBOEstimator`."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("view")

    def corrupt(self, context: Context) -> Corruption:
        """K views of each rollout."""
        return _exact_count_views(context, self, 1.0)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """One bound a mask."""
        _, length = scored_tokens(context, self.score_padding)
        value = (view_logprobs * corruption.weight).sum(2) / length[:, None]
        return LogProbs(value=value, weight=torch.full_like(value, 1 / self.num_masks))


@dataclass(frozen=True)
class ReplicateEstimator:
    """DMPO's bound (arXiv 2510.08233): R Bernoulli masks, each weighing length / (its realised number of tokens).

    The hidden share of a mask is uniform over [share_low, 1]. In the antithetic form the second half of the masks are
    the complements of the first.
    """

    num_masks: int
    share_low: float
    antithetic: bool
    score_padding: bool
    """Score and attend the whole canvas, as the authors' code does."""
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("sequence")

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.antithetic and self.num_masks % 2:
            raise ValueError(f"estimator.num_masks: must be even when antithetic, got {self.num_masks}. Try: 4")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, mask)."""
        rows = context.rollout.row_ids
        scored, length = scored_tokens(context, self.score_padding)
        masks = []
        for k in range(self.num_masks // 2 if self.antithetic else self.num_masks):
            share = self.share_low + (1 - self.share_low) * context.draws.uniform("mask_ratio", rows, (), step=k)
            uniform = context.draws.uniform("mask", rows, (scored.shape[1],), step=k)
            masks.append((uniform < share[:, None]) & scored)
        if self.antithetic:
            masks += [scored & ~mask for mask in masks]
        hidden = torch.stack(masks, dim=1)
        count = hidden.sum(2, keepdim=True).clamp(min=1)
        weight = hidden * (length[:, None, None] / count).to(torch.float32) / self.num_masks
        return subset_views(context, hidden, weight, self.score_padding)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The weighted sum over views and tokens."""
        return sequence_logprobs(view_logprobs, corruption)


def gauss_legendre(num_nodes: int) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " nodes"]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1], in float64 (Golub and Welsch, 1969)."""
    k = torch.arange(1, num_nodes, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


@dataclass(frozen=True)
class QuadratureEstimator:
    """GDPO (arXiv 2510.08554): the integral over time by Gauss-Legendre quadrature, one mask a node.

    ELBO = sum_n w_n (1 / t_n) sum_{i hidden at t_n} log p_i,   each token hidden with probability t_n
    """

    num_nodes: int
    score_padding: bool
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("sequence")

    def corrupt(self, context: Context) -> Corruption:
        """One view a node."""
        scored, _ = scored_tokens(context, self.score_padding)
        nodes, weights = gauss_legendre(self.num_nodes)
        rows, length = context.rollout.row_ids, scored.shape[1]
        hidden = [
            (context.draws.uniform("mask", rows, (length,), step=n) < float(t)) & scored for n, t in enumerate(nodes)
        ]
        masks = torch.stack(hidden, dim=1)
        weight = masks * (weights / nodes).to(torch.float32).to(masks.device)[:, None]
        return subset_views(context, masks, weight, self.score_padding)

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The weighted sum over nodes and tokens."""
        return sequence_logprobs(view_logprobs, corruption)
