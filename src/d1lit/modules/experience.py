"""What a rollout leaves behind for its inner updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from d1lit.advantages import judged_mean
from d1lit.types import LogProbs, LossInputs, RewardBatch, Rollout, Verdict


@dataclass(frozen=True)
class Experience:
    """One micro-batch of a rollout, with everything that all its inner updates need and that stays fixed."""

    rollout: Rollout
    advantages: Tensor
    """[N] or [N U]."""
    rewards: Tensor
    """[N]: weighted sum of each rollout's reward parts; the mean of its judged group where a judge failed."""
    old: tuple[LogProbs | None, ...]
    """Per inner update, under the weights that sampled; None where the loss has no use for it, or at inner update 0,
    where the current log-probs are the old ones."""
    ref: tuple[LogProbs | None, ...]
    num_units: tuple[float, ...]
    """Per inner update: unit weight of the global batch."""
    num_rollouts: float
    """Rollouts in the global batch of an update."""
    step: int
    """Which rollout of the run this is; draws hang on it."""


def all_finite(inputs: LossInputs) -> Tensor:
    """Whether every scored log-prob, reward and advantage is finite: a boolean scalar, without a wait for the device.

    A loss can hide it: the clipped ratio to an old log-prob of -inf has a finite loss and no gradient.
    """
    numbers = [inputs.rewards, inputs.advantages]
    for logprobs in (inputs.logprobs, inputs.old, inputs.ref):
        if logprobs is not None:
            numbers.append(torch.where(logprobs.weight > 0, logprobs.value.detach(), 0.0))
    return torch.stack([torch.isfinite(n).all() for n in numbers]).all()


def reward_batch(
    verdicts: dict[str, list[Verdict]], weights: Mapping[str, float], device: torch.device, step: int
) -> RewardBatch:
    """Verdicts by reward part as tensors, one column a part."""
    names = list(verdicts)
    value = torch.tensor([[v.value for v in verdicts[name]] for name in names], dtype=torch.float32).T
    valid = torch.tensor([[v.outcome not in ("timeout", "error") for v in verdicts[name]] for name in names]).T
    asked = torch.tensor([[v.outcome != "skipped" for v in verdicts[name]] for name in names]).T
    weight = torch.tensor([weights[name] for name in names], dtype=torch.float32)
    return RewardBatch(value.to(device), valid.to(device), weight.to(device), step, asked.to(device))


def is_judged(rewards: RewardBatch) -> Tensor:
    """[N], or [N S] of steps: whether every part that weighs anything could judge the text."""
    return (rewards.valid | (rewards.weights == 0)).all(-1)


def whole_rows(rewards: RewardBatch) -> RewardBatch:
    """The same, where a completion that one part failed to judge counts as not judged at all.

    What the other parts sum up to would hold a silent zero for the failed one.
    """
    return replace(rewards, valid=rewards.valid & is_judged(rewards)[..., None])


def neutral_totals(rewards: RewardBatch, group_size: int) -> Tensor:
    """[N] sums, and the mean of its judged group for a completion that was not judged, so that it says nothing."""
    total, counts = (value.view(-1, group_size) for value in (rewards.total, is_judged(rewards)))
    return torch.where(counts, total, judged_mean(total, counts)).flatten()


def detached(logprobs: LogProbs) -> LogProbs:
    """The same likelihood as a constant."""
    parts = {name: value.detach() for name, value in logprobs.parts.items()}
    return LogProbs(logprobs.value.detach(), logprobs.weight, parts)


def dealt(saved: Sequence[Sequence[Experience]], world_size: int, num_micro: int) -> list[list[Experience]]:
    """The experience of every rank and micro-batch of one world, cut anew for another; the rows keep their order.

    Raises:
        ValueError: if the parts cannot be laid below each other, naming the way out.
    """
    if len(saved) == world_size and all(len(parts) in (0, num_micro) for parts in saved):
        return [list(parts) for parts in saved]
    parts = [part for rank in saved for part in rank]
    if not parts:
        return [[] for _ in range(world_size)]
    try:
        whole = _joined(parts)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"trainer.devices: the experience of {len(saved)} processes cannot be cut for {world_size} ({error}). "
            f"Try: trainer.devices={len(saved)}, or a fresh run from the stage's start [E601]"
        ) from None
    rows = len(whole.rewards) // (world_size * num_micro)
    pieces = [_cut(whole, n * rows, (n + 1) * rows) for n in range(world_size * num_micro)]
    return [pieces[rank * num_micro : (rank + 1) * num_micro] for rank in range(world_size)]


