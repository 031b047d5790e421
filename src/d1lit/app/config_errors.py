"""What a library or a part says of a wrong value, as one line of ours: key, cause and cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from d1lit.errors import REFUSED, ConfigError, split_code

CONF = Path(__file__).resolve().parents[3] / "conf"

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


def translated(
    error: HydraException, overrides: Sequence[str], keys_without: Callable[[str], list[str]]
) -> ConfigError:
    """Hydra's several paragraphs as one line with the nearest known word.

    Args:
        error: of composing.
        overrides: words of the command line.
        keys_without: all keys of the configuration that is composed without a given one.
    """
    text = str(error)
    if match := re.search(r"Could not find '(?:.*?/)?([\w@.]+)/([\w.-]+)'", text):
        group, choice = match.groups()
        options = _choices(group)
        near = nearest(choice, options)
        return ConfigError(group, f"no choice {choice!r}", near or f"one of {', '.join(options)}", "E105")
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], keys_without)
    if match := re.search(r"[Kk]ey '([^']+)' is not in struct(?:.*full_key: ([\w.]+))?", text, re.DOTALL):
        return _unknown_key(match[2] or match[1], keys_without)
    if match := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        key, values = match.groups()
        return ConfigError(
            key, f"{values} are several values and no sweep was asked for", f"-m, or {key}=[{values}]", "E201"
        )
    return syntax_error(error, overrides)


def _unknown_key(key: str, keys_without: Callable[[str], list[str]]) -> ConfigError:
    key = key.lstrip("+~")
    last = key.rpartition(".")[2]
    elsewhere = KNOWN_ELSEWHERE.get(key) or KNOWN_ELSEWHERE.get(last)
    known = [*keys_without(key), *(p.name for p in CONF.iterdir() if p.is_dir())]
    near = nearest(key, known) or _nearest_last(last, known)
    if near is None and elsewhere is not None:
        return ConfigError(key, "is called otherwise here", elsewhere, "E104")
    if elsewhere is not None and difflib.SequenceMatcher(None, key, near or "").ratio() < 0.9:
        return ConfigError(key, "is called otherwise here", elsewhere, "E104")
    return ConfigError(key, "no such key", near or "--cfg job, which prints all keys", "E103")


def syntax_error(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """The word of the command line that does not parse, with the parser's complaint."""
    guilty = next((o for o in overrides if not _parses(o)), None) or next((o for o in overrides if o in str(error)), "")
    cause = one_line(error).split(" See https:")[0]
    return ConfigError(
        guilty.split("=")[0] or "command line", cause, "quotes around the value: 'KEY=\"VALUE\"'", "E106"
    )


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException:
        return False
    return True


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group.split("@")[0]).glob("*.yaml"))


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word most like one that is not known."""
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
    text, code = split_code(one_line(error))
    head, _, cure = text.partition(" Try: ")
    key, separator, cause = head.partition(": ")
    if not separator or " " in key:  # another library's
        key, cause = prefix or "configuration", head
    cure = cure.rstrip(".") or "another value; the key's YAML in conf/ says more"
    return ConfigError(key, cause.rstrip(".;,"), cure, code or REFUSED)


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
