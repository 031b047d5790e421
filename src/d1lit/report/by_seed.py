"""One measure of every recipe seed by seed, and its differences on the same rows: what a study's tables are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.report.comparing import final_entry, mean_cost, probes, row_score
from d1lit.report.runs import Row, Run, variants
from d1lit.report.tables import Table, number, percent
from d1lit.statistics import Interval, paired_bootstrap

Place = tuple[Run, str]
"""A run and one of its stages."""
Column = Mapping[int, Place]
"""By seed."""
_POINTS = "Points; paired bootstrap intervals of 95 %."


def seed_tables(runs: Sequence[Run], metric: str | None = None) -> list[Table]:
    """Every recipe seed by seed, task by task: final values, differences, probes; then baselines and cost.

    Args:
        runs: finished ones.
        metric: one of the rows' extra measures, such as cell_accuracy; None for the grader's verdicts alone.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    tables = []
    for task in tasks:
        own = _task_tables([run for run in runs if task in run.tasks], task, metric)
        tables += [Table(f"{t.title} ({task})", t.columns, t.rows, t.note) if len(tasks) > 1 else t for t in own]
    return [*tables, _cost(runs)]


def _task_tables(runs: Sequence[Run], task: str, metric: str | None) -> list[Table]:
    recipes: dict[str, Column] = {
        name: {run.results["seed"]: (run, entry["stage"]) for run in own if (entry := final_entry(run, task))}
        for name, own in variants(runs)
    }
    base: dict[int, Place] = {}
    for run in runs:
        if any((entry["stage"], entry["task"]) == ("base", task) for entry in run.evaluations):
            base.setdefault(run.results["seed"], (run, "base"))
    columns = {**({"base": base} if base else {}), **recipes}
    note = "Per cent, mean over the rows of the last evaluation at the length of training; base: before any stage."
    measured = [metric, None] if metric is not None else [None]
    tables = [
        _by_seed(f"{_words(m)} by seed", columns, lambda at, m=m: _percent(values_of(at, task, m)), note)
        for m in measured
    ]
    stages = {name: (start, column) for name, column in recipes.items() if (start := _start(column, task)) is not None}
    own_start = {
        f"{name}: {next(iter(column.values()))[1]} − {start}": {
            seed: (at, (at[0], start)) for seed, at in column.items()
        }
        for name, (start, column) in stages.items()
    }
    pairs = {
        f"{b} − {a}": {seed: (recipes[b][seed], recipes[a][seed]) for seed in recipes[a].keys() & recipes[b].keys()}
        for a, b in itertools.combinations(recipes, 2)
    }
    for title, found in (("Last stage against its start by seed", own_start), ("Differences by seed", pairs)):
        tables.append(
            _by_seed(title, found, lambda two: _difference(*(values_of(at, task, metric) for at in two)), _POINTS)
        )
    for name in dict.fromkeys(p.name for run in runs for p in probes(run) if p.task == task):
        what = f"{_words(metric if name.startswith('forced') else None)}, {name}, by seed"
        tables.append(_by_seed(what, columns, lambda at, name=name: _probe(at, task, name, metric), "Per cent."))
    return [*tables, _baselines(runs[0], task, metric)]


def _words(metric: str | None) -> str:
    return "accuracy" if metric is None else metric.replace("_", " ")


def _by_seed(title: str, columns: Mapping[str, Mapping[int, Any]], shown: Callable[[Any], str], note: str) -> Table:
    """A row a seed; columns that show nothing are left out."""
    seeds = sorted({seed for column in columns.values() for seed in column})
    cells = {name: [shown(of[seed]) if seed in of else "" for seed in seeds] for name, of in columns.items()}
    kept = {name: of for name, of in cells.items() if any(of)}
    rows = tuple((str(seed), *(of[place] for of in kept.values())) for place, seed in enumerate(seeds))
    return Table(title, ("seed", *kept), rows if kept else (), note)


def _entry(at: Place, task: str) -> Mapping[str, Any] | None:
    """A stage's evaluation at the length of training, which comes first."""
    run, stage = at
    return next((e for e in run.evaluations if (e["stage"], e["task"]) == (stage, task)), None)


def _start(column: Column, task: str) -> str | None:
    """The stage that was evaluated before the last one."""
    for run, last in column.values():
        stages = list(dict.fromkeys(entry["stage"] for entry in run.evaluations if entry["task"] == task))
        if stages.index(last) > 0:
            return stages[stages.index(last) - 1]
    return None


def values_of(at: Place, task: str, metric: str | None) -> Tensor:
    """The measure of every row of a stage's evaluation, in row order."""
    run, entry = at[0], _entry(at, task)
    if entry is None:
        return torch.tensor([])
    rows = sorted(run.rows(entry), key=lambda row: row["index"])
    return torch.tensor([_value(row, run.grader(entry), metric) for row in rows])


def _value(row: Row, grader: str, metric: str | None) -> float:
    return row_score(row, grader) if metric is None else float(row["extra"].get(metric, math.nan))


def _percent(values: Tensor) -> str:
    return percent(values.mean().item()) if len(values) else ""


def _difference(last: Tensor, first: Tensor) -> str:
    if len(first) != len(last) or not len(first):
        return ""
    found: Interval = paired_bootstrap(first, last, CounterDraws(0))
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _probe(at: Place, task: str, name: str, metric: str | None) -> str:
    """A probe's estimate; of forced answers the measure that is asked for."""
    run, stage = at
    found = next((p for p in probes(run) if (p.stage, p.task, p.name) == (stage, task, name)), None)
    if found is None:
        return ""
    if metric is None or not name.startswith("forced"):
        return percent(found.estimate.value)
    return percent(found.entry["extra"].get(metric, {}).get("mean", math.nan))


def _baselines(run: Run, task: str, metric: str | None) -> Table:
    """What needs no model, on the rows of the first run; a mixture's are named `task/baseline`."""
    own = {name: e for name, e in run.baselines.items() if task.startswith(name.rpartition("/")[0])}
    measured = [] if metric is None else [_words(metric)]
    rows = [
        (
            name.rpartition("/")[2],
            *(percent(e["extra"].get(metric, {}).get("mean", math.nan)) for _ in measured),
            percent(e["accuracy"]),
        )
        for name, e in own.items()
    ]
    return Table("Without a model", ("baseline", *measured, "accuracy"), tuple(rows), "Per cent, on the same rows.")


def _cost(runs: Sequence[Run]) -> Table:
    rows = [(name, number(flops)) for name, own in variants(runs) if (flops := mean_cost(own, "flops")) is not None]
    return Table("Cost of the stages after the base", ("recipe", "FLOPs"), tuple(rows), "Mean over the runs.")
