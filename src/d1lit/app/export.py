"""A finished model for others: its card, its merged form, and the hub when asked."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import PeftModel
from torch import Tensor

from d1lit.app.open_run import OpenRun, open_run
from d1lit.app.plan import evaluation_rows
from d1lit.checkpoint import seal
from d1lit.errors import ConfigError
from d1lit.models import export_model
from d1lit.models.lora import merge
from d1lit.report.comparing import final_entry, probes
from d1lit.report.runs import Run, read_run
from d1lit.report.sections import baseline_cells
from d1lit.report.tables import Table, as_markdown, percent, percent_interval
from d1lit.security import redact
from d1lit.statistics import Interval

LOADING = """\
```python
import d1lit.models  # makes the architecture known to transformers
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```
"""
ADAPTER_LOADING = """\
This is a LoRA adapter for `{base}`: `python evaluate.py model={preset} adapter=FOLDER task=...` reads both, and
`d1lit export {run} FOLDER` writes the merged model.
"""
LAST_ADAPTER_LOADING = """\
These are the weights of the last stage alone: a LoRA adapter for the model that the stages before it made, not for
{base}. `d1lit export {run} FOLDER` writes the whole model.
"""


def write_card(folder: Path) -> Path:
    """README.md beside the weights of a finished run, from what the run measured.

    Raises:
        ValueError: if the run has no results.
    """
    run = read_run(folder)
    file = folder / "model" / "README.md"
    staging = file.with_suffix(".tmp")
    staging.write_text(model_card(run), encoding="utf-8")
    staging.replace(file)
    return file


def model_card(run: Run, merged: bool = False) -> str:
    """The card: what it is, how it was made, what it reaches and what that is worth, what it cannot do."""
    results, config = run.results, run.config
    head = yaml.safe_dump(card_data(run, merged), sort_keys=False, allow_unicode=True)
    title = f"{results['model']}, {results['recipe']} on {results['task']}"
    base = _base(config)
    loading = LOADING if merged or not _is_adapter(run) else ADAPTER_LOADING
    if loading is ADAPTER_LOADING and not _stands_on_base(config):
        loading = LAST_ADAPTER_LOADING
    loading = loading.format(base=base, run=run.name, preset=results["model"], path="PATH_OR_HUB_ID")
    parts = [
        f"---\n{head}---\n\n# {title}\n",
        f"A masked diffusion language model, trained from {base} by the recipe `{results['recipe']}` of d1lit "
        f"(stages: {', '.join(_stages(config)) or 'none'}; seed {results['seed']}).\n",
        "## Loading\n",
        loading,
        "It is not an autoregressive model: text comes from `d1lit chat`, `d1lit play` or `evaluate.py`, which run the "
        "unmasking sampler it was trained with.\n",
        "## Data\n",
        _data(run),
        "## Results\n",
        _metrics(run),
        "## How it was made\n",
        _recipe(run),
        "## Limits\n",
        _limits(run),
        "## Licence\n",
        _licence(config),
    ]
    return "\n".join(parts)


def _is_adapter(run: Run) -> bool:
    return (run.folder / "model" / "adapter_config.json").is_file()


def _stands_on_base(config: Mapping[str, Any]) -> bool:
    """Whether a run's final adapter belongs to the model that the run began with, and that others can have."""
    return len(_stages(config)) == 1 and (config.get("model") or {}).get("path") is not None


def card_data(run: Run, merged: bool = False) -> dict[str, Any]:
    """The machine-readable head of a card, as model hubs read it."""
    results = run.results
    data: dict[str, Any] = {
        "library_name": "d1lit",
        "pipeline_tag": "text-generation",
        "tags": ["masked-diffusion", "d1lit", str(results["recipe"])],
    }
    path = (run.config.get("model") or {}).get("path")
    if path and str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        if merged or not _is_adapter(run):
            data |= {"base_model": str(path), "base_model_relation": "finetune"}
        elif _stands_on_base(run.config):
            data |= {"base_model": str(path), "base_model_relation": "adapter"}
    else:
        data["license"] = "apache-2.0"
    return data


def _stages(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in (config.get("recipe") or {}).get("stages") or []]


