"""Components from their configuration nodes: found, called, and checked as far as that is possible with no network."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, ListConfig, OmegaConf

from d1lit.app.config_errors import as_config_error
from d1lit.errors import ConfigError
from d1lit.losses import BranchingAdvantage
from d1lit.types import RewardBatch

GIVEN_BY_HYDRA = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def build(config: DictConfig, key: str, kind: Any = None) -> Any:
    """Instantiate the node at `key`.

    Args:
        config: the whole configuration.
        key: where the node stands.
        kind: what it must become: a class, or a protocol that can be checked at run time.

    Raises:
        ConfigError: naming the key and what it refused.
    """
    node = OmegaConf.select(config, key)
    if not isinstance(node, DictConfig) or node.get("_target_") is None:
        raise ConfigError(
            key, "names no component", f"a _target_, or a choice of the group {key.split('.')[0]}", "E204"
        )
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise _from_instantiation(error, key) from error
    if kind is not None and not isinstance(built, kind):
        found = built.__name__ if isinstance(built, type) else type(built).__name__
        raise ConfigError(
            f"{key}._target_",
            f"{node._target_} makes a {found}, which is no {getattr(kind, '__name__', kind)}",
            f"one of {key}=...",
            "E204",
        )
    return built


def _from_instantiation(error: InstantiationException, key: str) -> ConfigError:
    cause: BaseException | None = error.__cause__
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    place = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else key
    place = re.sub(r"(?<=[a-z_])\d+$", "", place)  # Hydra's way to say which item of a list
    if isinstance(cause, ValueError):
        return as_config_error(cause, place)
    text = " ".join(str(cause or error).split())
    return ConfigError(place, text.removesuffix("."), f"--cfg job shows what stands at {place}", "E205")


# -------------------------------------------------------------------------------------------------------------- targets


def check_targets(config: DictConfig) -> None:
    """Every `_target_` leads somewhere, and what stands beside it is an argument there.

    Components that are bound now and called later (`_partial_`) would else refuse an argument in the middle of a run.

    Raises:
        ConfigError: for the first that does not.
    """
    for key, node in _component_nodes(config):
        target = _found(node._target_, key)
        given = [str(name) for name in node if name not in GIVEN_BY_HYDRA]
        parameters = inspect.signature(target).parameters
        if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            continue
        for name in given:
            if name not in parameters:
                near = difflib.get_close_matches(name, list(parameters), n=1)
                known = near or [p for p in parameters if p not in ("self", "policy", "args", "kwargs")]
                raise ConfigError(
                    f"{key}.{name}", f"{target.__name__} has no such argument", " or ".join(known[:6]), "E205"
                )


def _component_nodes(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig) and not node._is_none():
        if "_target_" in node and node._target_ is not None:
            yield key, node
        for name in node:
            if not OmegaConf.is_interpolation(node, str(name)):
                yield from _component_nodes(node[name], f"{key}.{name}" if key else str(name))
    elif isinstance(node, ListConfig) and not node._is_none():
        for place, item in enumerate(node):
            yield from _component_nodes(item, f"{key}[{place}]")


def _found(target: Any, key: str) -> Callable[..., Any]:
    try:
        found = get_object(target)
    except Exception as error:  # whatever the module of the user's own raises while it is imported
        text = " ".join(str(error).split()).split(" Are you sure")[0]
        raise ConfigError(
            f"{key}._target_", f"{target!r} is not found ({text})", _nearest_target(target), "E203"
        ) from None
    if not callable(found):
        raise ConfigError(
            f"{key}._target_", f"{target!r} is a {type(found).__name__}, not a class or function", "a class", "E203"
        )
    return found


def _nearest_target(target: Any) -> str:
    """The nearest public name of the module that the target begins with."""
    parts = str(target).split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = get_object(".".join(parts[:cut]))
        except Exception:
            continue
        near = difflib.get_close_matches(parts[cut], [n for n in dir(module) if not n.startswith("_")], n=1)
        return ".".join([*parts[:cut], *near]) if near else f"a name of {'.'.join(parts[:cut])}"
    return "a dotted name such as d1lit.losses.clipped.ClippedPolicyLoss (hydra.searchpath for a folder of your own)"


# ------------------------------------------------------------------------------------------------- what only runs later


def check_advantage(key: str, advantage: Any) -> None:
    """Two groups of two go through it, or two of what it says a group is.

    Raises:
        ConfigError: if what comes out is not a number for each rollout.
    """
    tree = advantage.tree if isinstance(advantage, BranchingAdvantage) else None
    size = 2 if tree is None else tree.leaves
    value = torch.tensor([[1.0], [0.0], [0.5], [0.0]]).repeat(size // 2 + 1, 1)[: 2 * size]
    rewards = RewardBatch(value, torch.ones(2 * size, 1, dtype=torch.bool), torch.ones(1))
    try:
        values = advantage(rewards, size)
        fits = isinstance(values, torch.Tensor) and values.shape[:1] == (2 * size,)
    except Exception as error:
        raise ConfigError(
            f"{key}._target_", f"fails on {2 * size} rewards ({_brief(error)})", "advantage=group_mean", "E206"
        ) from None
    if not fits:
        raise ConfigError(f"{key}._target_", "gives no number for each rollout", "advantage=group_mean", "E204")


def check_optimizer(key: str, optimizer: Callable[..., Any], lr_schedule: Callable[..., Any], num_updates: int) -> None:
    """Optimizer and schedule take two parameters and a step.

    Raises:
        ConfigError: for whichever refuses, or is something else.
    """
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    built = _called(f"{key}.optimizer", optimizer, [("model.layers.0.matrix", matrix), ("vector", vector)])
    if not isinstance(built, torch.optim.Optimizer):
        raise ConfigError(f"{key}.optimizer._target_", f"makes a {type(built).__name__}", "optimizer=adamw", "E204")
    schedule = _called(f"{key}.lr_schedule", lr_schedule, built, num_updates)
    if not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        raise ConfigError(
            f"{key}.lr_schedule._target_", f"makes a {type(schedule).__name__}", "lr_schedule=constant", "E204"
        )


def check_module(key: str, module: Callable[..., Any], later: set[str]) -> None:
    """The stage's module gets every argument it needs: from its YAML, or later from the stage.

    Raises:
        ConfigError: naming the first that is missing.
    """
    if not isinstance(module, partial) or not (
        isinstance(module.func, type) and issubclass(module.func, L.LightningModule)
    ):
        raise ConfigError(
            f"{key}._target_", "is not a LightningModule bound with _partial_: true", "/stage@stages.NAME", "E204"
        )
    for name, parameter in inspect.signature(module.func).parameters.items():
        has_value = name in module.keywords or name in later or parameter.default is not parameter.empty
        if not has_value and parameter.kind != parameter.VAR_KEYWORD:
            raise ConfigError(f"{key}.{name}", f"{module.func.__name__} needs it", f"+{key}.{name}=VALUE", "E205")


def check_watchers(config: DictConfig, folder: Path) -> None:
    """Callbacks and logger are callbacks and a logger; nothing is written.

    Raises:
        ConfigError: for the first that is not.
    """
    extras = {
        "save": {"folder": folder},
        "samples": {"stage": "check", "file": folder / "samples.jsonl", "console": None},
    }
    for name, node in config.callbacks.items():
        if node is None:
            continue
        key = f"callbacks.{name}"
        built = build(config, key)
        if str(name) in extras:
            built = _called(key, built, **extras[str(name)])
        if not isinstance(built, L.Callback):
            raise ConfigError(
                f"{key}._target_", f"makes a {type(built).__name__}, which is no Callback", "a callback", "E204"
            )
    if config.logger is not None and config.logger.get("_target_") is not None:
        logger = build(config, "logger")
        if not isinstance(logger, partial) or not (isinstance(logger.func, type) and issubclass(logger.func, Logger)):
            raise ConfigError(
                "logger._target_", "is not a Logger bound with _partial_: true", "logger=tensorboard", "E204"
            )


def check_trainer(config: DictConfig) -> None:
    """The Trainer knows every flag, and none is one that a stage decides.

    Raises:
        ConfigError: naming the flag.
    """
    decided = {
        "max_steps": "stages.NAME.max_updates",
        "max_epochs": "stages.NAME.max_updates",
        "accumulate_grad_batches": "stages.NAME.micro_batch_size",
        "gradient_clip_val": "stages.NAME.gradient_clip",
        "logger": "logger=tensorboard|csv|wandb|none",
        "callbacks": "callbacks.NAME",
        "strategy": "strategy=auto|ddp|fsdp",
        "default_root_dir": "run_dir",
        "enable_checkpointing": "callbacks.save=null",
        "limit_val_batches": "stages.NAME.validate_every",
        "val_check_interval": "stages.NAME.validate_every",
    }
    known = set(inspect.signature(L.Trainer).parameters)
    for name in map(str, config.trainer):
        if name in decided:
            raise ConfigError(f"trainer.{name}", "is decided elsewhere", decided[name], "E210")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known - set(decided)), n=1)
            raise ConfigError(
                f"trainer.{name}", "Lightning's Trainer has no such flag", near[0] if near else "--cfg job", "E205"
            )


def _called(key: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    try:
        return function(*args, **named)
    except ValueError as error:
        raise as_config_error(error, key) from None
    except Exception as error:
        raise ConfigError(
            key, f"cannot be used ({_brief(error)})", f"--cfg job shows what stands at {key}", "E206"
        ) from None


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