def _joined(parts: Sequence[Experience]) -> Experience:
    """Experiences of one rollout below each other: the inverse of `_cut`."""
    rollouts = [part.rollout for part in parts]
    names = [name for name, value in vars(rollouts[0]).items() if isinstance(value, Tensor) and name not in _BY_STEP]
    tensors: dict[str, Any] = {name: torch.cat([vars(r)[name] for r in rollouts]) for name in names}
    rollout = replace(
        rollouts[0],
        **tensors,
        **{name: _joined_steps([vars(r)[name] for r in rollouts], untaken) for name, untaken in _BY_STEP.items()},
        completions=tuple(text for r in rollouts for text in r.completions),
        examples=tuple(example for r in rollouts for example in r.examples),
    )
    return replace(
        parts[0],
        rollout=rollout,
        advantages=torch.cat([part.advantages for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        old=tuple(_joined_logprobs(column) for column in zip(*(part.old for part in parts), strict=True)),
        ref=tuple(_joined_logprobs(column) for column in zip(*(part.ref for part in parts), strict=True)),
    )


_BY_STEP: dict[str, int | None] = {"trace": None, "predictions": -1, "prediction_logprobs": 0}
"""Records [S N C], and what they hold of a step that a rollout did not take; None: its last canvas."""


def _joined_steps(records: Sequence[Tensor | None], untaken: int | None) -> Tensor | None:
    """Records of steps side by side, the shorter ones made as long as the longest."""
    there = [record for record in records if record is not None]
    if not there:
        return None
    longest = max(map(len, there))
    whole = []
    for record in there:
        rest = record[-1:].expand(longest - len(record), -1, -1)
        whole.append(torch.cat([record, rest if untaken is None else torch.full_like(rest, untaken)]))
    return torch.cat(whole, dim=1)


def _joined_logprobs(column: Sequence[LogProbs | None]) -> LogProbs | None:
    there = [logprobs for logprobs in column if logprobs is not None]
    if not there:
        return None
    if any(len(value) != len(logprobs.value) for logprobs in there for value in logprobs.parts.values()):
        raise ValueError("a part of the likelihood is not one number or row for each rollout")
    parts = {name: torch.cat([logprobs.parts[name] for logprobs in there]) for name in there[0].parts}
    value, weight = (torch.cat([getattr(logprobs, name) for logprobs in there]) for name in ("value", "weight"))
    return LogProbs(value, weight, parts)


def _cut(whole: Experience, start: int, stop: int) -> Experience:
    """The rollouts from `start` up to, not including, `stop`; counts of the global batch stay."""

    def cut(logprobs: LogProbs | None) -> LogProbs | None:
        if logprobs is None:
            return None
        parts = {name: value[start:stop] for name, value in logprobs.parts.items()}
        return LogProbs(logprobs.value[start:stop], logprobs.weight[start:stop], parts)

    return replace(
        whole,
        rollout=whole.rollout.rows(start, stop),
        advantages=whole.advantages[start:stop],
        rewards=whole.rewards[start:stop],
        old=tuple(map(cut, whole.old)),
        ref=tuple(map(cut, whole.ref)),
    )


def as_tree(record: Any) -> Any:
    """A record as nested plain dictionaries, for a checkpoint.

    As `dataclasses.asdict`, which copies of a view all that lies behind it: of a micro-batch, the whole rollout.
    """
    if isinstance(record, Tensor):
        return record.clone()
    if is_dataclass(record) and not isinstance(record, type):
        return {field.name: as_tree(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, Mapping):
        return {key: as_tree(value) for key, value in record.items()}
    return [as_tree(value) for value in record] if isinstance(record, tuple | list) else record


def restored(tree: dict[str, Any], device: torch.device) -> Experience:
    """An experience from the plain tree a checkpoint holds (`as_tree` made it)."""

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
