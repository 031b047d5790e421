"""The built-in model's base: pretrained once, kept under the hash of all that made it, found again by every run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from omegaconf import DictConfig, OmegaConf

from d1lit.app.pinning import weights_sha256
from d1lit.app.plan import Plan, make_stage
from d1lit.app.run_policy import kept_base
from d1lit.app.task_evaluator import code_sha256
from d1lit.app.trainer import make_trainer
from d1lit.checkpoint import MANIFEST, broken, lock_run, put_whole, seal
from d1lit.errors import ConfigError
from d1lit.evaluation import write_whole
from d1lit.models import Policy
from d1lit.models.loading import find_folder
from d1lit.processes import all_gather_objects, first_decides, is_first
from d1lit.recipes import StageFolder, run_stage
from d1lit.report.console import say
from d1lit.stopping import StopFlag


def cache_folder() -> Path:
    """Where the built-in base models are kept: $D1LIT_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "d1lit"
    return Path(os.environ.get("D1LIT_CACHE", default))


def base_policy(
    plan: Plan, folder: Path, flag: StopFlag, check: Callable[[Path, Any], Any] = lambda place, tokenizer: None
) -> tuple[Policy, Any]:
    """The model the stages start from: read from its place, or the tiny one, pretrained once and kept.

    Args:
        plan: of the run.
        folder: of the run.
        flag: ends the pretraining at a signal.
        check: is told where the weights stand, and the tokenizer; what it raises ends the run before that is kept.
    """
    if plan.base is None:
        place = first_decides(partial(find_folder, plan.config.model.path, plan.config.model.revision))
        policy, tokenizer = plan.make_policy()
        check(place, tokenizer)
        return policy, tokenizer
    home = first_decides(partial(find_base, plan, folder))
    if home is None:
        home = base_home(plan)
        work = kept_base(folder).parent
        if first_decides(partial(is_of_other_settings, plan, work)):
            make_shared_base(plan, flag)
        else:
            if is_first():
                note_settings(plan, work)
            make_base(plan, work, flag)
    else:
        say(f"base: the tiny model, taken from {home}")
    blind = [node for node, sees_it in all_gather_objects((platform.node(), home.exists())) if not sees_it]
    if blind:
        cause = f"{home}, which the first process has found or made, is not seen on {', '.join(sorted(set(blind)))}"
        raise ConfigError("strategy", cause, "D1LIT_CACHE=FOLDER on a disk that all machines share", "E601")
    policy, tokenizer = plan.make_policy(home)
    check(home, tokenizer)
    own = kept_base(folder)
    if home != own and is_first():
        # The cache may be emptied, and other code or another number of threads makes another base.
        copy = partial(shutil.copytree, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        put_whole(own, copy)
        note_settings(plan, own.parent)
    return policy, tokenizer


SETTINGS = "settings"
"""File beside a run's base: the hash of the settings that it is made with."""


def find_base(plan: Plan, folder: Path) -> Path | None:
    """The base that the run has kept, whatever code it was made by, else the one in the cache; None where none is."""
    own, home = kept_base(folder), base_home(plan)
    is_complete = (own / "tokenizer_config.json").exists()  # a pretraining that was killed at its end has left none
    if is_complete and not is_of_other_settings(plan, own.parent) and is_usable(own):
        return own
    return home if is_usable(home) else None


def is_usable(home: Path) -> bool:
    """Whether a base is kept there and whole; one that is damaged is named."""
    if not home.exists():
        return False
    reason = broken(home)
    if reason is not None:
        say(f"base: {home} is not used: {reason}")
    return reason is None


def is_of_other_settings(plan: Plan, work: Path) -> bool:
    """Whether what a run has of a base was made, or begun, with settings that are not the plan's, or nobody knows."""
    note = work / SETTINGS
    return work.exists() and not (note.exists() and note.read_text() == settings_hash(plan))


def note_settings(plan: Plan, work: Path) -> None:
    """From now on the base in a run's folder is one of these."""
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / SETTINGS, settings_hash(plan))


def base_home(plan: Plan) -> Path:
    """Where the plan's base model is kept once it is made."""
    return cache_folder() / "base" / base_hash(plan)


