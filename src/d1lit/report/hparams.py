"""What TensorBoard needs to compare runs: settings with final metrics, and a layout of related curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar
from torch.utils.tensorboard.writer import FileWriter

from d1lit.report.comparing import final_entry
from d1lit.report.events import event_files
from d1lit.report.runs import FINAL_LOG, Run, read_run

LAST_STEP = 1
"""Final metrics stand at one point of their own; training curves live in the stages' folders."""


def write_hparams(folder: Path) -> Path:
    """logs/final: one point a metric, the HPARAMS entry of the run, and the layout of the CUSTOM SCALARS tab.

    Written by hand rather than by a logger's `log_hyperparams`, which adds a point of 0.0 at step 0 to every metric.
    """
    run = read_run(folder)
    place = folder / "logs" / FINAL_LOG
    for old in event_files(place):
        old.unlink()
    place.mkdir(parents=True, exist_ok=True)
    metrics = final_metrics(run)
    writer = FileWriter(str(place))
    for part in hparams(settings(run), metrics):
        writer.add_summary(part)
    for name, value in metrics.items():
        writer.add_summary(scalar(name, value), LAST_STEP)
    writer.add_summary(custom_scalars(layout(run)))
    writer.close()
    return place


def final_metrics(run: Run) -> dict[str, float]:
    """Accuracy after every stage, of a mixture each task's and their mean, closing reward, and cost."""
    found: dict[str, float] = {}
    for entry in run.evaluations:
        task = f"{entry['task']}/" if len(run.tasks) > 1 else ""
        length = f"@{entry['completion_length']}" if _lengths(run) > 1 else ""
        found[f"final/accuracy/{task}{entry['stage']}{length}"] = entry["accuracy"]
    last = [entry["accuracy"] for task in run.tasks if (entry := final_entry(run, task)) is not None]
    if last:
        found["final/accuracy"] = sum(last) / len(last)
    for scalars in run.curves.values():
        for name, tag in (("final/reward", "rollout/reward"), ("final/kl", "train/kl")):
            if tag in scalars:
                tail = scalars[tag][-max(1, len(scalars[tag]) // 10) :]
                found[name] = sum(value for _, value in tail) / len(tail)
    cost = run.results.get("cost", {})
    found |= {f"final/cost/{key}": float(cost[key]) for key in ("seconds", "forwards", "flops") if key in cost}
    return found


def _lengths(run: Run) -> int:
    return len({entry["completion_length"] for entry in run.evaluations})


def settings(run: Run) -> dict[str, Any]:
    """Plain settings of the run, with the recipe's own names first."""
    plain: dict[str, Any] = {key: run.results[key] for key in ("recipe", "task", "model", "seed")}
    for key, value in run.settings.items():
        if key.endswith(("_partial_", "_convert_")) or value is None:
            continue
        plain[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return plain


def layout(run: Run) -> Mapping[str, Mapping[str, Sequence[Any]]]:
    """Charts of several scalars, for the CUSTOM SCALARS tab."""
    tags = sorted({tag for scalars in run.curves.values() for tag in scalars})

    def under(*starts: str) -> list[str]:
        return [tag for tag in tags if tag.startswith(starts)]

    charts = {
        "learning": {
            "rewards": under("rollout/reward"),
            "KL and clip fraction": under("train/kl", "train/clip_fraction"),
        },
        "rollouts": {"length": under("rollout/length"), "nothing to learn from": under("rollout/zero_std_fraction")},
        "cost": {"seconds": under("time/"), "work": under("cost/")},
    }
    return {
        group: {title: ["Multiline", wanted] for title, wanted in found.items() if wanted}
        for group, found in charts.items()
        if any(found.values())
    }
