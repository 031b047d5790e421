"""Command lines to configurations: of one run, or of every job of a sweep."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from d1lit.app.config_errors import CONF, nearest, one_line, syntax_error, translated
from d1lit.errors import ConfigError


@dataclass(frozen=True)
class Jobs:
    """The configurations that a command line asks for: one, or all jobs of a sweep."""

    configs: Sequence[DictConfig]
    overrides: Sequence[Sequence[str]]
    """What was said for each of them."""
    is_multirun: bool
    is_search: bool = False
    """A sweeper chooses the jobs one after the other; `configs` holds one of them."""


def compose_jobs(name: str, words: Sequence[str]) -> Jobs:
    """Compose the command line's configuration, or each job's of a sweep.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    overrides, is_multirun = _split(words)
    _composed.cache_clear()  # files may have changed since the last command line
    _of_choices.cache_clear()
    with _composer():
        config, experiment = _compose_with_mode(name, overrides, is_multirun)
        if experiment is None:
            return Jobs([config], [overrides], False)
        words = [*experiment, *overrides]
        is_search = any(word.startswith("hydra/sweeper=") for word in words)
        # What a search will try is not known yet: the first candidate of each range stands for all of them.
        jobs = [[_first_candidate(word) for word in words]] if is_search else _sweep(words)
        return Jobs([_compose(name, job) for job in jobs], jobs, True, is_search)


def _split(words: Sequence[str]) -> tuple[list[str], bool]:
    """Overrides, and whether a sweep is asked for; `--config-dir DIR` is a search path by another name."""
    overrides, is_multirun = [], False
    rest = iter(words)
    for word in rest:
        if word in ("-m", "--multirun"):
            is_multirun = True
        elif word in ("--config-dir", "-cd") or word.startswith("--config-dir="):
            folder = word.split("=", 1)[1] if "=" in word else next(rest, "")
            if not Path(folder).is_dir():
                raise ConfigError(
                    "--config-dir", f"no folder {folder!r}", "the folder that holds your group folders", "E107"
                )
            overrides.append(f"hydra.searchpath=[file://{Path(folder).resolve()}]")
        elif word.startswith("-"):
            known = ["--help", "--multirun", "--cfg", "--resolve", "--config-dir"]
            raise ConfigError(word, "no such option", nearest(word, known) or "--help", "E101")
        elif "=" not in word and not word.startswith("~"):
            raise ConfigError(word, "is not KEY=VALUE", f"{word}=VALUE, or --help", "E102")
        else:
            overrides.append(with_choice(word))
    return overrides, is_multirun


def with_choice(word: str) -> str:
    """`paper_compat=true` as Hydra wants the choice of a group whose names are `true` and `false`: in quotes."""
    key, _, value = word.partition("=")
    if key != "paper_compat":
        return word
    return f"{key}={','.join(repr(part.strip().strip(chr(39)).lower()) for part in value.split(','))}"


# ------------------------------------------------------------------------------------------------------------ composing


@contextmanager
def _composer() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="d1lit"):
        yield


def _sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The override lists of all jobs of a sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:
        raise syntax_error(error, overrides) from None


def _first_candidate(word: str) -> str:
    """A word of a search with the first of its values."""
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException as error:
        raise syntax_error(error, [word]) from None
    swept: Any = override.value()
    if not override.is_sweep_override():
        return word
    first = swept.list[0] if isinstance(swept, ChoiceSweep) else swept.start
    return f"{override.get_key_element()}={first}"


def _compose_with_mode(name: str, overrides: Sequence[str], is_multirun: bool) -> tuple[DictConfig, list[str] | None]:
    """The composed configuration; and, of a sweep, the values that its experiment sweeps over, else None.

    An experiment may be a sweep by itself; what the command line sweeps over as well takes the place of its values.
    """
    swept = [o for o in overrides if _is_swept(o)]
    if is_multirun or (swept and _names_experiment(overrides)):
        config = _compose(name, [o for o in overrides if o not in swept], with_hydra=True)
        if not is_multirun and str(config.hydra.mode) != "RunMode.MULTIRUN":
            config = _compose(name, overrides, with_hydra=True)  # refused: no sweep was asked for
    else:
        config = _compose(name, overrides, with_hydra=True)
    experiment = None
    if is_multirun or str(config.hydra.mode) == "RunMode.MULTIRUN":
        params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=True)
        assert isinstance(params, dict)
        experiment = [with_choice(f"{key}={value}") for key, value in params.items()]
    with open_dict(config):
        del config["hydra"]
    return config, experiment


def _names_experiment(overrides: Sequence[str]) -> bool:
    return any(o.startswith("experiment=") for o in overrides)


