"""Evaluation: the sampler of training, the grader of training, every row once, written as it finishes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d1lit.data import EncodedRow, prompt_batch
from d1lit.rewards.parts import Grade, Judges
from d1lit.statistics import (
    effective_trials,
    mean_over_seeds,
    wilson_interval,
)
from d1lit.types import Draws, Example, MaskPredictor, Sampler

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationProtocol:
    """Everything a number depends on besides the weights; its hash names the evaluation."""

    task: str
    num_rows: int
    prompt_sha256: str
    settings: Mapping[str, Any]
    """Sampler, lengths, dtype, device, batch size, seed, versions: plain values."""

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EvaluationSummary:
    """One line of the results table."""

    n: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson 95 % interval of the accuracy, for `effective_n` trials."""
    effective_n: float
    """Independent trials: `n` for rows; fewer for cells, where those of one row share their fate."""
    d1_correct: float
    d1_out_of: float
    """The paper's grader counts cells for Sudoku, rows elsewhere."""
    effective_tokens: float | None
    """Mean tokens up to and including the first end-of-sequence; None where stored texts do not say."""
    truncated_fraction: float | None
    passes: float | None
    """Network passes over the whole canvas that a completion took, on average: what a cache leaves out is not counted,
    a guided pass counts twice. None where stored texts do not say."""
    unparsed_fraction: float
    refused_fraction: float
    """Share of answers beyond a bound of the grader, which were not read."""
    timeout_fraction: float
    """Share of answers whose judge was not done in time."""
    failed_fraction: float
    """Share of answers whose judge timed out or failed."""
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further metrics by name (cell accuracy, ...): mean and 95 % interval over rows."""


def evaluate(
    policy: MaskPredictor,
    sampler: Sampler,
    rows: Sequence[EncodedRow],
    decode: Callable[[Tensor], str],
    grader: Judges,
    draws: Draws,
    *,
    batch_size: int,
    device: torch.device,
    file: Path | None = None,
    place: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    graded_prefix: str = "",
    protocol_sha256: str = "",
) -> list[dict[str, Any]]:
    """Generate and grade every row, and return one record a row in row order.

    Rows of similar prompt length share a batch; a row's draws hang on its number alone, so neither batches nor ranks
    change what it is asked to sample. With `file`, records are appended as they finish and rows already in it are not
    generated again.

    Args:
        policy: the network.
        sampler: the sampler, at the evaluation's temperature and length.
        rows: all rows of the split.
        decode: completion ids to text up to the end of the sequence.
        grader: gives the strict and the d1 verdict.
        draws: source of the random numbers.
        batch_size: rows handed to the sampler at a time.
        device: where the network is.
        file: JSON lines file of this rank.
        place: rank and world size.
        progress: called with rows done and rows in all.
        graded_prefix: text the prompt already opened the completion with, put before it for grading.
        protocol_sha256: hash of the protocol, written into every record.

    Raises:
        ValueError: if the file holds a row twice, or rows of another protocol.
    """
    records = {} if file is None else records_by_index(file, protocol_sha256)
    rank, world_size = place
    mine = [n for n in range(len(rows)) if n % world_size == rank and n not in records]
    mine.sort(key=lambda n: (len(rows[n].prompt_ids), n))
    done = len(records)
    for start in range(0, len(mine), batch_size):
        numbers = mine[start : start + batch_size]
        new = _batch_records(policy, sampler, rows, numbers, decode, grader, draws, device, graded_prefix)
        new = [{**r, "protocol_sha256": protocol_sha256} for r in new]
        if file is not None:
            append_records(file, new)
        records |= {r["index"]: r for r in new}
        done += len(new)
        if progress is not None:
            progress(done, len(mine) + done - start - len(new))
    return [records[n] for n in sorted(records)]


def _batch_records(
    policy: MaskPredictor,
    sampler: Sampler,
    rows: Sequence[EncodedRow],
    numbers: Sequence[int],
    decode: Callable[[Tensor], str],
    grader: Judges,
    draws: Draws,
    device: torch.device,
    graded_prefix: str,
) -> list[dict[str, Any]]:
    prompts = prompt_batch([rows[n] for n in numbers], numbers, policy.pad_token_id).to(device)
    rollout = sampler(policy, prompts, 1, draws)
    texts = [graded_prefix + decode(ids) for ids in rollout.completion_ids.cpu()]
    examples = [rows[n].example for n in numbers]
    grades = grader.grade(texts, examples)
    ended = (rollout.completion_ids == policy.eos_token_id).any(dim=1).tolist()
    lengths = rollout.completion_mask.sum(1).tolist()
    # Of the batch: rows under a cache travel together, and padding is computed for all.
    canvas = prompts.prompt_ids.shape[1] + rollout.completion_ids.shape[1]
    passes = rollout.num_tokens_forward / (len(numbers) * canvas)
    return [
        record(n, rows[n].example, text, grade, length, not end, passes)
        for n, text, grade, length, end in zip(numbers, texts, grades, lengths, ended, strict=True)
    ]


def record(
    index: int,
    example: Example,
    text: str,
    grade: Grade,
    length: int | None,
    truncated: bool | None,
    passes: float | None = None,
) -> dict[str, Any]:
    """One graded row as it is stored; length, whether it was cut off and passes are None where nobody measured them."""
    return {
        "index": index,
        "id": example["id"],
        "question": example["question"],
        "answer": example["answer"],
        "completion": text,
        "strict": asdict(grade.strict),
        "d1": asdict(grade.d1),
        "extra": dict(grade.extra),
        "length": length,
        "truncated": truncated,
        "passes": passes,
        "example": dict(example),
    }


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as JSON lines; in ASCII, for half surrogates are text too."""
    return "".join(json.dumps(record) + "\n" for record in records)


