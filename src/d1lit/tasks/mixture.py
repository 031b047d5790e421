"""Several tasks at once in stated shares: one model learns them all, each keeping its rows, prompt and grader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeVar

from d1lit.rewards.parts import Grade
from d1lit.tasks.prompting import Template, graded_text
from d1lit.tasks.source import Split
from d1lit.tasks.task import Overlap, Task
from d1lit.types import Example, Reward, Verdict

Judged = TypeVar("Judged")


@dataclass(frozen=True)
class MixedJudges:
    """Grades each completion by the judges of its example's task."""

    members: Mapping[str, Task]

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """One grade for each completion of the matching example."""
        return self._by_task({name: task.judges.grade for name, task in self.members.items()}, completions, examples)

    def counted(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        """Of each completion the verdict that counts in its example's task."""
        return self._by_task({name: task.counted for name, task in self.members.items()}, completions, examples)

    @staticmethod
    def _by_task(
        judges: Mapping[str, Callable[[Sequence[str], Sequence[Example]], list[Judged]]],
        completions: Sequence[str],
        examples: Sequence[Example],
    ) -> list[Judged]:
        judged: dict[int, Judged] = {}
        for name, judge in judges.items():
            mine = [n for n, example in enumerate(examples) if example["task"] == name]
            found = judge([completions[n] for n in mine], [examples[n] for n in mine])
            judged |= dict(zip(mine, found, strict=True))
        return [judged[n] for n in range(len(completions))]


@dataclass(frozen=True)
class MixedTask:
    """One model on several tasks at once (the unified training of d1, arXiv 2504.12216).

    An epoch holds the tasks' training rows in the stated shares; the rows of a task that is too small for its share
    come several times. Every row carries its task's name under `task`. Each task is evaluated by itself.
    """

    name: str
    members: Mapping[str, Task]
    shares: Mapping[str, float | int]
    """Of each member; only their proportions matter. 0 leaves a task out."""
    grader: Literal["strict", "d1"]
    scales: Mapping[str, Any]
    """The values that each model scale brings with it; read by the configuration, not here."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.shares) ^ set(self.members))
        if unknown:
            raise ValueError(f"task.shares: {unknown[0]!r} is not in both shares and members. Try: one share a member")
        if min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise ValueError(f"task.shares: {dict(self.shares)} are no shares. Try: numbers from 0, one above it")

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The members whose share is above 0."""
        return {name: task for name, task in self.members.items() if self.shares[name] > 0}

    def portions(self, count: int | None) -> list[tuple[Task, int | None]]:
        """Each member with its share of `count` rows, as whole numbers that add up to it; None: each all it has."""
        if count is None:
            return [(task, None) for task in self.tasks.values()]
        whole = sum(self.shares[name] for name in self.tasks)
        exact = {name: count * self.shares[name] / whole for name in self.tasks}
        given = {name: int(share) for name, share in exact.items()}
        largest_rests = sorted(self.tasks, key=lambda name: given[name] - exact[name])
        for name in largest_rests[: count - sum(given.values())]:
            given[name] += 1
        return [(task, given[name]) for name, task in self.tasks.items() if given[name]]

    # ------------------------------------------------------------------------------------------ as a task is asked

    @property
    def synthetic(self) -> bool:
        """Whether any member's test rows only stand in for a real data set."""
        return any(task.synthetic for task in self.tasks.values())

    @property
    def display_name(self) -> str:
        """The name that stands beside every number of the whole."""
        return f"{self.name}-synthetic" if self.synthetic else self.name

    @cached_property
    def judges(self) -> MixedJudges:
        """The members' graders, by each row's task."""
        return MixedJudges(self.tasks)

    @property
    def counted(self) -> Reward:
        """The verdict that counts, by each row's task: what a reward pays for."""
        return self.judges.counted

    @property
    def baselines(self) -> dict[str, Any]:
        """None of its own: each member's stand with its evaluation."""
        return {}

    @property
    def val_rows(self) -> int:
        """Validation rows of all members."""
        return sum(task.val_rows for task in self.tasks.values())

    @property
    def max_prompt_length(self) -> int:
        """Most tokens of a training prompt of any member."""
        return max(task.max_prompt_length for task in self.tasks.values())

    @property
    def max_test_prompt_length(self) -> int:
        """Most tokens of a validation or test prompt of any member."""
        return max(task.max_test_prompt_length for task in self.tasks.values())

    @property
    def template(self) -> Template:
        """The first member's template, after the check that all are graded alike.

        Raises:
            ValueError: if the prompts put different words into the model's mouth before what is graded.
        """
        templates = [task.template for task in self.tasks.values()]
        if len({graded_text(template, "") for template in templates}) > 1:
            raise ValueError("task.members: their prompts end in different graded prefills. Try: templates without one")
        return templates[0]

    @property
    def overlap(self) -> Overlap:
        """The members' counts, added up."""
        parts = [task.overlap for task in self.tasks.values()]
        return Overlap(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(Overlap)})

    @property
    def commits(self) -> dict[str, str | None]:
        """The members' commits, by name and key."""
        return {f"{name} {key}": commit for name, task in self.tasks.items() for key, commit in task.commits.items()}

    def rows(self, split: Split) -> list[dict[str, Any]]:
        """Examples of a split: train in the stated shares, the others each once."""
        own = {name: [{**row, "task": name} for row in task.rows(split)] for name, task in self.tasks.items()}
        return self._in_shares(own) if split == "train" else [row for rows in own.values() for row in rows]

    def encode(self, split: Split, tokenizer: Any) -> tuple[list[list[int]], list[Example], int]:
        """Prompt ids of a split by each member's template, the rows kept, and how many were dropped as too long."""
        pairs: dict[str, list[tuple[list[int], Example]]] = {}
        dropped = 0
        for name, task in self.tasks.items():
            ids, kept, lost = task.encode(split, tokenizer)
            pairs[name] = [(i, {**example, "task": name}) for i, example in zip(ids, kept, strict=True)]
            dropped += lost
        mixed = self._in_shares(pairs) if split == "train" else [pair for part in pairs.values() for pair in part]
        return [ids for ids, _ in mixed], [example for _, example in mixed], dropped

    def worked(self, example: Example) -> str | None:
        """A correct answer to a row, as its own task writes it."""
        return self.tasks[example["task"]].worked(example)

    def _in_shares(self, rows: Mapping[str, list[Any]]) -> list[Any]:
        """An epoch: as long as the member that has most rows for its share needs, the others' rows repeated."""
        per_share = max(len(rows[name]) / self.shares[name] for name in self.tasks)
        mixed = []
        for name in self.tasks:
            count = max(1, round(per_share * self.shares[name]))
            mixed += [rows[name][n % len(rows[name])] for n in range(count)]
        return mixed


AnyTask = Task | MixedTask
"""What a run trains on."""
