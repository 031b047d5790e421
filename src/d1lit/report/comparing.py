"""Runs against each other: means over seeds, and differences on the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from d1lit.draws import CounterDraws
from d1lit.report.runs import Row, Run, variants
from d1lit.statistics import Interval, mcnemar_exact, mean_over_seeds, paired_bootstrap, wilson_interval

LAST_SHARE = 0.1
"""Share of a stage's updates, at its end, over which a curve's closing value is the mean."""
CURVES = ("rollout/reward", "train/kl", "rollout/length", "rollout/zero_std_fraction")


@dataclass(frozen=True)
class Cell:
    """One line of the comparison: a recipe's runs at one stage."""

    recipe: str
    task: str
    model: str
    stage: str
    split: str
    length: int | None
    seeds: tuple[int, ...]
    accuracy: Interval
    over: str
    """What the interval speaks of: seeds, or rows where there is one seed."""
    accuracies: tuple[float, ...]
    """One a seed."""
    rows: int
    tokens: float
    truncated: float
    extra: Mapping[str, float]
    """Means of what the task measures beside accuracy (cell accuracy, ...), as shares."""
    probes: Mapping[str, float]
    """Means of what was asked otherwise (pass@k, forced prefixes), as shares; they stand with the first length."""
    curves: Mapping[str, float]
    """Closing values of this stage's training curves, averaged over the runs."""
    seconds: float | None
    """Of the whole run, averaged over the runs."""
    flops: float | None
    """Of all stages, averaged over the runs."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What two cells must share to be compared."""
        return self.task, self.model, self.split, self.length


@dataclass(frozen=True)
class Pair:
    """Two recipes on the same rows; positive differences speak for the second."""

    task: str
    first: str
    second: str
    difference: Interval
    """Mean difference of row scores; rows resampled together."""
    rows: int
    seeds: int
    wins: int
    losses: int
    p_value: float
    """Two-sided exact test on rows that one side got right more often (McNemar's where each side has one run)."""
    p_holm: float
    """The same, corrected for the number of pairs shown (Holm)."""
    over_seeds: Interval | None
    """Mean difference between runs of equal seed, with Student's t interval; None for fewer than two."""


def compare(runs: Sequence[Run]) -> list[Cell]:
    """One cell for each recipe, task, stage and length."""
    cells = []
    for name, group in variants(runs):
        found: dict[tuple[Any, ...], list[tuple[Run, Mapping[str, Any]]]] = {}
        for run in group:
            for entry in run.evaluations:
                key = (entry["stage"], entry["task"], entry.get("split"), entry["completion_length"])
                found.setdefault(key, []).append((run, entry))
        asked: set[tuple[str, str]] = set()
        for key, entries in found.items():
            cells.append(_cell(name, key, entries, with_probes=key[:2] not in asked))
            asked.add(key[:2])
    return cells


def _cell(name: str, key: tuple[Any, ...], entries: Sequence[tuple[Run, Mapping[str, Any]]], with_probes: bool) -> Cell:
    stage, task, split, length = key
    by_seed: dict[int, list[float]] = {}
    for run, entry in entries:
        by_seed.setdefault(run.results["seed"], []).append(entry["accuracy"])
    accuracies = [math.fsum(values) / len(values) for values in by_seed.values()]
    first = entries[0][1]
    if len(accuracies) > 1:
        over_seeds = mean_over_seeds(accuracies)
        # Student's t knows nothing of shares, which end at 0 and 1.
        interval = Interval(over_seeds.value, max(0.0, over_seeds.low), min(1.0, over_seeds.high))
        over = f"{len(accuracies)} seeds"
    else:
        correct, total = (sum(entry[k] for _, entry in entries) for k in ("correct", "n"))
        trials = sum(entry.get("effective_n", entry["n"]) for _, entry in entries)
        interval, over = wilson_interval(correct / total * trials, trials), f"{first['n']} rows"
    own = list({run.folder: run for run, _ in entries}.values())
    return Cell(
        recipe=name,
        task=task,
        model=own[0].results["model"],
        stage=stage,
        split=split,
        length=length,
        seeds=tuple(sorted(by_seed)),
        accuracy=interval,
        over=over,
        accuracies=tuple(accuracies),
        rows=first["n"],
        tokens=_mean([entry["effective_tokens"] for _, entry in entries]),
        truncated=_mean([entry["truncated_fraction"] for _, entry in entries]),
        extra={
            name: _mean([entry["extra"][name]["mean"] for _, entry in entries])
            for name in sorted(first.get("extra", {}))
            if all(name in entry["extra"] for _, entry in entries)
        },
        probes=_mean_probes(own, stage, task) if with_probes else {},
        curves=_closing(own, stage),
        seconds=mean_cost(own, "seconds"),
        flops=mean_cost(own, "flops"),
    )


@dataclass(frozen=True)
class Probe:
    """What a model reaches when it is asked otherwise: several samples a row, or words put in its mouth."""

    stage: str
    task: str
    name: str
    """pass@k, or forced and the words."""
    estimate: Interval
    entry: Mapping[str, Any]
    """The probe as results.json has it."""


