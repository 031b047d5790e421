"""One run from a composed configuration: its folder, its base model, its stages, its table."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d1lit.app.artifacts import present
from d1lit.app.build import check_hub_model, plan_run
from d1lit.app.dry_run import estimate_run
from d1lit.app.micro_batches import micro_batch_sizes, with_micro_batches
from d1lit.app.pinning import BASE, INPUTS, ROWS, inputs, keep_inputs, stored_facts
from d1lit.app.plan import Plan, make_stage
from d1lit.app.task_evaluator import PACKAGES, TaskEvaluator, copy_whole, versions
from d1lit.app.tiny_base import base_policy, find_base, kept_evaluations, make_shared_base
from d1lit.app.trainer import make_trainer
from d1lit.checkpoint import differing_keys, flatten, lock_run, put_whole
from d1lit.errors import ConfigError
from d1lit.evaluation import write_whole
from d1lit.models import Policy, save_weights
from d1lit.processes import first_decides, is_first, join_world, place, slurm_job, wait_for_all, world
from d1lit.quiet import quiet_libraries
from d1lit.recipes import StageFolder, read_costs, run_recipe
from d1lit.report.console import console, say, show_table
from d1lit.security import redact
from d1lit.stopping import StopFlag, requeued

OUTPUTS = Path("outputs")
"""Where runs stand that name no folder of their own."""


def run_training(config: DictConfig, overrides: Sequence[str], plan: Plan | None = None) -> int:
    """`train.py`: run the recipe and print where its results are.

    Args:
        config: composed and resolved.
        overrides: what was said on the command line; kept in the folder, so that the run can be composed again.
        plan: what `plan_run` has made of the configuration, if it was asked already.
    """
    quiet_libraries()
    console.quiet = not is_first()
    flag = StopFlag()
    with requeued():
        with flag.preparing():
            plan = plan_run(config) if plan is None else plan
            tell_rows(plan)
            if config.dry_run:
                _, lines = estimate_run(plan, config.trainer.devices * config.trainer.num_nodes)
                print("\n".join(lines))
                return 0
            check_hub_model(plan)
            flag.raise_if_stopped()
        with flag.installed():
            is_waited_for = plan.base is not None and place().world_size > 1 and is_first()
            if is_waited_for and (config.run_dir is None or find_base(plan, Path(config.run_dir)) is None):
                make_shared_base(plan, flag)
            flag.raise_if_stopped()
        join_world(config.trainer.accelerator)  # a signal ends it at once: whoever waits in there cannot look at a flag
        with flag.installed():
            _run(config, overrides, plan, flag)
    return 0


def _run(config: DictConfig, overrides: Sequence[str], plan: Plan, flag: StopFlag) -> None:
    """All from where the processes have met."""
    folder = first_decides(partial(run_folder, config))
    sizes = first_decides(partial(micro_batch_sizes, plan, world().world_size))
    plan = with_micro_batches(plan, sizes)
    for name, size in sizes.items():
        say(f"{name}: micro-batches of {size}, by the memory of a device")
    with held_by_first(folder), removed_if_refused(folder):
        has_other_values = first_decides(partial(refuse_changes, config, folder))
        values = {"overrides.json": json.dumps(redact(list(overrides))), "config.yaml": without_secrets(config)}
        if not has_other_values:
            for name, text in values.items():
                write_once(folder / name, text)
        tell_other_environment(folder)
        if not (folder / "environment.json").exists():
            write_once(folder / "environment.json", json.dumps(redact(environment()), indent=2))
        started = time.time()

        def check(base: Path, tokenizer: Any) -> None:
            first_decides(lambda: refuse_other_inputs(folder, config, inputs(plan, base, tokenizer)))
            if has_other_values and is_first():  # only now: before, the folder would say what nothing was trained with
                replace_values(folder, values)

        with flag.preparing() if plan.base is None else nullcontext():  # it is fetched and read, not trained
            policy, tokenizer = base_policy(plan, folder, flag, check)
        tell_dropped(plan, tokenizer)
        evaluator = TaskEvaluator(plan, tokenizer, folder, flag, kept=kept_evaluations(plan, folder))
        stages = [
            make_stage(plan, parts, tokenizer, partial(make_trainer, plan, flag, tokenizer)) for parts in plan.stages
        ]
        policy, evaluations = run_recipe(folder, policy, stages, evaluator, plan.seed, say, config.resume == "force")
        if is_first():
            finish(plan, folder, policy, tokenizer, evaluator, evaluations, time.time() - started)
        wait_for_all()


@contextmanager
def held_by_first(folder: Path) -> Iterator[None]:
    """The run's lock, which the first process takes for all; where it is refused, it is refused to all."""
    with ExitStack() as stack:
        first_decides(lambda: stack.enter_context(lock_run(folder)))
        yield


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """A new run that is refused before its first stage has begun leaves nothing behind; the base is in the cache.

    Entered under the lock: until it is held, the folder may become another run's.
    """
    is_new = is_first() and all(file.name.startswith(".lock") for file in folder.iterdir())
    try:
        yield
    except ValueError:
        if is_new and all(file.parent.name == "base" for file in folder.glob("stages/*/*")):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent == OUTPUTS and not any(OUTPUTS.iterdir()):
                OUTPUTS.rmdir()
        raise