def append_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines and push them to the disk; all of them or, where it has no room, none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _named(file), file.open("ab", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        left = json_lines(records).encode()
        try:
            while left:  # a disk that is filling up takes a part, and refuses the rest
                left = left[handle.write(left) :]
            os.fsync(handle.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(handle.fileno(), size)  # the next line would be glued to half of this one
            raise


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """An error of the disk says whose it is; that of a write does not know."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of an evaluation file; a last line that a crash cut short is dropped, from the file too."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(file, whole)
    return [json.loads(line) for line in whole.split("\n") if line]  # splitlines would break at U+2028 too


def records_by_index(file: Path, protocol_sha256: str) -> dict[int, dict[str, Any]]:
    """The finished rows of an evaluation that goes on.

    Raises:
        ValueError: if the file holds a row twice, or rows of another protocol.
    """
    found: dict[int, dict[str, Any]] = {}
    for row in read_records(file):
        if row["index"] in found:
            raise ValueError(f"evaluation: row {row['index']} stands twice in {file}. Try: another output folder")
        if row.get("protocol_sha256", "") != protocol_sha256:
            raise ValueError(f"evaluation: {file} holds rows of another protocol. Try: another output folder")
        found[row["index"]] = row
    return found


def keep_records(file: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop the records of a JSON lines file that a resumed run will write again."""
    records = read_records(file)
    kept = [record for record in records if keep(record)]
    if len(kept) < len(records):
        write_whole(file, json_lines(kept))


def write_whole(file: Path, text: str) -> None:
    """Replace a file's content in one step, so that a kill leaves the old or the new."""
    staging = file.with_name(f".{file.name}.staging")
    with _named(file):
        with staging.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(staging, file)


def check_coverage(records: Sequence[Mapping[str, Any]], num_rows: int) -> None:
    """Every row once.

    Raises:
        ValueError: if a row is missing or there twice.
    """
    seen = sorted(r["index"] for r in records)
    if seen != list(range(num_rows)):
        twice = sorted({n for n in seen if seen.count(n) > 1})
        missing = sorted(set(range(num_rows)) - set(seen))
        raise ValueError(
            f"evaluation: rows {missing[:5]} are missing, rows {twice[:5]} stand twice. Try: run it again [E507]"
        )


def summarise(records: Sequence[Mapping[str, Any]], grader: Literal["strict", "d1"]) -> EvaluationSummary:
    """Counts, means and 95 % intervals of a finished evaluation.

    Args:
        records: one a row.
        grader: whose verdict `correct` and `n` count. The strict one counts rows; d1's counts what the paper counts,
            which for Sudoku is empty cells.
    """
    rows = len(records)
    if grader == "strict":
        n, correct = rows, sum(r["strict"]["value"] >= 1.0 for r in records)
        trials = float(n)
    else:
        values, sizes = ([r["d1"][key] for r in records] for key in ("value", "out_of"))
        n, correct = round(sum(sizes)), round(sum(values))
        trials = effective_trials(values, sizes) if n != rows else float(n)
    accuracy = wilson_interval(correct / n * trials, trials)
    names = sorted({name for r in records for name in r["extra"]})
    extra = {}
    for name in names:
        values = [float(r["extra"][name]) for r in records if name in r["extra"]]
        mean = mean_over_seeds(values)
        extra[name] = {"mean": mean.value, "interval": (mean.low, mean.high)}
    return EvaluationSummary(
        n=n,
        correct=correct,
        accuracy=correct / n,
        interval=(accuracy.low, accuracy.high),
        effective_n=trials,
        d1_correct=sum(r["d1"]["value"] for r in records),
        d1_out_of=sum(r["d1"]["out_of"] for r in records),
        effective_tokens=_mean_if_known([r["length"] for r in records]),
        truncated_fraction=_mean_if_known([r["truncated"] for r in records]),
        passes=_mean_if_known([r.get("passes") for r in records]),
        unparsed_fraction=sum(r["strict"]["outcome"] == "unparsed" for r in records) / rows,
        refused_fraction=sum(r["strict"]["outcome"] == "refused" for r in records) / rows,
        timeout_fraction=sum(r["strict"]["outcome"] == "timeout" for r in records) / rows,
        failed_fraction=sum(r["strict"]["outcome"] in ("timeout", "error") for r in records) / rows,
        extra=extra,
    )


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def pass_at_1(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each length that was evaluated with several seeds: the mean accuracy over seeds.

    `interval` is Wilson's with the trials of one seed, wide enough however the seeds agree; `over_seeds` Student's t.
    """
    found = []
    for length in dict.fromkeys(entry["completion_length"] for entry in evaluations):
        entries = [entry for entry in evaluations if entry["completion_length"] == length]
        if len(entries) > 1:
            seeds, n = [entry["seed"] for entry in entries], entries[0]["n"]
            mean = mean_over_seeds([entry["accuracy"] for entry in entries])
            trials = min(entry.get("effective_n", n) for entry in entries)
            rows = wilson_interval(mean.value * trials, trials)
            found.append(
                {
                    "completion_length": length,
                    "seeds": seeds,
                    "n": n,
                    "mean": mean.value,
                    "interval": (rows.low, rows.high),
                    "over_seeds": (max(0.0, mean.low), min(1.0, mean.high)),
                }
            )
    return found
