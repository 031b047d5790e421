"""Opening a finished run: its plan composed again, its policy and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.foreign import check_foreign, stored_words
from d1lit.app.plan import Plan
from d1lit.app.run_policy import policy_of_run
from d1lit.errors import ConfigError
from d1lit.models import Policy
from d1lit.quiet import quiet_libraries


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
        words: KEY=VALUE that override the run's.
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
    kept = stored_words(folder, words)
    (config,) = compose_jobs("evaluate", [*kept, *words]).configs
    check_foreign(config, words, trusted)
    return plan_run(config, trains=False)
