"""Composing configurations, and one clear line for each way in which that can fail."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from d1lit.errors import REFUSED, ConfigError, split_code

CONF = Path(__file__).resolve().parents[2] / "conf"

KNOWN_ELSEWHERE = {
    # What other projects call it -> where it stands here.
    "num_generations": "stages.grpo.module.group_size",
    "num_iterations": "stages.grpo.module.num_inner_updates",
    "max_completion_length": "sampler.completion_length",
    "gen_length": "sampler.completion_length",
    "max_new_tokens": "sampler.completion_length",
    "diffusion_steps": "sampler.num_steps",
    "steps": "sampler.num_steps",
    "cfg_scale": "sampler.guidance",
    "remasking": "sampler",
    "p_mask_prompt": "estimator.prompt_mask_prob",
    "epsilon": "loss.epsilon_low and loss.epsilon_high",
    "loss.epsilon": "loss.epsilon_low and loss.epsilon_high",
    "beta": "loss.beta",
    "scale_rewards": "advantage (group_mean or group_zscore)",
    "loss_type": "loss",
    "sync_ref_model": "stages.grpo.module.reference_sync_every",
    "ref_model_sync_steps": "stages.grpo.module.reference_sync_every",
    "learning_rate": "stages.grpo.optimizer.lr",
    "lr": "stages.grpo.optimizer.lr",
    "max_steps": "stages.grpo.max_updates",
    "per_device_train_batch_size": "stages.grpo.batch_size (global)",
    "gradient_accumulation_steps": "stages.grpo.micro_batch_size",
    "max_grad_norm": "stages.grpo.gradient_clip",
    "lora_r": "stages.grpo.lora.rank",
    "lora_alpha": "stages.grpo.lora.alpha",
    "dataset": "task",
    "model_path": "model.path",
    "model_name_or_path": "model.path",
    "output_dir": "run_dir",
    "resume_from_checkpoint": "resume",
    "mu": "stages.grpo.module.num_inner_updates",
    "group_size": "stages.grpo.module.group_size",
    "num_inner_updates": "stages.grpo.module.num_inner_updates",
    "temperature": "sampler.temperature",
    "completion_length": "sampler.completion_length",
    "block_length": "sampler.block_length",
}


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
            raise ConfigError(word, "no such option", _nearest(word, known) or "--help", "E101")
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
        raise _syntax_error(error, overrides) from None


def _first_candidate(word: str) -> str:
    """A word of a search with the first of its values."""
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException as error:
        raise _syntax_error(error, [word]) from None
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
        config = compose(name, list(overrides), return_hydra_config=with_hydra)
    except HydraException as error:
        raise _translated(error, name, overrides) from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or "configuration"), _one_line(error), "another value", "E201") from None
    check_leaves(config, name, overrides)
    return config


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
    for key, node in _leaves(config):
        if key.startswith("hydra"):
            continue
        try:
            if OmegaConf.is_missing(config if "." not in key else OmegaConf.select(config, key.rpartition(".")[0]),
                                    key.rpartition(".")[2]):  # fmt: skip
                raise ConfigError(key, "has no value", f"{key}=VALUE", "E108")
            OmegaConf.select(config, key, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            raise ConfigError(key, f"refers to a value that is not there ({node})", _one_line(error), "E109") from None


@lru_cache(maxsize=32)
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig | None:
    """What the choices alone give, to compare single values with; None where they give nothing."""
    try:
        return compose(name, list(overrides))
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


# --------------------------------------------------------------------------------------------------------- plain words


def _translated(error: HydraException, name: str, overrides: Sequence[str]) -> ConfigError:
    """Hydra's several paragraphs as one line with the nearest known word."""
    text = str(error)
    if match := re.search(r"Could not find '(?:.*?/)?([\w@.]+)/([\w.-]+)'", text):
        group, choice = match.groups()
        options = _choices(group)
        nearest = _nearest(choice, options)
        return ConfigError(group, f"no choice {choice!r}", nearest or f"one of {', '.join(options)}", "E105")
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], name, overrides)
    if match := re.search(r"[Kk]ey '([^']+)' is not in struct(?:.*full_key: ([\w.]+))?", text, re.DOTALL):
        return _unknown_key(match[2] or match[1], name, overrides)
    if match := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        key, values = match.groups()
        return ConfigError(
            key, f"{values} are several values and no sweep was asked for", f"-m, or {key}=[{values}]", "E201"
        )
    return _syntax_error(error, overrides)


