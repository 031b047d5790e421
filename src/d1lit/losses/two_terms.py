"""Losses of two terms: token and order ratios clipped apart, and a supervised term beside a policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.losses.clipped import clip_metrics
from d1lit.losses.terms import LOG_RATIO_LIMIT, Scalar
from d1lit.types import LossInputs, LossTraits, Metrics, PolicyLoss


def scored_units(inputs: LossInputs) -> Float[Tensor, " N"]:
    """Units that count of each rollout: steps that fixed something, for a likelihood of steps."""
    return (inputs.logprobs.weight > 0).sum(1).clamp(min=1).to(inputs.rewards.dtype)


@dataclass(frozen=True)
class OrderClippedLoss:
    """A ratio of tokens and one of positions, each clipped by itself (mask-aware policy gradient, arXiv 2607.15200).

        -min(r_t A, clip(r_t) A) - order_weight min(r_o A, clip(r_o) A),   r = exp(sum of log-ratios / length)

    Clipped together, a large change of the order would stop the gradient of the tokens. Wants an estimator with both
    parts: `ordered_trace` or `learned_order`. Written from notes on the paper; its code was not read.
    """

    token_epsilon: float
    order_epsilon: float
    order_weight: float
    length: Callable[[LossInputs], Float[Tensor, " N"]]
    """What the summed log-ratios are divided by: `scored_units`, or a length of `terms`."""
    traits: ClassVar[LossTraits] = LossTraits(
        frozenset({"step"}), needs_old=True, needs_parts=frozenset({"tokens", "order"})
    )

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        tokens, token_metrics = self._surrogate("tokens", self.token_epsilon, inputs)
        order, order_metrics = self._surrogate("order", self.order_epsilon, inputs)
        loss = (tokens + self.order_weight * order).sum() / inputs.num_rollouts
        return loss, token_metrics | {f"order_{name}": value for name, value in order_metrics.items()}

    def _surrogate(self, part: str, epsilon: float, inputs: LossInputs) -> tuple[Float[Tensor, " N"], Metrics]:
        now = inputs.logprobs.parts[part]
        old = now.detach() if inputs.old is None else inputs.old.parts[part]
        difference = torch.where(inputs.logprobs.weight > 0, now - old.detach(), 0.0).sum(1) / self.length(inputs)
        ratio = torch.exp(difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        low, high, advantages = 1 - epsilon, 1 + epsilon, inputs.advantages
        rows = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        weight = torch.ones_like(ratio)[:, None]
        return rows, clip_metrics(ratio[:, None], advantages[:, None], low, high, weight)


@dataclass(frozen=True)
class WithSupervised:
    """Another loss plus gamma times -log p of the rollouts that did better than their group (SFT and RL jointly).

    LLaDA 1.5 (arXiv 2505.19223) adds such a term on the preferred answers. The likelihood is the policy loss's own, a
    mean over its units, averaged over the rollouts of positive advantage.
    """

    loss: PolicyLoss
    gamma: float

    @property
    def traits(self) -> LossTraits:
        """Those of the wrapped loss; the better rollouts are found by one advantage each."""
        return replace(self.loss.traits, takes_unit_advantages=False)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        loss, metrics = self.loss(inputs)
        weight, better = inputs.logprobs.weight, (inputs.advantages > 0).to(inputs.rewards.dtype)
        value = torch.where(weight > 0, inputs.logprobs.value, 0.0)
        rows = -(value * weight).sum(1) / weight.sum(1).clamp(min=1e-8)
        supervised = (better * rows).sum() / inputs.num_rollouts
        return loss + self.gamma * supervised, {**metrics, "supervised": supervised.detach()}
