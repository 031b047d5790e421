"""What a finished run leaves to be looked at: recordings, TensorBoard's summary, the model card and report.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from d1lit.app.export import write_card
from d1lit.app.plan import Plan
from d1lit.app.playing import keep_recordings
from d1lit.models import Policy
from d1lit.report.console import say
from d1lit.report.hparams import write_hparams
from d1lit.report.page import run_page, write_page
from d1lit.report.runs import read_run


def present(plan: Plan, folder: Path, policy: Policy, tokenizer: Any) -> None:
    """Write all of it into the run's folder; a part that fails is named and takes nothing else with it.

    A run of hours must not end in an error because a picture could not be drawn.
    """
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("recordings.json", lambda: keep_recordings(plan, folder, policy, tokenizer)),
        ("logs/final", lambda: write_hparams(folder) if has_event_logger(plan) else None),
        ("model/README.md", lambda: write_card(folder)),
        ("report.html", lambda: write_report(folder)),
    ]
    for name, write in parts:
        try:
            write()
        except Exception as error:  # whatever it is, the run's results are already on the disk
            say(f"{name} was not written: {type(error).__name__}: {error}")
    if (folder / "report.html").is_file():
        say(f"report: {folder / 'report.html'}")


def has_event_logger(plan: Plan) -> bool:
    """Whether the run writes event files."""
    logger = plan.config.logger
    return logger is not None and str(logger.get("_target_")).endswith("TensorBoardLogger")


def write_report(folder: Path) -> Path:
    """report.html of one run, in its folder."""
    return write_page(folder / "report.html", run_page(read_run(folder)))