MAY_CHANGE = (
    "run_dir", "resume", "dry_run", "debug", "logger", "logger.", "callbacks.save", "callbacks.save.",
    "callbacks.samples", "callbacks.samples.", "evaluation.", "strategy.", "hydra.", "trainer.accelerator",
    "trainer.devices", "trainer.num_nodes", "trainer.log_every_n_steps", "trainer.enable_model_summary", "hardware.",
)  # fmt: skip
"""Keys that say where and how a run goes on, not what it computes."""
OF_ALL_STAGES = ("seed:", "model.", "task.", "quirks.", "trainer.")
"""How the keys begin that every stage has been made with; what else makes one stands, resolved, under `stages.NAME`."""


def refuse_changes(config: DictConfig, folder: Path) -> bool:
    """An existing run goes on only with the values it was started with, unless `resume=force` says otherwise.

    Returns:
        Whether it goes on with others. What the folder says of them is not touched.

    Raises:
        ConfigError: listing the keys that differ.
    """
    file = folder / "config.yaml"
    if not file.exists():
        if any(folder.glob("stages/*/*")) and config.resume != "force":
            cause = f"{folder} holds stages of a run, but no config.yaml that says of which"
            raise ConfigError(
                "run_dir", cause, "another run_dir, or resume=force to go on with them all the same", "E503"
            )
        return False
    now = without_secrets(config)
    old, new = (flatten(_as_tree(text)) for text in (file.read_text(encoding="utf-8"), now))
    changed = differing_keys(old, new, MAY_CHANGE)
    if not changed:
        return False
    _refuse_unless_forced(config, folder, f"was started with other values: {'; '.join(changed)}")
    for name in finished_stages(config, folder):
        made_it = [line for line in changed if line.startswith((*OF_ALL_STAGES, f"stages.{name}."))]
        _refuse_for_finished(folder, name, made_it)
    say(f"going on with other values, as resume=force says: {'; '.join(changed)}")
    return True


def replace_values(folder: Path, values: Mapping[str, str]) -> None:
    """Files that say what a run is made with, in the place of those that said it so far, which are kept beside them.

    Args:
        folder: of the run.
        values: texts by name. `config.yaml` is the last: until it says them, the next start finds them changed again.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    for name, text in values.items():
        file = folder / name
        if file.exists():
            copy_whole(file, file.with_name(f"{file.stem}.until-{now}{file.suffix}"))
        write_whole(file, text)


def without_secrets(config: DictConfig) -> str:
    """The configuration, resolved, as it stands in the run's folder."""
    return yaml.safe_dump(redact(OmegaConf.to_container(config, resolve=True)), sort_keys=False, allow_unicode=True)


def refuse_other_inputs(folder: Path, config: DictConfig, now: dict[str, str]) -> None:
    """What the configuration names is still what it was when the run was started: weights and rows.

    Raises:
        ConfigError: listing what differs.
    """
    before = stored_facts(folder / INPUTS, say)
    changed = [] if before is None else differing_keys(before, now)
    if changed:
        _refuse_unless_forced(config, folder, f"was started from something else: {'; '.join(changed)}")
        for name in finished_stages(config, folder):
            _refuse_for_finished(folder, name, [line for line in changed if line.startswith((BASE, f"{ROWS} {name}:"))])
        say(f"going on from something else, as resume=force says: {'; '.join(changed)}")
    keep_inputs(folder, now)


def _refuse_unless_forced(config: DictConfig, folder: Path, what: str) -> None:
    if config.resume != "force":
        cure = "another run_dir, or resume=force to go on with the new values"
        raise ConfigError("resume", f"{folder} {what}", cure, "E503")


def _refuse_for_finished(folder: Path, stage: str, changed: Sequence[str]) -> None:
    if changed:
        cause = f"stage {stage} of {folder} is finished, and would not be run again with {'; '.join(changed)}"
        raise ConfigError("resume", cause, f"another run_dir, or this one without stages/{stage}", "E503")


def finished_stages(config: DictConfig, folder: Path) -> list[str]:
    """Names of the stages that will be taken as they are."""
    return [name for name in config.recipe.stages if StageFolder(folder / "stages" / name).weights.exists()]


def tell_other_environment(folder: Path) -> None:
    """One line where a run goes on under other versions, another commit or on another machine."""
    before = stored_facts(folder / "environment.json", say) if is_first() else None
    if before is not None:
        before, now = (flatten(redact(record)) for record in (before, environment()))
        changed = differing_keys(before, now, ("command", "command."))
        if changed:
            say(f"goes on under another environment, so not bit for bit as it would have: {'; '.join(changed)}")