def _base(config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    path = model.get("path")
    if path is None:
        return "the tiny built-in model (pretrained on generated text of the task)"
    return str(path) if str(path).count("/") == 1 else str(model.get("name"))


def _data(run: Run) -> str:
    task = run.config.get("task") or {}
    lines = [f"- Task: {run.results['task']}."]
    if run.results["task"].endswith("-synthetic"):
        lines.append(
            "- Its rows are generated and only stand in for the real data set; the numbers below say nothing about it."
        )
    for key, what in (("train_data", "Training rows"), ("test_data", "Test rows")):
        where = str(task.get(key, "unknown"))
        shown = where if where.count("/") <= 1 and not where.startswith("/") else Path(where).name
        lines.append(f"- {what}: {'generated' if where == 'builtin' else shown}.")
    counts = run.results.get("data") or {}
    told = "; ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items() if value)
    return "\n".join([*lines, *([f"- Counts: {told}."] if told else []), ""])


def _metrics(run: Run) -> str:
    task = ("task",) if len(run.tasks) > 1 else ()
    rows = [(*baseline_cells(run, name), *_measured(e)) for name, e in run.baselines.items()]
    rows += [(e["stage"], *([e["task"]] if task else []), *_measured(e)) for e in run.evaluations]
    columns = ("stage", *task, "rows", "accuracy %", "95 % interval", "d1's grader %", "tokens asked")
    note = (
        f"{run.results['task']}, split {run.evaluations[-1].get('split', 'test')}, greedy unless the protocol says "
        "otherwise; Wilson's interval over rows, one training seed. The last stage is this model."
        if run.evaluations
        else "This run was not evaluated."
    )
    shown = [as_markdown(Table("Accuracy", columns, tuple(rows), note))]
    asked = tuple(
        (p.stage, *([p.task] if task else []), f"`{p.name}`", str(p.entry["n"]), *_estimate(p.estimate))
        for p in probes(run)
    )
    if asked:
        columns = ("stage", *task, "asked", "completions", "%", "95 % interval")
        note = "pass@k: at least one of k samples is right. forced: greedy, begun with these words."
        shown.append(as_markdown(Table("Asked otherwise", columns, asked, note)))
    return "\n".join(shown)


def _measured(entry: Mapping[str, Any]) -> tuple[str, ...]:
    paper = percent(entry["d1_correct"] / max(1.0, entry["d1_out_of"])) if "d1_correct" in entry else ""
    estimate = _estimate(Interval(entry["accuracy"], *entry["interval"]))
    return (str(entry["n"]), *estimate, paper, str(entry.get("completion_length") or ""))


def _estimate(interval: Interval) -> tuple[str, str]:
    return percent(interval.value), percent_interval(interval)


def _recipe(run: Run) -> str:
    said = " ".join(word for word in run.overrides if not word.startswith(("run_dir=", "resume=")))
    environment = run.environment
    packages = ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items())
    seconds = (run.results.get("cost") or {}).get("seconds")
    lines = ["```", f"python train.py {said}".strip(), "```", ""]
    if environment.get("commit"):
        lines.append(f"Commit {environment['commit']}; {packages}.")
    if seconds is not None:
        where = ", ".join(environment.get("devices") or []) or "CPU"
        lines.append(f"{seconds:.0f} seconds on {where}, evaluation included.")
    sampler = redact(dict(run.config.get("sampler") or {}))
    shape = {k: sampler[k] for k in ("completion_length", "num_steps", "block_length", "temperature") if k in sampler}
    return "\n".join([*lines, f"Sampler: `{json.dumps(shape)}`.", ""])


def _limits(run: Run) -> str:
    lines = [
        f"- It was trained and measured on {run.results['task']} alone; expect nothing of it elsewhere.",
        "- One seed: the interval above is over test rows and does not hold what another seed would change.",
        "- Numbers depend on sampler, steps, block length, precision and prompt; results.json states all of them.",
    ]
    better = [name for name, entry in run.baselines.items() if entry["accuracy"] >= _reached(run, name)]
    if better:
        lines.append(f"- It does not beat what needs no model at all: {', '.join(better)}.")
    truncated = [entry["truncated_fraction"] for entry in run.evaluations]
    if truncated and truncated[-1] is not None and not math.isnan(truncated[-1]) and truncated[-1] > 0:
        lines.append(f"- {100 * truncated[-1]:.1f} % of its test answers did not end within the completion length.")
    if (run.config.get("model") or {}).get("path") is None:
        lines.append("- It is a toy: a few hundred thousand weights, which know no language beyond the task's form.")
    return "\n".join([*lines, ""])


