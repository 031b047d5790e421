"""A policy on the task's rows: between the stages of a run and on its own, alone or in several processes."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from d1lit.app.plan import Plan, decode, evaluation_rows, evaluation_sampler, shortened
from d1lit.callbacks.progress import RowsProgress
from d1lit.data import EncodedRow
from d1lit.draws import CounterDraws
from d1lit.evaluation import (
    EvaluationProtocol,
    Progress,
    check_coverage,
    evaluate,
    json_lines,
    read_records,
    record,
    summarise,
    write_whole,
)
from d1lit.models import Policy, encode_text
from d1lit.modules.stage_data import prompt_rows
from d1lit.processes import Place, all_gather_objects, is_first, wait_for_all, world
from d1lit.report.console import say
from d1lit.sampling import BlockSampler
from d1lit.statistics import pass_at_k, wilson_interval
from d1lit.stopping import Interrupted, StopFlag
from d1lit.tasks import MixedTask, graded_text, prompt_protocol

PACKAGES = ("d1lit", "torch", "lightning", "transformers", "tokenizers", "peft", "datasets", "torchmetrics")
GRADING_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")
"""What a verdict of the strict mathematics grader depends on."""


@dataclass(frozen=True)
class TaskEvaluator:
    """Evaluates a policy on the task's rows at every length asked for."""

    plan: Plan
    tokenizer: Any
    folder: Path
    flag: StopFlag
    weights: str = ""
    """What the weights were; within a run's own folder the stage says it."""
    kept: Path | None = None
    """Folder in which runs keep the evaluations of these very base weights for each other; None for none."""

    def __call__(self, policy: Policy, stage: str) -> list[dict[str, Any]]:
        """Entries of `evaluations`, one a task and length, and of `probes`, which say what was probed."""
        config = self.plan.config.evaluation
        if stage == "base" and not config.base:
            return []
        own = self if stage == "base" else replace(self, kept=None)
        return [*own.at_seed(policy, stage, config.seed), *own.probes(policy, stage)]

    def probes(self, policy: Policy, stage: str) -> list[dict[str, Any]]:
        """Forced prefixes and pass@k, where they are asked for."""
        if isinstance(self.plan.task, MixedTask):
            return [entry for member in self._members().values() for entry in member.probes(policy, stage)]
        config = self.plan.config.evaluation
        entries = [self._forced(policy, stage, prefix) for prefix in config.forced_prefixes]
        return entries if config.pass_at_k is None else [*entries, self._pass_at_k(policy, stage)]

    def at_seed(self, policy: Policy, stage: str, seed: int) -> list[dict[str, Any]]:
        """Entries of `evaluations`, one a task and length, with the draws of one seed."""
        if isinstance(self.plan.task, MixedTask):
            return [entry for member in self._members().values() for entry in member.at_seed(policy, stage, seed)]
        rows = evaluation_rows(self.plan, self.tokenizer)
        lengths = self.plan.config.evaluation.lengths or [self.plan.sampler.completion_length]
        return [
            self._entry(policy, stage, evaluation_sampler(self.plan, length), rows, seed, self._graded_prefix)
            for length in lengths
        ]

    def _members(self) -> dict[str, TaskEvaluator]:
        """An evaluator for each task of a mixture."""
        assert isinstance(self.plan.task, MixedTask)
        return {name: replace(self, plan=replace(self.plan, task=task)) for name, task in self.plan.task.tasks.items()}

    def validation(self, policy: Policy) -> dict[str, float]:
        """Accuracy and further measures on the validation rows; of a mixture, the mean over tasks and each task's."""
        if isinstance(self.plan.task, MixedTask):
            found = {name: m.validation(policy) for name, m in self._members().items() if m.plan.task.val_rows}
            own = {f"{key}/{name}": value for name, part in found.items() for key, value in part.items()}
            return {"accuracy": sum(part["accuracy"] for part in found.values()) / len(found), **own}
        rows = prompt_rows(self.plan.task, "val", self.tokenizer)
        records = self._records(policy, evaluation_sampler(self.plan, None), rows, 0, None, self._graded_prefix)
        summary = summarise(records, self.plan.task.grader)
        return {"accuracy": summary.accuracy, **{name: value["mean"] for name, value in summary.extra.items()}}

    @property
    def _graded_prefix(self) -> str:
        return graded_text(self.plan.task.template, "")

    def _forced(self, policy: Policy, stage: str, prefix: str) -> dict[str, Any]:
        """What the policy reaches when the first words are put in its mouth: a yardstick of what it already can."""
        ids = encode_text(self.tokenizer, prefix)
        rows = [replace(row, prompt_ids=[*row.prompt_ids, *ids]) for row in evaluation_rows(self.plan, self.tokenizer)]
        sampler = shortened(evaluation_sampler(self.plan, None), len(ids))
        seed = self.plan.config.evaluation.seed
        entry = self._entry(policy, f"{stage}-forced", sampler, rows, seed, self._graded_prefix + prefix)
        return {**entry, "stage": stage, "probe": "forced", "prefix": prefix}

    def _pass_at_k(self, policy: Policy, stage: str) -> dict[str, Any]:
        """Unbiased pass@k of several samples a row."""
        wanted = self.plan.config.evaluation.pass_at_k
        rows = evaluation_rows(self.plan, self.tokenizer)[: wanted.rows]
        sampler = replace(evaluation_sampler(self.plan, None), temperature=wanted.temperature)
        many = [row for row in rows for _ in range(wanted.num_samples)]
        seed = self.plan.config.evaluation.seed
        entry = self._entry(policy, f"{stage}-samples", sampler, many, seed, self._graded_prefix)
        records = read_records(self.folder / entry["rows_file"])
        grades = [(r["index"] // wanted.num_samples, r[self.plan.task.grader]) for r in records]
        correct = Counter(row for row, grade in grades if grade["value"] >= grade["out_of"])
        estimates = {}
        for k in wanted.ks:
            mean = math.fsum(pass_at_k(wanted.num_samples, correct[n], k) for n in range(len(rows))) / len(rows)
            interval = wilson_interval(mean * len(rows), len(rows))  # a row as one trial: at least as wide as need be
            estimates[str(k)] = {"mean": mean, "interval": (interval.low, interval.high)}
        return {**entry, "stage": stage, "probe": "pass_at_k", "pass_at_k": estimates}

    def _entry(
        self, policy: Policy, stage: str, sampler: BlockSampler, rows: Sequence[EncodedRow], seed: int, prefix: str
    ) -> dict[str, Any]:
        task = self.plan.task
        protocol = self._protocol(sampler, len(rows), seed)
        place = (
            hashlib.sha256((protocol.sha256 + self.weights).encode()).hexdigest() if self.weights else protocol.sha256
        )
        name = f"{stage}-{task.display_name}-{sampler.completion_length}-{place[:8]}.jsonl"
        file = self.folder / "evaluations" / name
        kept = None if self.kept is None else self.kept / f"{rows_and_code(rows, protocol)}.jsonl"
        if kept is not None and kept.exists() and not file.exists():
            say(f"{stage}: its evaluation is taken from {kept}: the same weights, rows, settings and code")
            copy_whole(kept, file)
        records = self._records(policy, sampler, rows, seed, file, prefix, protocol.sha256)
        check_coverage(records, len(rows))
        if kept is not None and not kept.exists():
            copy_whole(file, kept)
        return {
            "stage": stage,
            "task": task.display_name,
            "split": self.plan.config.evaluation.split,
            "completion_length": sampler.completion_length,
            "seed": seed,
            "grader": task.grader,
            **asdict(summarise(records, task.grader)),
            "weights": weights_of(self.plan.config, self.weights),
            "rows_file": str(file.relative_to(self.folder)),
            **asdict(protocol),
            "protocol_sha256": protocol.sha256,
        }

    def _records(
        self,
        policy: Policy,
        sampler: BlockSampler,
        rows: Sequence[EncodedRow],
        seed: int,
        file: Path | None,
        prefix: str,
        protocol_sha256: str = "",
    ) -> list[dict[str, Any]]:
        here = world()
        if file is not None and is_first():
            deal_records(file, here.world_size)
        wait_for_all()
        mine: list[dict[str, Any]] = []
        # Who stops here still meets the others, which wait for its rows below; then all stop.
        with suppress(Interrupted):
            mine = evaluate(
                policy,
                sampler,
                rows,
                partial(decode, self.tokenizer, policy.eos_token_id),
                self.plan.task.judges,
                CounterDraws(seed),
                batch_size=self.plan.config.evaluation.batch_size,
                device=self.plan.device,
                file=None if file is None else rank_file(file, here),
                place=(here.rank, here.world_size),
                progress=self._progress(None if file is None else file.stem.rpartition("-")[0]),
                graded_prefix=prefix,
                protocol_sha256=protocol_sha256,
            )
        everyone = all_gather_objects((mine, self.flag.received))
        signum = next((signum for _, signum in everyone if signum is not None), None)
        if signum is not None:
            self.flag.received = signum
            raise Interrupted(signum)
        records = sorted((record for part, _ in everyone for record in part), key=lambda record: record["index"])
        if file is not None and is_first():
            collect_records(file, here.world_size)
        wait_for_all()
        return records

    def baselines(self) -> dict[str, dict[str, Any]]:
        """What needs no model, on the same rows."""
        task = self.plan.task
        if isinstance(task, MixedTask):
            parts = {name: member.baselines() for name, member in self._members().items()}
            return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}
        rows = [row.example for row in evaluation_rows(self.plan, self.tokenizer)]
        found = {}
        for name, answer in task.baselines.items():
            texts = answer(rows, task.rows("train"))
            grades = task.judges.grade(texts, rows)
            records = [record(n, rows[n], texts[n], grades[n], length=None, truncated=None) for n in range(len(rows))]
            summary = summarise(records, task.grader)
            found[name] = {key: asdict(summary)[key] for key in ("n", "correct", "accuracy", "interval", "extra")}
        return found

    def _progress(self, label: str | None) -> Progress:
        """Ends the evaluation at a signal, and says how far it is where it has a name."""
        told = None if label is None else RowsProgress(label, say)

        def step(done: int, total: int) -> None:
            self.flag.raise_if_stopped()
            if told is not None:
                told(done, total)

        return step

    def _protocol(self, sampler: Any, num_rows: int, seed: int) -> EvaluationProtocol:
        config = self.plan.config
        settings = {
            "sampler": described(sampler),
            "sampler_parts": {k: type(getattr(sampler, k)).__name__ for k in ("proposal", "confidence", "commit")},
            "seed": seed,
            "batch_size": config.evaluation.batch_size,
            "dtype": config.model.dtype,
            "device": str(self.plan.device.type),
            "device_name": torch.cuda.get_device_name() if self.plan.device.type == "cuda" else platform.machine(),
            "attend_padding": config.model.attend_padding,
            "packages": versions(*PACKAGES, *GRADING_PACKAGES),
            **prompt_protocol(self.plan.task.template),
        }
        task = self.plan.task
        return EvaluationProtocol(task.display_name, num_rows, task.template.sha256, settings)


def weights_of(config: Any, sha256: str = "") -> dict[str, Any]:
    """What an evaluation's weights were, beside the protocol, which says everything else.

    Args:
        config: of the run or of `evaluate.py`.
        sha256: hash of the weights' files, their places, sizes and times, where it was taken.
    """
    places = {key: config.get(key) if key in config else None for key in ("run", "adapter")}
    return {"path": config.model.path, "revision": config.model.revision, **places, "files_sha256": sha256 or None}


def rows_and_code(rows: Sequence[EncodedRow], protocol: EvaluationProtocol) -> str:
    """Hash of what an evaluation's records depend on besides the weights."""
    digest = hashlib.sha256((protocol.sha256 + code_sha256(".")).encode())
    for row in rows:
        digest.update(json.dumps([row.prompt_ids, row.example], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages; of a checkout that runs without having been installed there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_sha256(*names: str) -> str:
    """Hash of the project's own code: of the named modules and packages."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in names:
        for file in sorted([package / name] if name.endswith(".py") else (package / name).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that whoever looks, another process too, finds all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, staging)
    os.replace(staging, target)


def rank_file(file: Path, here: Place) -> Path:
    """Where a process writes its rows of an evaluation while it runs: the file itself if it is alone."""
    return file if here.world_size == 1 else file.with_name(f"{file.stem}.rank{here.rank}.jsonl")


def deal_records(file: Path, world_size: int) -> None:
    """Give every process the finished rows that are its own, however many processes an earlier attempt had."""
    parts = sorted(file.parent.glob(f"{glob.escape(file.stem)}.rank*.jsonl"))
    if not parts and (world_size == 1 or not file.exists()):
        return
    found: dict[int, dict[str, Any]] = {}
    for source in (file, *parts):
        for row in read_records(source):
            if found.setdefault(row["index"], row) != row:
                where = f"{file.parent}: two files disagree on row {row['index']}"
                raise ValueError(f"evaluation: {where}. Try: another output folder")
    write_whole(file, json_lines(found[n] for n in sorted(found)))
    for part in parts:
        part.unlink()
    if world_size > 1:
        for rank in range(world_size):
            mine = json_lines(found[n] for n in sorted(found) if n % world_size == rank)
            write_whole(rank_file(file, Place(rank, world_size, 0, world_size)), mine)


def collect_records(file: Path, world_size: int) -> None:
    """Put the rows of all processes into the one file."""
    if world_size > 1:
        deal_records(file, 1)


def described(value: Any) -> Any:
    """A value as JSON has it, the same in every process: parts and functions by their names and settings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {f.name: described(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, partial):
        return {"function": described(value.func), **described(value.keywords)}
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [described(v) for v in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    name = getattr(value, "__qualname__", None)
    return type(value).__qualname__ if name is None else f"{value.__module__}.{name}"