def _as_tree(text: str) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException):
        tree = None
    return cast("dict[str, Any]", tree) if isinstance(tree, dict) else {"config.yaml": "(not readable)"}


def run_folder(config: DictConfig) -> Path:
    """The run's folder: the one named, or a new one under outputs/.

    Raises:
        ConfigError: if it holds a run already and `resume=never`, or if it cannot be made or written.
    """
    try:
        folder = _made_folder(config)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        cause = f"{error.filename or config.run_dir or 'outputs'}: {error.strerror}"
        raise ConfigError("run_dir", cause, "a folder that can be made and written", "E501") from None


def _made_folder(config: DictConfig) -> Path:
    if config.run_dir is not None:
        folder = Path(config.run_dir)
        if config.resume == "never" and (folder / "config.yaml").exists():
            raise ConfigError("run_dir", f"{folder} holds a run already", "resume=auto, or another run_dir", "E503")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    words = (config.recipe.name, config.task.name, config.model.name, f"seed{config.seed}")
    job = slurm_job()
    if job is not None:  # a job that SLURM has queued again must find what it has done so far
        digest = hashlib.sha256(OmegaConf.to_yaml(config, resolve=True).encode()).hexdigest()[:8]
        folder = OUTPUTS / "-".join([f"slurm{job}", *words, digest])
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stem = OUTPUTS / "-".join([time.strftime("%Y%m%d-%H%M%S"), *words])
    folder, number = stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = stem.with_name(f"{stem.name}-{number}")


def write_once(file: Path, text: str) -> None:
    """Write a file unless it is there."""
    if is_first() and not file.exists():
        write_whole(file, text)


def environment() -> dict[str, Any]:
    """What a difference between two machines could be explained by."""
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {
        "packages": versions(*PACKAGES),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": commit,
        "command": sys.argv,
    }


def tell_rows(plan: Plan) -> None:
    """Print what the data is and what was left out."""
    say(f"{plan.task.display_name}: " + "; ".join(plan.task.overlap.lines()))
    for key, commit in hub_commits(plan).items():
        say(f"{key}: the hub's commit {commit}")


def hub_commits(plan: Plan) -> dict[str, str]:
    """Of the data sets that were read from the hub, by the keys that name them."""
    return {key: commit for key, commit in plan.task.commits.items() if commit is not None}


def tell_dropped(plan: Plan, tokenizer: Any) -> None:
    """Print how many rows no stage trains on because they are too long, and how many lose their end."""
    for parts in plan.stages:
        rows, own = plan.rows_of(parts, tokenizer), getattr(parts.data, "max_prompt_length", None)
        if rows.dropped:
            limit = f"task.max_prompt_length={plan.task.max_prompt_length}"
            limit = limit if own is None else f"data.max_prompt_length={own}"
            say(f"{parts.name}: {rows.dropped} of {rows.asked} rows left out: longer than {limit} or the canvas")
        if rows.cut:
            say(f"{parts.name}: {rows.cut} of {len(rows.rows)} rows cut on the right at the layout's max_length")


# ------------------------------------------------------------------------------------------------------------------ end


def finish(
    plan: Plan,
    folder: Path,
    policy: Policy,
    tokenizer: Any,
    evaluator: TaskEvaluator,
    entries: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Write the final model and results.json, and print the table."""
    if not (folder / "model").exists():
        # An adapter goes on alone, so it says its places in the words of the model it belongs to.
        is_official = policy.is_adapted and plan.config.model.path is not None
        layout = "official" if is_official else "d1lit"

        def write(place: Path) -> None:
            save_weights(policy, place, layout)
            tokenizer.save_pretrained(place)

        put_whole(folder / "model", write, with_manifest=False)
    results = {
        "recipe": plan.config.recipe.name,
        "task": plan.task.display_name,
        "model": plan.config.model.name,
        "seed": plan.seed,
        "grader": plan.task.grader,
        "hub_commits": hub_commits(plan),
        "data": {
            **plan.task.overlap.record(),
            "dropped_rows": {parts.name: plan.rows_of(parts, tokenizer).dropped for parts in plan.stages},
            "cut_rows": {parts.name: plan.rows_of(parts, tokenizer).cut for parts in plan.stages},
        },
        "evaluations": [entry for entry in entries if "probe" not in entry],
        "probes": [entry for entry in entries if "probe" in entry],
        "baselines": evaluator.baselines(),
        "cost": {"seconds": round(seconds, 1), **read_costs(folder, [parts.name for parts in plan.stages])},
    }
    write_whole(folder / "results.json", json.dumps(results, indent=2))
    show_table(results)
    if plan.config.report:
        present(plan, folder, policy, tokenizer)
    print(folder / "results.json")
