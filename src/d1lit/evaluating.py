"""Evaluating policies: between the stages of a run, and on its own (`evaluate.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d1lit.build import Plan, decode, evaluation_rows, evaluation_sampler
from d1lit.callbacks import StopFlag
from d1lit.draws import CounterDraws
from d1lit.evaluation import Protocol, check_coverage, evaluate, summarise
from d1lit.models import Policy
from d1lit.tasks import graded_text, prompt_protocol

PACKAGES = ("d1lit", "torch", "lightning", "transformers", "peft", "datasets", "torchmetrics")


@dataclass(frozen=True)
class TaskEvaluator:
    """Evaluates a policy on the task's rows at every length asked for."""

    plan: Plan
    tokenizer: Any
    folder: Path
    flag: StopFlag

    def __call__(self, policy: Policy, stage: str) -> list[dict[str, Any]]:
        """Entries of `evaluations`, one a length."""
        config = self.plan.config.evaluation
        if stage == "base" and not config.base:
            return []
        lengths = config.lengths or [self.plan.sampler.completion_length]
        return [self._at_length(policy, stage, length) for length in lengths]

    def _at_length(self, policy: Policy, stage: str, length: int) -> dict[str, Any]:
        plan, task, config = self.plan, self.plan.task, self.plan.config.evaluation
        sampler = evaluation_sampler(plan, length)
        rows = evaluation_rows(plan, self.tokenizer)
        protocol = self._protocol(sampler, len(rows))
        file = self.folder / "evaluations" / f"{stage}-{task.display_name}-{length}-{protocol.sha256[:8]}.jsonl"
        records = evaluate(
            policy,
            sampler,
            rows,
            partial(decode, self.tokenizer, policy.eos_token_id),
            task.grader,
            CounterDraws(config.seed),
            batch_size=config.batch_size,
            device=plan.device,
            file=file,
            progress=self._progress,
            graded_prefix=graded_text(task.template, ""),
        )
        check_coverage(records, len(rows))
        summary = summarise(records)
        return {
            "stage": stage,
            "task": task.display_name,
            "split": config.split,
            "completion_length": length,
            **asdict(summary),
            "rows_file": str(file.relative_to(self.folder)),
            **asdict(protocol),
            "protocol_sha256": protocol.sha256,
        }

    def _progress(self, done: int, total: int) -> None:
        self.flag.raise_if_stopped()

    def _protocol(self, sampler: Any, num_rows: int) -> Protocol:
        config = self.plan.config
        settings = {
            "sampler": _plain(asdict(sampler)),
            "sampler_parts": {k: type(getattr(sampler, k)).__name__ for k in ("proposal", "confidence", "commit")},
            "seed": config.evaluation.seed,
            "batch_size": config.evaluation.batch_size,
            "dtype": config.model.dtype,
            "device": str(self.plan.device.type),
            "attend_padding": config.model.attend_padding,
            "packages": {name: version(name) for name in PACKAGES},
            **prompt_protocol(self.plan.task.template),
        }
        task = self.plan.task
        return Protocol(task.display_name, num_rows, task.template.sha256, settings)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
