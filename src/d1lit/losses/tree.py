"""d-TreeRPO's self-distillation (arXiv 2512.09675): a parent state learns the tokens its better children chose."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.losses.terms import Scalar


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
