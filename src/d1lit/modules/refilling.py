"""Dynamic sampling (DAPO, arXiv 2503.14476): groups whose rewards do not differ make room for those of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.advantages import has_spread
from d1lit.modules.experience import whole_rows
from d1lit.types import RewardBatch, Rollout, Verdict


@dataclass(frozen=True)
class JudgedRollout:
    """Rollouts of this rank, what the judges said of them, and the rewards of all ranks."""

    rollout: Rollout
    verdicts: dict[str, list[Verdict]]
    rewards: RewardBatch


def lacks_spread(judged: JudgedRollout, group_size: int) -> bool:
    """Whether any group of any rank teaches nothing: the same answer on every rank."""
    return not bool(has_spread(whole_rows(judged.rewards), group_size).all())


def refilled(judged: JudgedRollout, more: JudgedRollout, group_size: int, rank: int, world_size: int) -> JudgedRollout:
    """The same number of groups, those without spread replaced by groups with spread from `more` while there are any.

    A group stays on its rank, so a rank fills its gaps from its own spare groups, in order.

    Args:
        judged: the groups so far.
        more: as many spare groups.
        group_size: rollouts of one prompt, adjacent.
        rank: of this process.
        world_size: processes, each with equally many groups.
    """
    source = group_sources(judged.rewards, more.rewards, group_size, world_size)
    share = len(source) // world_size
    mine = source[rank * share : (rank + 1) * share] - rank * share
    own = torch.where(mine >= len(source), mine - len(source) + share, mine)
    everywhere, here = _rows(source, group_size), _rows(own, group_size)
    return JudgedRollout(
        picked(judged.rollout, more.rollout, here, "module.num_refills"),
        {name: [([*judged.verdicts[name], *more.verdicts[name]])[n] for n in here] for name in judged.verdicts},
        _rewards(judged.rewards, more.rewards, everywhere),
    )


def group_sources(first: RewardBatch, more: RewardBatch, group_size: int, world_size: int) -> Int[Tensor, " groups"]:
    """For each place of the batch the group that fills it; numbers from the number of groups on are of `more`."""
    good, spare = (has_spread(whole_rows(rewards), group_size) for rewards in (first, more))
    source = torch.arange(len(good), device=good.device)
    for part in torch.arange(len(good), device=good.device).chunk(world_size):
        gaps, fills = part[~good[part]], part[spare[part]]
        count = min(len(gaps), len(fills))
        source[gaps[:count]] = len(good) + fills[:count]
    return source


def _rows(groups: Int[Tensor, " groups"], group_size: int) -> list[int]:
    place = torch.arange(group_size, device=groups.device)
    return (groups[:, None] * group_size + place).flatten().tolist()


def _rewards(first: RewardBatch, more: RewardBatch, rows: list[int]) -> RewardBatch:
    def picked(a: Tensor, b: Tensor) -> Float[Tensor, "N F"] | Tensor:
        return torch.cat([a, b])[rows]

    asked = None
    if first.asked is not None and more.asked is not None:
        asked = picked(first.asked, more.asked)
    return replace(first, value=picked(first.value, more.value), valid=picked(first.valid, more.valid), asked=asked)


def picked(first: Rollout, more: Rollout, rows: list[int], key: str) -> Rollout:
    """Rows of two rollouts of one shape, numbered through; what they cost adds up.

    Raises:
        ValueError: naming `key`, where they carry traces.
    """
    if first.trace is not None or more.trace is not None:
        raise ValueError(f"{key}: traces of different lengths do not mix. Try: sampler.record_trace=false")
    tensors: dict[str, Any] = {
        name: torch.cat([value, getattr(more, name)])[rows]
        for name, value in vars(first).items()
        if isinstance(value, Tensor)
    }
    completions, examples = [*first.completions, *more.completions], [*first.examples, *more.examples]
    return replace(
        first,
        **tensors,
        completions=tuple(completions[n] for n in rows) if completions else (),
        examples=tuple(examples[n] for n in rows) if examples else (),
        num_forwards=first.num_forwards + more.num_forwards,
        num_tokens_forward=first.num_tokens_forward + more.num_tokens_forward,
    )
