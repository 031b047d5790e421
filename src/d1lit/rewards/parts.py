"""Rewards made of weighted parts, and graders that keep two verdicts of every answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

from d1lit.types import Example, Outcome, Reward, Verdict

LARGEST = 3.4e38
"""What a value may be: float32 holds no more."""


@dataclass(frozen=True)
class RewardParts:
    """Named parts of a reward and their weights; the sum is taken later, where failed parts can be left out."""

    parts: Mapping[str, Reward]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("reward.parts: empty. Try: at least one part")
        without_weight = sorted(set(self.parts) - set(self.weights))
        without_part = sorted(set(self.weights) - set(self.parts))
        if without_weight or without_part:
            raise ValueError(
                f"reward.weights: parts without a weight {without_weight}, weights without a part {without_part}. "
                "Try: one weight for every part"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in their order."""
        return tuple(self.parts)

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> dict[str, list[Verdict]]:
        """Verdicts of every part, in the order of the completions; a value that is no number is its judge's error."""
        return {name: [_numbered(v) for v in part(completions, examples)] for name, part in self.parts.items()}

    def judged_by(self, grader: Reward) -> RewardParts:
        """The same reward, the task's grader handed to every part that waits for one.

        Args:
            grader: the verdict of the task's grader that counts.

        Raises:
            ValueError: a waiting part lacks another argument, or refuses its values.
        """
        parts = {}
        for name, part in self.parts.items():
            try:
                parts[name] = _completed(part, grader)
            except TypeError as error:
                raise ValueError(f"reward.parts.{name}: {error}. Try: what its class asks for [E205]") from None
        return replace(self, parts=parts)


def _numbered(verdict: Verdict) -> Verdict:
    return verdict if abs(verdict.value) <= LARGEST else replace(verdict, value=0.0, outcome="error")


def _completed(part: Reward, grader: Reward) -> Reward:
    """A part that was bound with `_partial_: true` and waits to be made; any other as it is."""
    if isinstance(part, OnTask):
        return replace(part, reward=_completed(part.reward, grader))
    if not isinstance(part, partial):
        return part
    if "grader" in inspect.signature(part.func).parameters:
        return part(**{"grader": grader} | part.keywords)  # one that its YAML names stays
    return part() if isinstance(part.func, type) else part  # a function of texts and rows is a reward already


@dataclass(frozen=True)
class OnTask:
    """A reward that judges the examples of one task of a mixture and skips the others."""

    task: str
    reward: Reward

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        """Verdicts in the order of the completions."""
        mine = [n for n, example in enumerate(examples) if example["task"] == self.task]
        verdicts = [Verdict(0.0, "skipped")] * len(completions)
        for n, verdict in zip(
            mine, self.reward([completions[n] for n in mine], [examples[n] for n in mine]), strict=True
        ):
            verdicts[n] = verdict
        return verdicts


def mixed_reward(rewards: Mapping[str, RewardParts]) -> RewardParts:
    """The parts of several tasks' rewards side by side, named `task/part`, each judging its own task's rows only."""
    parts = {f"{task}/{name}": OnTask(task, part) for task, own in rewards.items() for name, part in own.parts.items()}
    weights = {f"{task}/{name}": weight for task, own in rewards.items() for name, weight in own.weights.items()}
    return RewardParts(parts, weights)


def outcome_fraction(verdicts: Mapping[str, Sequence[Verdict]], outcome: Outcome) -> float:
    """Share of completions where at least one part ended with `outcome`."""
    rows = list(zip(*verdicts.values(), strict=True))
    return sum(any(v.outcome == outcome for v in row) for row in rows) / len(rows) if rows else 0.0


@dataclass(frozen=True)
class Grade:
    """Both verdicts of one completion, and what a task measures beside them."""

    strict: Verdict
    d1: Verdict
    extra: Mapping[str, float] = field(default_factory=dict)


class Judges(Protocol):
    """Whatever gives both verdicts on completions: a task's `Grader`, or those of a mixture's tasks."""

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """One grade for each completion of the matching example."""
        ...


@dataclass(frozen=True)
class Grader:
    """A task's one judge of answers, in reward, validation and test: strictly, and as the d1 paper did."""

    strict: Reward
    d1: Reward
    measures: Mapping[str, Reward] = field(default_factory=dict)

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """One grade for each completion of the matching example."""
        strict, paper = self.strict(completions, examples), self.d1(completions, examples)
        measured = {name: measure(completions, examples) for name, measure in self.measures.items()}
        return [
            Grade(strict[i], paper[i], {name: verdicts[i].value for name, verdicts in measured.items()})
            for i in range(len(completions))
        ]


@dataclass(frozen=True)
class Counted:
    """The verdict of a grader that counts, as a share of the most it can be (of Sudoku's cells under d1)."""

    grader: Grader
    counts: Literal["strict", "d1"]

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        """Verdicts in the order of the completions; the other verdict is not asked for."""
        judge: Reward = getattr(self.grader, self.counts)
        return [_as_share(verdict) for verdict in judge(completions, examples)]


def _as_share(verdict: Verdict) -> Verdict:
    if verdict.out_of == 1.0:
        return verdict
    return replace(verdict, value=verdict.value / verdict.out_of if verdict.out_of else 0.0, out_of=1.0)


def correctness(grader: Reward) -> Reward:
    """The part of a reward that is the task's grader itself."""
    return grader
