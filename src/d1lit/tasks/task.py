"""A task: rows in three splits that never touch, its prompt, its grader, and text to pretrain and fine-tune on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from d1lit.rewards.parts import Counted
from d1lit.tasks.demonstrations import read_demonstrations
from d1lit.tasks.prompting import Template, encode_prompts, load_template
from d1lit.tasks.reading import Columns, Row, read_rows
from d1lit.tasks.source import Forbidden, NoAnswer, Source, Split, fingerprint, private_rng
from d1lit.types import Example

BUILTIN = "builtin"
OWN_ROWS = "task"


@dataclass(frozen=True)
class Overlap:
    """How many rows each split has, and what was taken out to keep the splits apart."""

    train_rows: int
    val_rows: int
    test_rows: int
    other_rows: int
    """Data rows that are no instance of the task (four-number Countdown rows), in train and test together."""
    unanswered_rows: int
    """Train rows of the data without a gold answer; in test such a row is an error."""
    repeated_rows: int
    """Train rows that repeat an earlier one."""
    removed_rows: int
    """Train rows taken out because their question, or where required their solution, is in test."""
    unused_val_rows: int
    """Train rows that share a solution with validation and are used in neither."""
    shared_solutions: int
    """Distinct solutions (Sudoku grids) of test that also occur in train or validation."""
    test_solutions: int
    """Distinct solutions of test."""

    def lines(self) -> list[str]:
        """What a run prints, one fact a line."""
        facts = [f"rows: {self.train_rows} train, {self.val_rows} validation, {self.test_rows} test"]
        if self.other_rows:
            facts.append(f"left out, no instance of the task: {self.other_rows} rows")
        if self.unanswered_rows:
            facts.append(f"left out of train, no gold answer: {self.unanswered_rows} rows")
        if self.repeated_rows:
            facts.append(f"left out of train, repeated: {self.repeated_rows} rows")
        if self.removed_rows:
            facts.append(f"left out of train, found in test: {self.removed_rows} rows")
        if self.unused_val_rows:
            facts.append(f"left out of train, solution used by validation: {self.unused_val_rows} rows")
        if self.shared_solutions:
            facts.append(
                f"solutions of test that also occur in train: {self.shared_solutions} of {self.test_solutions} "
                "(task.split=by_solution keeps them out)"
            )
        return facts

    def record(self) -> dict[str, int]:
        """The counts, for results files."""
        return asdict(self)


@dataclass(frozen=True)
class _Splits:
    rows: Mapping[Split, list[dict[str, Any]]]
    overlap: Overlap
    forbidden: Forbidden
    """True for what test or validation holds."""


@dataclass(frozen=True)
class Task:
    """Rows, prompt and grader of one task.

    Args:
        name: what the task is called in tables, before any `-synthetic`.
        source: generator of built-in rows and reader of data rows.
        train_data: `builtin`, a path, or a hub id `owner/name[@revision][:subset[:split]]`.
        test_data: the same for the test rows; every row is kept, in order.
        columns: column of each field in the data.
        num_builtin: how many rows `builtin` generates for `train` (validation included) and `test`.
        val_rows: validation rows, cut from train.
        split: `by_question` keeps test questions out of train; `by_solution` test solutions too. Where the test rows
            are builtin, solutions are always kept apart.
        data_seed: seed of the generated rows and of the validation cut; not the run's seed, so that runs compare.
        prompt: a template's name, or the path of a template file.
        max_prompt_length: most tokens of a training prompt.
        max_test_prompt_length: most tokens of a validation or test prompt; a longer test prompt is always an error.
        overlong: what becomes of longer training and validation prompts: `error`, `drop` (counted), or `cut_left`
            (d1's: they lose their head).
        demonstration_data: `task` for demonstrations made of the task's own train rows, or a path or hub id.
        demonstration_columns: columns of `question` and `completion` in that data.
        demonstration_prompt: template of demonstrations that bring their own questions.
        short_traces: compact traces (calculator marks, joined steps) instead of full rationales.
        grader: whose verdict counts, in reward, validation and test; every evaluated row keeps both.
        judges: the task's one grader, which gives both verdicts.
        baselines: answers that need no model, by name; each from the rows to answer and the train rows.
        scales: the values that each model scale brings with it; read by the configuration, not here.
    """

    name: str
    source: Source
    train_data: str
    test_data: str
    columns: Columns
    num_builtin: Mapping[str, int]
    val_rows: int
    split: str
    data_seed: int
    prompt: str
    max_prompt_length: int
    max_test_prompt_length: int
    overlong: str
    demonstration_data: str
    demonstration_columns: Columns
    demonstration_prompt: str
    short_traces: bool
    grader: Literal["strict", "d1"]
    judges: Any
    baselines: Mapping[str, Callable[[Sequence[Example], Sequence[Example]], list[str]]]
    scales: Mapping[str, Any]

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("split", self.split, ("by_question", "by_solution")),
            ("overlong", self.overlong, ("error", "drop", "cut_left")),
            ("grader", self.grader, ("strict", "d1")),
        ):
            if value not in allowed:
                raise ValueError(f"task.{key}: {value!r} is not known. Try: {' or '.join(allowed)}")
        unknown = set(self.columns) - {*self.source.required, *self.source.optional}
        if unknown:
            fields = (*self.source.required, *self.source.optional)
            raise ValueError(f"task.columns: no field {min(unknown)!r}. Try: one of {', '.join(fields)} [E205]")
        for key, value, least in (
            ("val_rows", self.val_rows, 0),
            ("max_prompt_length", self.max_prompt_length, 1),
            ("max_test_prompt_length", self.max_test_prompt_length, 1),
            ("num_builtin.train", self.num_builtin.get("train", 0), 1),
            ("num_builtin.test", self.num_builtin.get("test", 0), 1),
        ):
            if value < least:
                raise ValueError(f"task.{key}: {value} is below {least}. Try: {least} or more")

    @property
    def synthetic(self) -> bool:
        """Whether the test rows are generated and stand in for a real data set."""
        return self.source.synthetic and self.test_data == BUILTIN

    @property
    def display_name(self) -> str:
        """The name that stands beside every number: with `-synthetic` where the test rows only stand in."""
        return f"{self.name}-synthetic" if self.synthetic else self.name

    @cached_property
    def counted(self) -> Counted:
        """The verdict that counts, of the one grader: what a reward pays for."""
        return Counted(self.judges, self.grader)

    @cached_property
    def template(self) -> Template:
        """The prompt template of the task's rows."""
        return load_template(self.prompt)

    @cached_property
    def demonstration_template(self) -> Template:
        """The prompt template that goes with `demonstrations`."""
        return self.template if self.demonstration_data == OWN_ROWS else load_template(self.demonstration_prompt)

    def portions(self, count: int | None) -> list[tuple[Task, int | None]]:
        """The tasks that share `count` rows, and how many each: this one alone."""
        return [(self, count)]

    def rows(self, split: Split) -> list[dict[str, Any]]:
        """Examples of a split, in a fixed order. Those of test need no training data.

        Raises:
            ValueError: one line, where the data is at fault.
        """
        return self._test[0] if split == "test" else self._splits.rows[split]

    @property
    def overlap(self) -> Overlap:
        """What was done to keep the splits apart."""
        return self._splits.overlap

    @cached_property
    def commits(self) -> dict[str, str | None]:
        """Commit of what was read so far, by the key that names it; None for a file."""
        return {}

    def encode(self, split: Split, tokenizer: Any) -> tuple[list[list[int]], list[Example], int]:
        """Prompt ids of a split, the rows kept, and how many were dropped as too long (never any of test).

        Train prompts obey `max_prompt_length`, which keeps rollouts cheap; validation and test the longer of the two.
        """
        longer = max(self.max_prompt_length, self.max_test_prompt_length)
        rows, template = self.rows(split), self.template
        if split == "train":
            return encode_prompts(rows, template, tokenizer, self.max_prompt_length, self.overlong)
        overlong = "error" if split == "test" else self.overlong
        return encode_prompts(rows, template, tokenizer, longer, overlong, "task.max_test_prompt_length")

    def corpus(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Generated rows with a `completion` (and the `manner` of its author) to pretrain a tiny base model on."""
        rows = self.source.traces("corpus", count, seed, self._splits.forbidden)
        return [{"id": f"{self.name}-corpus-{seed}-{index}", **row} for index, row in enumerate(rows)]

    def demonstrations(self, count: int | None, seed: int) -> list[dict[str, Any]]:
        """Up to `count` rows with a `completion` for SFT; fewer where the data has fewer, none of them from test.

        Args:
            count: how many; None for all that the data has (for builtin rows: as many as train has).
            seed: which ones, and in which order.

        Raises:
            ValueError: where the data is at fault or has no worked answers.
        """
        if self.demonstration_data != OWN_ROWS:
            return _sample(self._outside_demonstrations[0], count, seed)
        if self.train_data == BUILTIN:
            count = self.num_builtin["train"] if count is None else count
            rows = self.source.traces("demonstrations", count, seed, self._splits.forbidden)
            return [{"id": f"{self.name}-sft-{seed}-{index}", **row} for index, row in enumerate(rows)]
        worked = ((row, self.source.worked(row, self.short_traces)) for row in self.rows("train"))
        found = [{**row, "completion": completion} for row, completion in worked if completion is not None]
        if not found:
            raise ValueError(
                f"task.demonstration_data: no row of {self.train_data} has a worked solution. "
                "Try: task.short_traces=true, or task.demonstration_data=PATH of prompts and completions [E305]"
            )
        return _sample(found, count, seed)

    def worked(self, example: Example) -> str | None:
        """A correct answer to one of the task's own rows, as a completion; None where the row has none."""
        answer = self.source.worked(example, self.short_traces)
        return None if answer is None else answer.removeprefix(self.template.prefill)

    def validation_demonstrations(self) -> list[dict[str, Any]]:
        """Rows with a `completion` that no stage trains on: worked validation rows, or those cut from outside data."""
        if self.demonstration_data != OWN_ROWS:
            return self._outside_demonstrations[1]
        worked = ((row, self.source.worked(row, self.short_traces)) for row in self.rows("val"))
        return [{**row, "completion": completion} for row, completion in worked if completion is not None]

    @cached_property
    def _outside_demonstrations(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Demonstrations from data, without those whose question is in test (white space aside); and held-out ones.

        One in a hundred is held out, as in d1 (SFT/sft_train.py); there by a shuffle, here by a hash of the question.
        """
        key = "task.demonstration_data"
        found, self.commits[key] = read_demonstrations(self.demonstration_data, key, self.demonstration_columns)
        test = {"".join(row["question"].split()) for row in self.rows("test")}
        kept = [row for row in found if "".join(row["question"].split()) not in test]
        if not kept:
            raise ValueError(f"{key}: every row of {self.demonstration_data} is in test. Try: other data [E305]")
        questions = sorted({row["question"] for row in kept}, key=self._rank)
        held = set(questions[: len(questions) // 100])
        train = [row for row in kept if row["question"] not in held]
        return train, [row for row in kept if row["question"] in held]

    @cached_property
    def _test(self) -> tuple[list[dict[str, Any]], int]:
        """Test rows; how many rows of the data were no instance of the task."""
        rows, other, _ = self._load("test", lambda example: False)
        return rows, other

    @cached_property
    def _splits(self) -> _Splits:
        source = self.source
        test, other_test = self._test
        test_identities = {source.identity(row) for row in test}
        test_groups = {source.group(row) for row in test}
        apart = test_groups if self.split == "by_solution" or self.test_data == BUILTIN else set()

        def in_test(example: Example) -> bool:
            return source.identity(example) in test_identities or source.group(example) in apart

        loaded, other_train, unanswered = self._load("train", in_test)
        unique = list({source.identity(row): row for row in reversed(loaded)}.values())[::-1]
        allowed = [row for row in unique if not in_test(row)]
        train, val, val_groups = self._cut_validation(allowed)
        if not train:
            raise ValueError(
                f"task.train_data: {self.train_data} has {len(loaded)} rows and none is left for training (test and "
                f"validation take them). Try: other data, or a smaller task.val_rows than {self.val_rows} [E305]"
            )
        overlap = Overlap(
            train_rows=len(train),
            val_rows=len(val),
            test_rows=len(test),
            other_rows=other_train + other_test,
            unanswered_rows=unanswered,
            repeated_rows=len(loaded) - len(unique),
            removed_rows=len(unique) - len(allowed),
            unused_val_rows=len(allowed) - len(train) - len(val),
            shared_solutions=len(test_groups & {source.group(row) for row in (*train, *val)}),
            test_solutions=len(test_groups),
        )
        return _Splits(
            rows={"train": train, "val": val, "test": test},
            overlap=overlap,
            forbidden=lambda example: in_test(example) or source.group(example) in val_groups,
        )

    def _load(self, split: Literal["train", "test"], forbidden: Forbidden) -> tuple[list[dict[str, Any]], int, int]:
        """Rows of one location with their ids; how many rows were no instance of the task, and how many unanswered."""
        location, key = (self.train_data, "task.train_data") if split == "train" else (self.test_data, "task.test_data")
        if location == BUILTIN:
            rows = self.source.generate(split, self.num_builtin[split], self.data_seed, forbidden)
            return [self._with_id(row) for row in rows], 0, 0
        found: list[tuple[Row, dict[str, Any]]] = []
        other = unanswered = 0
        read = read_rows(location, key, self.columns, self.source.required, split)
        self.commits[key] = read[0].commit
        for row in read:
            try:
                example = self.source.example(row.values, row.place)
            except NoAnswer:
                if split == "test":
                    raise
                unanswered += 1
                continue
            if example is None:
                other += 1
            else:
                found.append((row, example))
        if not found:
            raise ValueError(
                f"{key}: none of the {other + unanswered} rows of {location} is a {self.name} problem. "
                "Try: other data [E305]"
            )
        rows = [row if "id" in row else self._with_id(row) for row in _with_given_ids(found)]
        return _numbered(rows, split), other, unanswered

    def _with_id(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with an id made of what it says, so that it keeps it in any file and order."""
        return {"id": f"{self.name}-{fingerprint(self.source.identity(row), row['answer'])}", **row}

    def _cut_validation(
        self, rows: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[str]]:
        """Train rows, validation rows and the groups of these: a function of what the rows say and of `data_seed`.

        Whole groups go to validation, those with the smallest hash, until there are `val_rows` rows in at least
        `val_rows` groups or an eighth of all groups; then the `val_rows` rows with the smallest hash are used.
        """
        if self.val_rows == 0:
            return rows, [], set()
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(self.source.group(row), []).append(row)
        enough_groups = min(self.val_rows, len(groups) // 8)
        chosen: set[str] = set()
        candidates: list[dict[str, Any]] = []
        for group in sorted(groups, key=self._rank):
            if len(candidates) >= self.val_rows and len(chosen) >= enough_groups:
                break
            chosen.add(group)
            candidates += groups[group]
        used = {row["id"] for row in sorted(candidates, key=lambda row: self._rank(row["id"]))[: self.val_rows]}
        train = [row for row in rows if self.source.group(row) not in chosen]
        return train, [row for row in rows if row["id"] in used], chosen

    def _rank(self, text: str) -> tuple[str, str]:
        return fingerprint("validation", self.data_seed, text), text


def _with_given_ids(found: Sequence[tuple[Row, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The examples, with the ids that the data brings; one id for two different rows is refused."""
    rows: list[dict[str, Any]] = []
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for row, example in found:
        if "id" not in row.values:
            rows.append(example)
            continue
        given = str(row.values["id"])
        place, earlier = first.setdefault(given, (row.place, example))
        if earlier != example:
            where = place.rsplit(":", 1)[-1]
            raise ValueError(
                f"{row.place}: id {given!r} stands at line {where} too, with another row. Try: unique ids [E304]"
            )
        rows.append({"id": given, **example})
    return rows


def _numbered(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Rows with unique ids: a test file may repeat a row, and every one of its rows is evaluated."""
    if split != "test":
        return rows
    seen: dict[str, int] = {}
    numbered = []
    for row in rows:
        seen[row["id"]] = seen.get(row["id"], 0) + 1
        numbered.append(row if seen[row["id"]] == 1 else row | {"id": f"{row['id']}#{seen[row['id']]}"})
    return numbered


def _sample(rows: list[dict[str, Any]], count: int | None, seed: int) -> list[dict[str, Any]]:
    """Up to `count` rows in an order that the seed decides."""
    order = list(range(len(rows)))
    private_rng("demonstrations", seed).shuffle(order)
    return [rows[place] for place in order[:count]]