def _unknown_key(key: str, name: str, overrides: Sequence[str]) -> ConfigError:
    key = key.lstrip("+~")
    last = key.rpartition(".")[2]
    elsewhere = KNOWN_ELSEWHERE.get(key) or KNOWN_ELSEWHERE.get(last)
    choices = tuple(o for o in overrides if "." not in o.split("=", 1)[0] and o.split("=", 1)[0].strip("+~") != key)
    known = [k for k, _ in _leaves(_composed(name, choices) or compose(name, []))]
    known += [p.name for p in CONF.iterdir() if p.is_dir()]
    nearest = _nearest(key, known) or _nearest_last(last, known)
    if nearest is None and elsewhere is not None:
        return ConfigError(key, "is called otherwise here", elsewhere, "E104")
    if elsewhere is not None and difflib.SequenceMatcher(None, key, nearest or "").ratio() < 0.9:
        return ConfigError(key, "is called otherwise here", elsewhere, "E104")
    return ConfigError(key, "no such key", nearest or "--cfg job, which prints all keys", "E103")


def _syntax_error(error: Exception, overrides: Sequence[str]) -> ConfigError:
    guilty = next((o for o in overrides if not _parses(o)), None) or next((o for o in overrides if o in str(error)), "")
    cause = _one_line(error).split(" See https:")[0]
    return ConfigError(
        guilty.split("=")[0] or "command line", cause, "quotes around the value: 'KEY=\"VALUE\"'", "E106"
    )


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException:
        return False
    return True


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group.split("@")[0]).glob("*.yaml"))


def _nearest(word: str, known: Sequence[str]) -> str | None:
    cutoff = 0.6 if len(word) <= 3 else 0.7  # one wrong letter of three is a likeness of two thirds
    found = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return found[0] if found else None


def _nearest_last(last: str, known: Sequence[str]) -> str | None:
    """A key whose last word is, or nearly is, the one given."""
    by_last: dict[str, str] = {}
    for key in known:
        by_last.setdefault(key.rpartition(".")[2], key)
    found = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)
    return by_last[found[0]] if found else None


def as_config_error(error: ValueError, prefix: str = "") -> ConfigError:
    """The ValueError of a component, whose message is `key: cause. Try: cure [code]`, under its full key.

    One without a code refuses a value.
    """
    if isinstance(error, ConfigError):
        return error
    text, code = split_code(_one_line(error))
    head, cure = _split_cure(text)
    key, separator, cause = head.partition(": ")
    if not separator or " " in key:
        words = head.split(" ", 1)
        key, cause = (words[0], words[1]) if "." in words[0] and len(words) == 2 else (prefix or "configuration", head)
    return ConfigError(key, cause.rstrip("."), cure, code or REFUSED)


def _split_cure(text: str) -> tuple[str, str]:
    """Cause and cure; components say `Try: X`, `Try X`, or another sentence in the imperative at their end."""
    match = re.match(r"(.*?)[.;,]? (?:Try:? )(.*)", text) or re.match(
        r"(.*[^.])\. ((?:Set|Name|Give|Keep|Merge|Choose|Use|Write) .*)", text
    )
    return (match[1], match[2].rstrip(".")) if match else (text, "another value; the key's YAML in conf/ says more")


@lru_cache(maxsize=1)
def _first_words() -> frozenset[str]:
    """What the keys of a configuration begin with."""
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    keys = [str(key) for file in ("train.yaml", "evaluate.yaml") for key in OmegaConf.load(CONF / file)]
    return frozenset({"stages", *groups, *keys})


def is_about_configuration(error: ValueError) -> bool:
    """Whether a ValueError speaks of a key of ours, so that its one line is all a user needs."""
    first = re.match(r"([a-z_0-9]+)[.:]", str(error))
    return split_code(str(error))[1] is not None or (first is not None and first[1] in _first_words())


def under(error: ValueError, key: str) -> ConfigError:
    """A part's error under the full key: parts of a stage do not know where it stands."""
    wrong = as_config_error(error, key)
    if wrong.key.split(".")[0] in _first_words():
        return wrong
    return ConfigError(f"{key}.{wrong.key}", wrong.cause, wrong.cure, wrong.code)
