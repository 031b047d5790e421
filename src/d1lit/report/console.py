"""What a run says on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 120  # a log file has no width of its own


def say(line: str) -> None:
    """One line of what the run is doing."""
    console.print(line, markup=False)


def show_table(results: Mapping[str, Any]) -> None:
    """The closing table: accuracy with its 95 % interval, the paper's grader beside it; of a mixture, each task's."""
    tasks = ["task"] if len({e["task"] for e in results["evaluations"]}) > 1 else []
    extra = sorted({name for e in results["evaluations"] for name in e["extra"]})
    table = Table(title=f"{results['recipe']} on {results['task']} ({results['model']}, seed {results['seed']})")
    judges_failed = any(e["failed_fraction"] for e in results["evaluations"])
    measured = [] if any(e["effective_tokens"] is None for e in results["evaluations"]) else ["tokens", "truncated"]
    counted = ["passes"] if all(e.get("passes") is not None for e in results["evaluations"]) else []
    counts = ("length", "n", "accuracy", "95 % interval", "d1 grader")
    for column in ("stage", *tasks, *counts, *extra, *measured, *counted, *(["failed"] if judges_failed else [])):
        table.add_column(column, justify="left" if column in ("stage", "task") else "right")
    for e in results["evaluations"]:
        low, high = e["interval"]
        more = [f"{100 * e['extra'][name]['mean']:.1f}" if name in e["extra"] else "" for name in extra]
        table.add_row(
            e["stage"],
            *([e["task"]] if tasks else []),
            str(e["completion_length"]),
            str(e["n"]),
            f"{100 * e['accuracy']:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * e['d1_correct'] / max(1.0, e['d1_out_of']):.1f}",
            *more,
            *([f"{e['effective_tokens']:.1f}", f"{100 * e['truncated_fraction']:.1f}"] if measured else []),
            *([f"{e['passes']:.1f}"] if counted else []),
            *([f"{100 * e['failed_fraction']:.1f}"] if judges_failed else []),
        )
    console.print(table)
