"""`evaluate.py`: a run or a model evaluated on its own, or stored generations graded."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from d1lit.app.build import check_hub_model, plan_run
from d1lit.app.components import build
from d1lit.app.config_errors import as_config_error
from d1lit.app.plan import Plan
from d1lit.app.run_policy import policy_of_run
from d1lit.app.task_evaluator import TaskEvaluator, weights_of
from d1lit.errors import ConfigError
from d1lit.evaluation import append_records, pass_at_1, record, summarise, write_whole
from d1lit.models import Policy, load_adapter
from d1lit.processes import first_decides, is_first, join_world
from d1lit.quiet import quiet_libraries
from d1lit.report.console import console, show_table
from d1lit.rewards.stored import published_row
from d1lit.stopping import StopFlag
from d1lit.tasks import Task


def run_evaluation(config: DictConfig) -> int:
    """`evaluate.py`: evaluate a run or a model, or grade stored generations; print where the results are."""
    quiet_libraries()
    if config.rescore is not None:
        return _rescore(config)
    console.quiet = not is_first()
    _check_distinct(config)
    plan = plan_run(config, trains=False)
    check_hub_model(plan, trains=False)
    join_world(config.trainer.accelerator)
    flag = StopFlag()
    with flag.preparing():
        policy, tokenizer, stage = _policy(plan)
    with flag.installed():
        folder = first_decides(partial(_output_folder, config))  # only now: what cannot be read leaves no folder
        evaluator = TaskEvaluator(plan, tokenizer, folder, flag, _weights_seen(config))
        entries = [entry for seed in config.seeds for entry in evaluator.at_seed(policy, stage, seed)]
        entries += evaluator.probes(policy, stage)
    if not is_first():
        return 0
    return _report(plan.config, plan.task.display_name, folder, entries)


def _check_distinct(config: DictConfig) -> None:
    """No seed and no length twice: the second would be the first one's rows over again."""
    for key, values in (("seeds", config.seeds), ("lengths", config.evaluation.lengths or ())):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice or (key == "seeds" and not values):
            cause = f"{twice[0]} stands twice" if twice else "none is named"
            raise ConfigError(key, cause, f"{key}=[0,1,2]" if key == "seeds" else f"{key}=[128,256]", "E201")


def _weights_seen(config: DictConfig) -> str:
    """A hash of where the weights lie and of their files' sizes and times: others never go on with these rows."""
    folders = [Path(place) for place in (config.run, config.adapter, config.model.path) if place is not None]
    files = sorted(file.resolve() for folder in folders if folder.is_dir() for file in folder.rglob("*.safetensors"))
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, config.model.path, config.model.revision)).encode()).hexdigest()


def _policy(plan: Plan) -> tuple[Policy, Any, str]:
    """What is to be evaluated, its tokenizer, and a name for the table."""
    config = plan.config
    if config.run is not None:
        folder = Path(config.run)
        if not (folder / "config.yaml").exists():
            raise ConfigError("run", f"{folder} is not a run's folder", "a folder that train.py has made", "E504")
        policy, tokenizer = policy_of_run(plan, folder)
        return policy, tokenizer, plan.stages[-1].name if plan.stages else "base"
    if config.model.path is None:
        raise ConfigError(
            "model.path", "the built-in model has no weights of its own", "run=FOLDER of a training run", "E406"
        )
    policy, tokenizer = plan.make_policy()
    if config.adapter is not None:
        try:
            policy.model = load_adapter(policy.network, config.adapter)
        except ValueError as error:
            raise as_config_error(error, "adapter") from None
    return policy, tokenizer, "adapter" if config.adapter is not None else "model"


def _output_folder(config: DictConfig) -> Path:
    if config.output is not None:
        folder = Path(config.output)
    else:
        name = "rescore" if config.rescore is not None else "evaluation"
        folder = Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{config.task.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output", f"{folder}: {error.strerror}", "a folder that can be made", "E501") from None
    return folder


def _rescore(config: DictConfig) -> int:
    """Grade stored generations: samples and evaluation rows of ours, or the files that d1 published."""
    task = build(config, "task", Task)
    rows = read_generations(Path(config.rescore))
    texts, examples = [row["completion"] for row in rows], [row["example"] for row in rows]
    try:
        grades = task.judges.grade(texts, examples)
    except (KeyError, TypeError, ValueError) as error:
        cause = f"{config.rescore}: its rows are not those of {task.name} ({error!r})"
        raise ConfigError("rescore", cause, "the task that they were generated for", "E507") from None
    folder = _output_folder(config)
    records = [
        record(n, row["example"], row["completion"], grade, row.get("length"), row.get("truncated"))
        for n, (row, grade) in enumerate(zip(rows, grades, strict=True))
    ]
    file = folder / "evaluations" / "rescored.jsonl"
    file.unlink(missing_ok=True)
    append_records(file, records)
    summary = summarise(records, task.grader)
    entry = {"stage": "stored", "task": task.name, "split": Path(config.rescore).name, "completion_length": None}
    return _report(config, task.name, folder, [{**entry, **asdict(summary)}])


def read_generations(file: Path) -> list[dict[str, Any]]:
    """Every line of a JSON lines file: `completion` and `example`, and `length` and `truncated` where it says them.

    Raises:
        ConfigError: naming file and line.
    """
    if not file.is_file():
        raise ConfigError("rescore", f"no file {file}", "a samples.jsonl, or a file of published generations", "E507")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "ground_truth" in row:
                completion, example = published_row(row)
                found.append({"completion": completion, "example": example})
            else:
                found.append({"completion": row["completion"], "example": row["example"], **row})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "rescore", f"{file}:{number}: {error!r}", "rows with completion and example", "E507"
            ) from None
    if not found:
        raise ConfigError("rescore", f"{file} is empty", "a file with rows", "E507")
    return found


def _report(config: DictConfig, task: str, folder: Path, entries: list[dict[str, Any]]) -> int:
    results = {"recipe": "evaluation", "task": task, "model": config.model.name, "seed": config.seed}
    evaluations = [entry for entry in entries if "probe" not in entry]
    results |= {
        "run": config.run,
        "weights": None if config.rescore is not None else weights_of(config),
        "grader": config.task.grader,
        "evaluations": evaluations,
    }
    results |= {"pass_at_1": pass_at_1(evaluations), "probes": [entry for entry in entries if "probe" in entry]}
    write_whole(folder / "results.json", json.dumps(results, indent=2))
    show_table(results)
    print(folder / "results.json")
    return 0
