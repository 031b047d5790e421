"""d-TreeRPO's self-distillation (arXiv 2512.09675): a parent state learns the tokens its better children chose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.losses.terms import Scalar, per_unit
from d1lit.types import LossInputs, LossTraits, Metrics, PolicyLoss, Tree


def distillation_weight(progress: float, largest: float, gamma: float) -> float:
    """lambda = largest (exp(gamma progress) - 1) / (exp(gamma) - 1): from 0 to `largest` over the run."""
    return largest * math.expm1(gamma * progress) / math.expm1(gamma)


def distillation_temperature(progress: float, largest: float, power: float) -> float:
    """tau = largest (1 - progress)^power, not below 1e-6: late in the run only the best child is followed."""
    return max(largest * (1 - progress) ** power, 1e-6)


def sibling_distillation(
    logprobs: Float[Tensor, "N C"],
    token_ids: Int[Tensor, "N C"],
    active: Bool[Tensor, "N C"],
    advantages: Float[Tensor, " N"],
    group_size: int,
    temperature: float,
) -> Scalar:
    """Mean over (parent, position) of KL(q || p), q being the tokens of the children of positive advantage.

    A child's say in q is softmax(advantage / temperature) over the siblings of positive advantage; at a position only
    those that decoded it on this edge have one. Positions that nobody decoded do not count.

    Args:
        logprobs: of each child's tokens, all read off the parent state.
        token_ids: the tokens; siblings that chose the same one add up.
        active: decoded on this edge, up to the end of the sequence.
        advantages: of each child among its siblings.
        group_size: children of one parent, adjacent.
        temperature: of their weights.
    """
    grouped = (-1, group_size)
    better = advantages.view(grouped) > 0
    share = torch.softmax(torch.where(better, advantages.view(grouped) / temperature, -torch.inf), dim=1)
    share = torch.where(better, share, 0.0)  # a group without a better child: softmax of nothing
    active, token_ids = active.view(*grouped, active.shape[1]), token_ids.view(*grouped, active.shape[1])
    say = share[:, :, None] * active  # [B, G, C]
    decoded = say.sum(1) > 0
    say = say / say.sum(1, keepdim=True).clamp(min=1e-8)
    same = token_ids[:, :, None] == token_ids[:, None, :]
    total = (say[:, None] * same).sum(2)  # what each child's token has in q
    terms = say * (torch.log(total.clamp(min=1e-8)) - logprobs.view_as(say))
    return torch.where(say > 0, terms, 0.0).sum() / decoded.sum().clamp(min=1)


@dataclass(frozen=True)
class WithSiblingDistillation:
    """Another loss plus `sibling_distillation` over all edges of the trees (d-TreeRPO, arXiv 2512.09675).

    Its weight grows and its temperature falls over the run, as the two functions above say. It wants the estimator
    `tree_edges`, whose scores are read off the parents already: it costs no pass. Every edge has one say, whatever the
    leaves below it.
    Differs from the paper's code: the mean is over each micro-batch, as there, and micro-batches weigh as their
    rollouts; how many positions the better children decoded is not known of the others.
    """

    loss: PolicyLoss
    tree: Tree
    largest_weight: float
    weight_growth: float
    largest_temperature: float
    temperature_power: float

    @property
    def traits(self) -> LossTraits:
        """The wrapped loss's, on edges."""
        inner = self.loss.traits
        parts = inner.needs_parts | {"edge", "token_ids"}
        return replace(inner, units=inner.units & {"token"}, needs_parts=parts, tree=self.tree)

    def __call__(self, inputs: LossInputs) -> tuple[Scalar, Metrics]:
        """This micro-batch's share of the loss, and detached metrics."""
        loss, metrics = self.loss(inputs)
        logprobs, advantages = inputs.logprobs, per_unit(inputs.advantages).expand_as(inputs.logprobs.value)
        edge, tokens = logprobs.parts["edge"], logprobs.parts["token_ids"]
        columns = []
        for level in range(self.tree.height):
            first = slice(None, None, self.tree.width(level + 1))  # one leaf below each child
            active = ((edge == level) & (logprobs.weight > 0))[first]
            # Where nothing is active nothing has a say, so the least advantage does no harm.
            advantage = torch.where(active, advantages[first], -torch.inf).amax(1)
            columns.append((logprobs.value[first], tokens[first], active, advantage))
        scored, token_ids, active, advantage = (torch.cat(part) for part in zip(*columns, strict=True))
        temperature = distillation_temperature(inputs.progress, self.largest_temperature, self.temperature_power)
        term = sibling_distillation(scored, token_ids, active, advantage, self.tree.branching, temperature)
        weight = distillation_weight(inputs.progress, self.largest_weight, self.weight_growth)
        share = len(inputs.rewards) / inputs.num_rollouts
        return loss + weight * share * term, {**metrics, "distillation": term.detach()}