def _is_swept(override: str) -> bool:
    """Whether an override names several values, one a job."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:
        return False  # refused below, with its cause
    return bool(parsed.is_sweep_override())


def _compose(name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    try:
        config = _with_values(name, overrides, with_hydra) or compose(name, list(overrides), with_hydra)
    except HydraException as error:
        raise translated(error, overrides, partial(_keys_without, name, overrides)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or "configuration"), one_line(error), "another value", "E201") from None
    check_leaves(config, name, overrides)
    return config


def _with_values(name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig | None:
    """What Hydra composes, the part that the choices decide made once: the jobs of a sweep mostly differ in values.

    None where that might not be the same, or something is wrong: Hydra then composes the whole, and says what.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        # Deletions, additions and blocks in the place of a choice act in the order in which they are said.
        if any(o.type != OverrideType.CHANGE or o.is_sweep_override() or isinstance(o.value(), dict) for o in parsed):
            return None
        has_own_groups = any(override.key_or_group == "hydra.searchpath" for override in parsed)
        values = [override for override in parsed if _is_value(override, has_own_groups)]
        choices = [str(o.input_line) for o in parsed if not _is_value(o, has_own_groups)]
        config = copy.deepcopy(_of_choices(name, tuple(choices)))
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException):
        return None
    if not with_hydra:
        with open_dict(config):
            del config["hydra"]
    return config


def _is_value(override: Override, has_own_groups: bool) -> bool:
    """Whether an override of the plain form sets a key, and surely chooses no file."""
    key = override.key_or_group
    if override.package is not None or "/" in key or key.startswith("hydra."):
        return False
    return "." in key or not (has_own_groups or (CONF / key).is_dir())  # a group may have a name of one word


@lru_cache(maxsize=32)
def _of_choices(name: str, choices: tuple[str, ...]) -> DictConfig:
    return compose(name, list(choices), return_hydra_config=True)


def check_leaves(config: DictConfig, name: str, overrides: Sequence[str]) -> None:
    """No missing value, no interpolation into nothing, no value of another type than the one it replaces.

    Raises:
        ConfigError: naming the key.
    """
    plain = [o for o in overrides if re.match(r"[\w.@/-]+=", o)]
    keys = [o.split("=", 1)[0] for o in plain if "." in o.split("=", 1)[0] and not o.startswith("hydra.")]
    if keys:
        defaults = _composed(name, tuple(o for o in overrides if o.split("=", 1)[0].lstrip("+~") not in keys))
        if defaults is not None:
            for key in keys:
                _check_kind(key, config, defaults)
    for key, value in _leaves(config):
        if key.startswith("hydra") or not isinstance(value, str):
            continue
        if value == "???":
            raise ConfigError(key, "has no value", f"{key}=VALUE", "E108")
        if "${" in value:
            try:
                OmegaConf.select(config, key, throw_on_resolution_failure=True)
            except OmegaConfBaseException as error:
                cause = f"refers to a value that is not there ({value})"
                raise ConfigError(key, cause, one_line(error), "E109") from None


def _keys_without(name: str, overrides: Sequence[str], key: str) -> list[str]:
    """All keys of what the choices of a command line give, the one of a given key left out."""
    choices = tuple(o for o in overrides if "." not in o.split("=", 1)[0] and o.split("=", 1)[0].strip("+~") != key)
    return [k for k, _ in _leaves(_composed(name, choices) or compose(name, []))]


@lru_cache(maxsize=32)
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig | None:
    """What the choices alone give, to compare single values with; None where they give nothing."""
    try:
        return _with_values(name, overrides) or compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException):
        return None


def _check_kind(key: str, config: DictConfig, defaults: DictConfig) -> None:
    try:
        value, default = OmegaConf.select(config, key), OmegaConf.select(defaults, key)
    except OmegaConfBaseException:
        return  # found out below, with its cause
    if value is None or default is None or _same_kind(value, default, key):
        return
    last = key.rpartition(".")[2]
    if isinstance(default, DictConfig):
        cure = f"{last}@{key}=CHOICE" if (CONF / last).is_dir() else f"{key}.NAME=VALUE"
        raise ConfigError(key, f"{value!r} is not a block of values", cure, "E201")
    raise ConfigError(key, f"{shown(value)} is not {_kind(default)}", f"{key}={shown(default)}", "E201")


def _same_kind(value: Any, default: Any, key: str) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not (isinstance(default, int) and isinstance(value, float))
    if key.endswith(".targets") or "columns." in key:  # one name, or several
        return isinstance(value, str | ListConfig)
    if isinstance(default, str):
        return isinstance(value, str | int | float)
    return isinstance(value, type(default))


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", ListConfig: "a list"}
    return kinds[type(value)]


def shown(value: Any) -> str:
    """A value as it would be typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of all leaves, interpolations unresolved."""
    if isinstance(node, DictConfig):
        for key in node:
            yield from _leaves(node._get_node(key), f"{prefix}.{key}" if prefix else str(key))
    elif not isinstance(node, ListConfig):
        yield prefix, node._value()
