"""Opening a finished run: its plan composed again, its policy and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from d1lit.build import plan_run
from d1lit.composing import compose_jobs
from d1lit.errors import ConfigError
from d1lit.handover import policy_of_run
from d1lit.models import Policy
from d1lit.plan import Plan
from d1lit.quiet import quiet_libraries
from d1lit.security import check_config
from d1lit.wording import as_config_error

OWN = ("d1lit.strategies",)
"""Of d1lit's own packages, those of which functions are named too; they only build a strategy."""
OF_ANOTHER_RUN = ("run_dir", "resume", "dry_run")


@dataclass(frozen=True)
class OpenRun:
    """A run that can be asked again."""

    folder: Path
    plan: Plan
    policy: Policy
    tokenizer: Any

    @property
    def stage(self) -> str:
        """Whose weights these are."""
        return self.plan.stages[-1].name if self.plan.stages else "base"


def open_run(folder: Path, words: Sequence[str] = (), trusted: Sequence[str] = ()) -> OpenRun:
    """The final policy of a run, under the configuration it was trained with.

    Args:
        folder: of the run.
        words: KEY=VALUE that now hold instead.
        trusted: packages, besides d1lit's own, whose components the run may name.

    Raises:
        ConfigError: if there is no finished run, or it asks for components that are not allowed.
    """
    if not (folder / "model").is_dir():
        raise ConfigError("run", f"{folder} holds no finished run", "a folder that train.py has made", "E504")
    plan = plan_of_run(folder, words, trusted)
    policy, tokenizer = policy_of_run(plan, folder)
    return OpenRun(folder, plan, policy.eval(), tokenizer)


def plan_of_run(folder: Path, words: Sequence[str] = (), trusted: Sequence[str] = ()) -> Plan:
    """The plan of a run, finished or not; see `open_run`.

    Raises:
        ConfigError: if there is no run, or it asks for components that are not allowed.
    """
    quiet_libraries()
    file = folder / "overrides.json"
    if not file.is_file():
        raise ConfigError("run", f"{folder} holds no run", "a folder that train.py has made", "E504")
    said = [word.split("=", 1)[0].lstrip("+~") for word in words]
    kept = [
        word
        for word in map(str, json.loads(file.read_text(encoding="utf-8")))
        if word.split("=", 1)[0].lstrip("+~") not in (*said, *OF_ANOTHER_RUN)
    ]
    (config,) = compose_jobs("evaluate", [*kept, *words]).configs
    try:
        check_config(OmegaConf.to_container(config, resolve=True), (*OWN, *trusted))  # type: ignore[arg-type]
    except ValueError as error:
        raise as_config_error(error, "run") from None
    return plan_run(config, trains=False)
