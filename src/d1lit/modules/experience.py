"""What a rollout leaves behind for its inner updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d1lit.types import LogProbs, RewardBatch, Rollout, Verdict


@dataclass(frozen=True)
class Experience:
    """One micro-batch of a rollout, with everything that all its inner updates need and that stays fixed."""

    rollout: Rollout
    advantages: Tensor
    rewards: Tensor
    """[N] weighted sums."""
    old: tuple[LogProbs | None, ...]
    """Per inner update, under the weights that sampled; None where the loss has no use for it, or at inner update 0,
    where the current log-probs are the old ones."""
    ref: tuple[LogProbs | None, ...]
    num_units: tuple[float, ...]
    """Per inner update: unit weight of the global batch."""
    num_rollouts: float
    step: int


def reward_batch(
    verdicts: dict[str, list[Verdict]], weights: Mapping[str, float], device: torch.device, step: int
) -> RewardBatch:
    """Verdicts by reward part as tensors, one column a part."""
    names = list(verdicts)
    value = torch.tensor([[v.value for v in verdicts[name]] for name in names], dtype=torch.float32).T
    valid = torch.tensor([[v.outcome in ("ok", "unparsed") for v in verdicts[name]] for name in names]).T
    weight = torch.tensor([weights[name] for name in names], dtype=torch.float32)
    return RewardBatch(value.to(device), valid.to(device), weight.to(device), step)


def detached(logprobs: LogProbs) -> LogProbs:
    """The same likelihood as a constant."""
    parts = {name: value.detach() for name, value in logprobs.parts.items()}
    return LogProbs(logprobs.value.detach(), logprobs.weight, parts)


def restored(tree: dict[str, Any], device: torch.device) -> Experience:
    """An experience from the plain tree a checkpoint holds (`dataclasses.asdict` made it)."""

    def placed(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def logprobs(entries: Sequence[Any]) -> tuple[LogProbs | None, ...]:
        return tuple(
            None
            if e is None
            else LogProbs(placed(e["value"]), placed(e["weight"]), {k: placed(v) for k, v in e["parts"].items()})
            for e in entries
        )

    rollout = {name: placed(value) for name, value in tree["rollout"].items()}
    rollout |= {"completions": tuple(rollout["completions"]), "examples": tuple(rollout["examples"])}
    return Experience(
        rollout=Rollout(**rollout),
        advantages=placed(tree["advantages"]),
        rewards=placed(tree["rewards"]),
        old=logprobs(tree["old"]),
        ref=logprobs(tree["ref"]),
        num_units=tuple(tree["num_units"]),
        num_rollouts=tree["num_rollouts"],
        step=tree["step"],
    )