def probes(run: Run) -> list[Probe]:
    """Every estimate of a run's probes, in the order of the stages."""
    found = []
    for entry in run.results.get("probes") or []:
        if entry["probe"] == "pass_at_k":
            estimates = {f"pass@{k}": Interval(e["mean"], *e["interval"]) for k, e in entry["pass_at_k"].items()}
        else:
            estimates = {f"forced {entry['prefix']}": Interval(entry["accuracy"], *entry["interval"])}
        found += [Probe(entry["stage"], entry["task"], name, e, entry) for name, e in estimates.items()]
    return found


def _mean_probes(runs: Sequence[Run], stage: str, task: str) -> dict[str, float]:
    """Means over the runs of those probes that every one of them has."""
    each = [{p.name: p.estimate.value for p in probes(run) if (p.stage, p.task) == (stage, task)} for run in runs]
    return {name: _mean([of[name] for of in each]) for name in each[0] if all(name in of for of in each)}


def mean_cost(runs: Sequence[Run], key: str) -> float | None:
    """Of what every run's results say it cost; None where one does not say."""
    costs = [run.results.get("cost", {}).get(key) for run in runs]
    known = [float(cost) for cost in costs if cost is not None]
    return _mean(known) if len(known) == len(costs) else None


def _mean(values: Sequence[float | None]) -> float:
    """NaN where one was not measured."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else math.nan


def _closing(runs: Sequence[Run], stage: str) -> dict[str, float]:
    """Means of the last updates of a stage's curves, where every run has them."""
    found = {}
    for tag in CURVES:
        curves = [run.curves.get(stage, {}).get(tag, []) for run in runs]
        if all(curves):
            tails = [curve[-max(1, round(LAST_SHARE * len(curve))) :] for curve in curves]
            found[tag] = _mean([_mean([value for _, value in tail]) for tail in tails])
    return found


# ---------------------------------------------------------------------------------------------------------------- pairs


def row_score(row: Row, grader: str) -> float:
    """What a row counts: 1 or 0 by the strict grader, the share of its points by the paper's."""
    if grader == "d1":
        return row["d1"]["value"] / max(1.0, row["d1"]["out_of"])
    return float(row["strict"]["value"] >= 1.0)


def scores_by_row(run: Run, entry: Mapping[str, Any]) -> dict[str, float]:
    """Score of every row by its id and place."""
    return {f"{row['index']}:{row['id']}": row_score(row, run.grader(entry)) for row in run.rows(entry)}


def final_entry(run: Run, task: str | None = None) -> Mapping[str, Any] | None:
    """The last evaluation of a run (on a task) at the length of training, which comes first."""
    found = [entry for entry in run.evaluations if task in (None, entry["task"])]
    if not found:
        return None
    return next(entry for entry in found if entry["stage"] == found[-1]["stage"])


def compare_pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every two recipes on the rows that both answered, by their final models."""
    groups = variants(runs)
    pairs = []
    for (first, first_runs), (second, second_runs) in combinations(groups, 2):
        for task in shared_tasks(first_runs, second_runs):
            pair = _pair(task, (first, first_runs), (second, second_runs))
            pairs += [] if pair is None else [pair]
    return _holm(pairs)


def shared_tasks(first: Sequence[Run], second: Sequence[Run]) -> list[str]:
    """Tasks that runs of both sides were evaluated on, those of mixtures among them."""
    return sorted({task for run in first for task in run.tasks} & {task for run in second for task in run.tasks})


def _pair(task: str, first: tuple[str, Sequence[Run]], second: tuple[str, Sequence[Run]]) -> Pair | None:
    sides = [_scores_by_seed(runs, task) for _, runs in (first, second)]
    seeds = sorted(set(sides[0]) & set(sides[1]))
    # Runs of equal seed are compared with each other; where no seed is shared, all with all.
    chosen = [[side[s] for s in (seeds or side)] for side in sides]
    if not chosen[0] or not chosen[1]:
        return None
    rows = sorted(set.intersection(*(set(scores) for side in chosen for scores in side)))
    if not rows:
        return None
    left, right = (torch.tensor([_mean([scores[r] for scores in side]) for r in rows]) for side in chosen)
    wins, losses = int((right > left).sum()), int((right < left).sum())
    by_seed = [_mean([b[r] - a[r] for r in rows]) for a, b in zip(*chosen, strict=False)] if seeds else []
    return Pair(
        task=task,
        first=first[0],
        second=second[0],
        difference=paired_bootstrap(left, right, CounterDraws(0)),
        rows=len(rows),
        seeds=max(1, len(seeds)),
        wins=wins,
        losses=losses,
        p_value=mcnemar_exact(losses, wins),
        p_holm=1.0,
        over_seeds=mean_over_seeds(by_seed) if len(by_seed) > 1 else None,
    )


def _scores_by_seed(runs: Sequence[Run], task: str) -> dict[int, dict[str, float]]:
    found = {}
    for run in runs:
        entry = final_entry(run, task)
        scores = scores_by_row(run, entry) if entry is not None else {}
        if scores:
            found[run.results["seed"]] = scores
    return found


def _holm(pairs: Sequence[Pair]) -> list[Pair]:
    """p-values corrected for their number: the smallest times n, the next times n - 1, never falling (Holm, 1979)."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].p_value)
    corrected, floor = list(pairs), 0.0
    for place, i in enumerate(order):
        floor = max(floor, min(1.0, (len(pairs) - place) * pairs[i].p_value))
        corrected[i] = Pair(**{**pairs[i].__dict__, "p_holm": floor})
    return corrected
