"""What another run's folder says: words of a command line and a configuration that are data, not the user's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from d1lit.app.config_errors import as_config_error
from d1lit.errors import ConfigError
from d1lit.security import BLANKED, check_config, check_resolvers

_OF_ANOTHER_RUN = ("run_dir", "resume", "dry_run")
_ONE_JOB = "hydra.mode=RUN"
"""What a job of a sweep is told, so that it is not the whole sweep again."""


def stored_words(folder: Path, words: Sequence[str]) -> list[str]:
    """The KEY=VALUE that a run was started with, as far as `words` do not say otherwise.

    Options and what is Hydra's own are left out: they could name a folder whose YAMLs nobody has looked at. So are
    secrets, which were not kept.

    Raises:
        ConfigError: if there is no run, or its words ask for a resolver.
    """
    file = folder / "overrides.json"
    if not file.is_file():
        raise ConfigError("run", f"{folder} is not a run's folder", "a folder that train.py has made", "E504")
    try:
        stored = [str(word) for word in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ConfigError("run", f"{file} is not what train.py wrote ({error})", "another run", "E504") from None
    said = {_key(word) for word in words} | set(_OF_ANOTHER_RUN)
    kept = [word for word in stored if _key(word) not in said and not word.startswith("-")]
    kept = [word for word in kept if not word.endswith(f"={BLANKED}")]
    kept = [word for word in kept if not _key(word).startswith(("hydra.", "hydra/")) or word == _ONE_JOB]
    try:
        for word in kept:
            check_resolvers({_key(word): word})
    except ValueError as error:
        raise as_config_error(error, "run") from None
    return kept


def check_foreign(config: DictConfig, words: Sequence[str], trusted: Sequence[str]) -> None:
    """Refuse a configuration with stored words that reads, or calls, what it should not.

    Args:
        config: composed, not resolved: a resolver is gone once it has been asked.
        words: that the user has typed, whose resolvers are their own.
        trusted: packages, besides d1lit's own, whose components may be named.

    Raises:
        ConfigError: naming the key.
    """
    try:
        check_resolvers(OmegaConf.to_container(config, resolve=False), words)
        check_config(OmegaConf.to_container(config, resolve=True), trusted)  # type: ignore[arg-type]
    except ValueError as error:
        raise as_config_error(error, "run") from None


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+~")