def make_base(plan: Plan, work: Path, flag: StopFlag) -> None:
    """Pretrain the tiny model in this process alone, and keep it."""
    assert plan.base is not None
    home = base_home(plan)
    say(f"base: pretraining the tiny model on {plan.task.name}; it will be kept in {home}")
    policy, tokenizer = plan.make_policy()
    stage = make_stage(plan, plan.base, tokenizer, partial(make_trainer, plan, flag, tokenizer))
    folder = StageFolder(work)
    run_stage(folder, policy, stage, plan.seed, say, plan.config.resume == "force")
    keep_base(folder.weights, tokenizer, home)


def make_shared_base(plan: Plan, flag: StopFlag) -> None:
    """The base for a run of several processes, made by the first before they meet: the one any run would make.

    Where another run is making it, this one waits.
    """
    home = base_home(plan)
    work = home.with_name(f"{home.name}.work")
    is_told = False
    while not is_usable(home):
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_run(work))
            except ValueError as error:
                if not is_told:
                    say(f"base: waits for the one that is being made: {error}")
                is_told = True
                flag.raise_if_stopped()
                time.sleep(1.0)
                continue
            if not is_usable(home):
                make_base(plan, work / "stages" / "base", flag)
            for left in work.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)


def base_hash(plan: Plan) -> str:
    """Hash of all that makes the base model: its settings, and the code that runs."""
    names = ("tasks", "models", "modules", "data.py", "draws.py", "masking.py", "schedules.py", "losses")
    names += ("rewards/sudoku.py",)  # the grids that may occur
    parts = (settings_hash(plan), torch.__version__, code_sha256(*names))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def settings_hash(plan: Plan) -> str:
    """Hash of what is said of the base model: the model's settings, the task's text, and the seed.

    The corpus is generated, but keeps away from what test and validation hold, wherever these come from.
    """
    config = OmegaConf.to_container(plan.config, resolve=True)
    assert isinstance(config, dict)
    parts = {"model": config["model"], "task": config["task"], "seed": config["seed"]}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for task, _ in plan.task.portions(None):
        for row in (*task.rows("test"), *task.rows("val")):
            digest.update(task.source.identity(row).encode())
    return digest.hexdigest()


def kept_evaluations(plan: Plan, run: Path) -> Path | None:
    """Where runs keep evaluations of the base that this one starts from, for each other.

    None where they are not wanted, in all processes but the first, for an adapter, which does not hold its weights, and
    where a part of the task or the sampler is the user's own, whose code no hash here knows.
    """
    if not plan.config.evaluation.reuse_base or not is_first() or has_own_parts(plan.config):
        return None
    if plan.base is not None:
        folder = kept_base(run)
    else:
        folder = find_folder(plan.config.model.path, plan.config.model.revision)
    if (folder / "adapter_config.json").exists():
        return None
    model = OmegaConf.to_container(plan.config.model, resolve=True)
    digest = hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode())
    digest.update(weights_sha256(folder).encode())
    return cache_folder() / "evaluations" / digest.hexdigest()[:16]


def has_own_parts(config: DictConfig) -> bool:
    """Whether task or sampler name a class or function from outside the project."""
    texts = [OmegaConf.to_yaml(node, resolve=True) for node in (config.task, config.sampler)]
    return any(not name.startswith("d1lit.") for text in texts for name in re.findall(r"_target_: '?([\w.]+)", text))


def keep_base(weights: Path, tokenizer: Any, home: Path) -> None:
    """Copy a finished base into the cache, in the place of a damaged one; another process may have been faster.

    Raises:
        OSError: if there is none afterwards.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone, on whatever machine it runs.
    staging, damaged = (home.with_name(f".{home.name}.{uuid4().hex}.{role}") for role in ("staging", "removing"))
    try:
        shutil.copytree(weights, staging, ignore=shutil.ignore_patterns(MANIFEST))
        tokenizer.save_pretrained(staging)
        seal(staging)
        if home.exists() and broken(home) is not None:
            with suppress(FileNotFoundError):
                os.rename(home, damaged)
        os.rename(staging, home)
    except OSError:
        if broken(home) is not None:
            raise
    finally:
        for left in (staging, damaged):
            shutil.rmtree(left, ignore_errors=True)
