"""One measure of every recipe seed by seed, and its differences on the same rows: what a study's tables are made of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.report.comparing import final_entry, row_score
from d1lit.report.runs import Row, Run, variants
from d1lit.report.tables import Table, percent
from d1lit.statistics import Interval, paired_bootstrap


def seed_tables(runs: Sequence[Run], metric: str | None = None) -> list[Table]:
    """Every recipe's final value for every seed, in per cent, and the paired differences of every two recipes.

    Args:
        runs: of one task.
        metric: one of the rows' extra measures, such as cell_accuracy; None for the grader's verdicts.
    """
    groups = variants(runs)
    finals = {
        name: {run.results["seed"]: values_of(run, final_entry(run), metric) for run in own} for name, own in groups
    }
    base: dict[int, Tensor] = {}
    for run in runs:
        start = next((entry for entry in run.evaluations if entry["stage"] == "base"), None)
        if start is not None:
            base.setdefault(run.results["seed"], values_of(run, start, metric))
    columns = {**({"base": base} if base else {}), **finals}
    seeds = sorted({seed for of in columns.values() for seed in of})
    what = "accuracy" if metric is None else metric.replace("_", " ")
    rows = [(str(seed), *(_shown(of.get(seed)) for of in columns.values())) for seed in seeds]
    note = "Per cent, mean over the rows of the last evaluation at the length of training; base: before any stage."
    pairs = list(itertools.combinations(finals, 2))
    apart = [(str(seed), *(_difference(finals[a].get(seed), finals[b].get(seed)) for a, b in pairs)) for seed in seeds]
    titles = [f"{b} − {a}" for a, b in pairs]
    return [
        Table(f"{what} by seed", ("seed", *columns), tuple(rows), note),
        Table("Differences by seed", ("seed", *titles), tuple(apart), "Points; paired bootstrap intervals of 95 %."),
    ]


def values_of(run: Run, entry: Mapping[str, Any] | None, metric: str | None) -> Tensor:
    """The measure of every row of an evaluation, in row order."""
    rows = sorted(run.rows(entry) if entry is not None else [], key=lambda row: row["index"])
    grader = run.results.get("grader") or "strict"
    return torch.tensor([_value(row, grader, metric) for row in rows])


def _value(row: Row, grader: str, metric: str | None) -> float:
    return row_score(row, grader) if metric is None else float(row["extra"].get(metric, float("nan")))


def _shown(values: Tensor | None) -> str:
    return "" if values is None or not len(values) else percent(values.mean().item())


def _difference(first: Tensor | None, second: Tensor | None) -> str:
    if first is None or second is None or len(first) != len(second) or not len(first):
        return ""
    found: Interval = paired_bootstrap(first, second, CounterDraws(0))
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