def _reached(run: Run, baseline: str) -> float:
    """Accuracy of the final model on the task that a baseline is of: in a mixture it is named `task/baseline`."""
    task, _, _ = baseline.rpartition("/")
    entry = final_entry(run, next((name for name in run.tasks if task and name.startswith(task)), None))
    return math.nan if entry is None else float(entry["accuracy"])


def _licence(config: Mapping[str, Any]) -> str:
    if (config.get("model") or {}).get("path") is None:
        return "Apache-2.0, as d1lit.\n"
    return f"That of the model it was trained from ({_base(config)}) and of the data above; look there before use.\n"


def export(
    folder: Path,
    target: Path,
    layout: Literal["d1lit", "official"] = "d1lit",
    trusted: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Path:
    """The run's final model as one whole: adapters merged in float32, with tokenizer and card.

    Prints how far merging has moved log-probabilities.

    Args:
        folder: of the run.
        target: is created; refused if it holds a model already.
        layout: our own names, which d1lit and transformers read, or those of the model's family.
        trusted: packages whose components the run may name.
        words: KEY=VALUE that override the run's.

    Raises:
        ConfigError: without a finished run, or where the target is taken.
    """
    refuse_taken("export", target)
    run = open_run(folder, words, trusted)
    network = run.policy.network
    if isinstance(run.policy.model, PeftModel):
        network, shift = merge(run.policy.model, _some_prompts(run))
        print(f"{shift}, over prompts of {run.plan.task.display_name}")
    with staged(target) as staging:
        export_model(network, staging, layout)
        run.tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(read_run(folder), merged=True), encoding="utf-8")
    return target


def refuse_taken(command: str, target: Path) -> None:
    """Nothing is written over a model.

    Raises:
        ConfigError: if there is one.
    """
    if (target / "config.json").exists():
        raise ConfigError(command, f"{target} holds a model already", "another folder", "E505")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder within the target, to be filled with a model; once it is, its files are moved to their place."""
    staging = target / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    seal(staging, with_manifest=False)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):  # last what says that it is all
        os.replace(file, target / file.name)
    staging.rmdir()


def _some_prompts(run: OpenRun, count: int = 8) -> Tensor:
    """The last tokens of a few evaluation prompts, as many of each."""
    rows = evaluation_rows(run.plan, run.tokenizer)[:count]
    shortest = min(len(row.prompt_ids) for row in rows)
    return torch.tensor([list(row.prompt_ids)[-shortest:] for row in rows], device=run.policy.device)


def push(folder: Path, repository: str, *, yes: bool, private: bool) -> str:
    """Upload a run's model, or what `d1lit export` wrote, to the hub; nothing leaves the machine without `yes`.

    Returns:
        What was done, or would be.

    Raises:
        ConfigError: without weights, for an adapter whose base nobody else has, or where the hub refuses.
    """
    model = _to_push(folder)
    names = sorted(str(file.relative_to(model)) for file in model.rglob("*") if file.is_file())
    if not yes:
        return f"would upload {', '.join(names)} from {model} to {repository}; nothing was sent. Add --yes to send it."
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=repository, folder_path=model, commit_message="Model trained with d1lit")
    except Exception as error:  # below the hub's own errors stand those of whichever HTTP client its version uses
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "hf auth login, a name of the form owner/name, and a connection"
        raise ConfigError("push", f"the hub refused: {cause}", cure, "E801") from None
    return f"uploaded {len(names)} files: {info}"


def _to_push(folder: Path) -> Path:
    """The folder whose files are sent, its card written."""
    if (folder / "config.json").is_file() and (folder / "README.md").is_file():
        return folder
    if not (folder / "model").is_dir():
        cure = "a run that has ended, or the folder that d1lit export wrote"
        raise ConfigError("push", f"{folder} has no model folder", cure, "E504")
    run = read_run(folder)
    if _is_adapter(run) and not _stands_on_base(run.config):
        cause = f"{folder} ends with an adapter for the model of the stages before, which nobody else has"
        raise ConfigError("push", cause, f"d1lit export {folder} FOLDER, and then d1lit push FOLDER", "E806")
    write_card(folder)
    return folder / "model"
