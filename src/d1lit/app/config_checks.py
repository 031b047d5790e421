"""Kinds and ranges of the plain values of a configuration: those that no component refuses by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from d1lit.app.composing import shown
from d1lit.errors import ConfigError

Complaint = Callable[[Any], str | None]
"""What is wrong with a value; None if nothing."""


def _whole(least: int) -> Complaint:
    return lambda v: None if type(v) is int and v >= least else f"is not a whole number of {least} or more"


def _number(least: float | int, inclusive: bool = True) -> Complaint:
    def complaint(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and (value >= least if inclusive else value > least) and math.isfinite(value):
            return None
        return f"is not a number {'of' if inclusive else 'above'} {least:g}{' or more' if inclusive else ''}"

    return complaint


def _one_of(*choices: str) -> Complaint:
    return lambda v: None if v in choices else f"is none of {', '.join(choices)}"


def _optional(inside: Complaint) -> Complaint:
    return lambda v: None if v is None else inside(v)


def _each(inside: Complaint) -> Complaint:
    def complaint(value: Any) -> str | None:
        if not isinstance(value, ListConfig | list) or not value:
            return "is not a list with something in it"
        return next((found for found in map(inside, value) if found is not None), None)

    return complaint


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "is not text"


def _truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is neither true nor false"


_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""The others of Lightning's cast the weights, which `model.dtype` has chosen, and float32 adapters with them."""
_STAGE: dict[str, tuple[Complaint, str]] = {
    "max_updates": (_whole(1), "1 or more"),
    "batch_size": (_whole(1), "1 or more"),
    "micro_batch_size": (_optional(_whole(1)), "1 or more, or null for what fits the device's memory"),
    "gradient_clip": (_optional(_number(0, inclusive=False)), "null for no clipping"),
    "validate_every": (_optional(_whole(1)), "null for no looks at the validation rows"),
    "select": (_one_of("last", "best_val"), "last"),
    "optimizer.lr": (_number(0), "1.0e-5"),
    "optimizer.weight_decay": (_number(0), "0.0"),
    "optimizer.betas": (_each(_number(0)), "[0.9, 0.99]"),
    "lora.quantize": (_optional(_one_of("nf4")), "nf4, or null"),
    "lr_schedule.warmup_updates": (_number(0), "0"),
    "data.count": (_optional(_whole(1)), "null for all"),
}
_VALUES: dict[str, tuple[Complaint, str]] = {
    "seed": (_whole(0), "0"),
    "run_dir": (_optional(_text), "a folder's path, or null"),
    "resume": (_one_of("auto", "never", "force"), "auto"),
    "quirks.inner_index_by_micro_batch": (_truth, "false"),
    "quirks.dropout_everywhere": (_truth, "false"),
    "quirks.reward_after_end": (_truth, "false"),
    "dry_run": (_truth, "false"),
    "model.path": (_optional(_text), "a folder, a hub id, or null for the built-in model"),
    "model.dtype": (_one_of("float32", "bfloat16", "float16", "float64"), "float32"),
    "model.attend_padding": (_truth, "false"),
    "model.compile": (_truth, "false"),
    "model.cuda_graphs": (_truth, "false"),
    "task.grader": (_one_of("strict", "d1"), "strict"),
    "trainer.precision": (_optional(_one_of(*_PRECISIONS)), "null, with model.dtype as you want the weights"),
    "trainer.devices": (_whole(1), "trainer.devices=1"),
    "trainer.num_nodes": (_whole(1), "trainer.num_nodes=1"),
    "trainer.accelerator": (_one_of("auto", "cpu", "gpu", "cuda", "mps"), "auto"),
    "trainer.log_every_n_steps": (_whole(1), "1"),
    "evaluation.split": (_one_of("train", "val", "test"), "test"),
    "evaluation.rows": (_optional(_whole(1)), "null for all"),
    "evaluation.lengths": (_optional(_each(_whole(1))), "[128, 256]"),
    "evaluation.temperature": (_number(0), "0.0"),
    "evaluation.seed": (_whole(0), "0"),
    "evaluation.batch_size": (_whole(1), "8"),
    "evaluation.base": (_truth, "true"),
    "evaluation.reuse_base": (_truth, "true"),
    "seeds": (_each(_whole(0)), "[0]"),
    "run": (_optional(_text), "a folder that train.py has made"),
    "adapter": (_optional(_text), "a folder that holds an adapter"),
    "rescore": (_optional(_text), "a JSON lines file"),
    "output": (_optional(_text), "a folder's path, or null"),
}


def check_values(config: DictConfig) -> None:
    """Kinds and ranges of the plain values; those of a component are its own business.

    Raises:
        ConfigError: for the first that is wrong.
    """
    for key, (complaint, cure) in _VALUES.items():
        _check_value(config, key, complaint, cure)
    stages = config.recipe.stages
    if not isinstance(stages, ListConfig):
        raise ConfigError("recipe.stages", f"{stages!r} is not a list", "[sft, grpo]", "E201")
    for name in stages:
        if OmegaConf.select(config, f"stages.{name}") is None:
            there = ", ".join(map(str, config.get("stages") or ())) or "none"
            raise ConfigError("recipe.stages", f"no stage {name!r}", f"those that are there ({there})", "E209")
    bases = ["model.base"] if config.model.path is None and config.model.get("base") is not None else []
    for stage in [*(f"stages.{name}" for name in stages), *bases]:
        for key, (complaint, cure) in _STAGE.items():
            _check_value(config, f"{stage}.{key}", complaint, cure)


_FILES = {"task.train_data": "builtin", "task.test_data": "builtin", "task.demonstration_data": "task"}
"""Keys that may name a file, and the choice that names none."""


def check_places(config: DictConfig) -> None:
    """What is named as a file or a folder here is here. Reading it comes later, and says more.

    Raises:
        ConfigError: for the first that is not.
    """
    for key, without in _FILES.items():
        place = str(OmegaConf.select(config, key))
        if _is_path(place, (".jsonl", ".json", ".csv", ".parquet")) and not Path(place).expanduser().exists():
            raise ConfigError(
                key, f"no file {place}", f"an existing path, a hub id owner/name, or {key}={without}", "E301"
            )
    place = config.model.path
    if place is not None and _is_path(place) and not Path(place).expanduser().is_dir():
        raise ConfigError(
            "model.path", f"no folder {place}", "a folder that holds the model, or a hub id owner/name", "E401"
        )


def _is_path(place: str, suffixes: tuple[str, ...] = ()) -> bool:
    return place.startswith(("/", ".", "~")) or place.endswith(suffixes)


def _check_value(config: DictConfig, key: str, complaint: Complaint, cure: str) -> None:
    place, _, name = key.rpartition(".")
    node = OmegaConf.select(config, place) if place else config
    if not isinstance(node, DictConfig) or name not in node:
        return
    value = node[name]
    found = complaint(value)
    if found is not None:
        raise ConfigError(key, f"{shown(value)} {found}", cure, "E202")
