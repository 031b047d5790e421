"""The learning rates of papers and papers_countdown, and whether the policy-gradient bench predicts their outcome.

python experiments/papers/analyse.py papers outputs/papers-tuning    # tuning.json from the runs that tried the rates
python experiments/papers/analyse.py papers                          # tables of rates and of cosines, and cosines.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "estimators"))

from ablations import STUDIES, Measure, digits, reached, write_page
from outcome import rank_correlation
from tables import scatter

EXPERIMENTS = Path(__file__).resolve().parents[1]
TASKS = {"papers": "Sudoku", "papers_countdown": "Countdown"}
BENCH = {
    "grpo": "d1 (one step, row)",
    "wd1": "wd1",
    "coupled_grpo": "coupled",
    "unigrpo": "unigrpo",
    "espo": "espo",
    "spg": "spg",
    "gdpo": "gdpo",
    "bgpo": "bgpo 4",
    "dmpo": "dmpo",
    "gdsd": "gdsd",
    "agrpo": "agrpo, 2 steps",
    "egspo": "egspo, 2 steps",
    "drift": "drift, 2 steps",
    "tracerl": "step merge, 2",
    "step_merge": "step merge, 2",
    "cj_grpo": "trajectory",
}
"""The nearest pair of the bench to each recipe, by its name there; the page lists where they differ.

Of the other recipes the bench has no likelihood, but of `stable_drl`, which is `spg` where each rollout is used once.
"""
MERGED = ("tracerl", "step_merge")
"""Segments of the trajectory: two and eight of ten steps here, two of four in the bench."""
CELL = "trained, low confidence, T 1.0"

Row = tuple[str, float, float, dict[int, float]]
"""A recipe, its pair's cosine and alignment in the bench, and the points it gained here by seed."""

Tuning = dict[str, dict[str, list[float]]]
"""What was reached on the validation rows in per cent, by recipe, rate and tuning seed."""


def tried(study: str, folder: Path) -> Tuning:
    """What the tuning runs reached."""
    scale = STUDIES[study].scale
    found: dict[str, dict[float, dict[int, float]]] = {}
    for file in sorted(folder.glob("*/results.json")):
        words = dict(word.split("=", 1) for word in file.parent.name.split(","))
        rows = digits(json.loads(file.read_text()), file.parent, Measure("sampled", "grpo", None), scale)
        by_seed = found.setdefault(words["recipe"], {}).setdefault(float(words["rate"]), {})
        by_seed[int(words["seed"])] = scale.percent(rows)
    return {
        recipe: {
            f"{rate:g}": [round(by_seed[seed], 3) for seed in sorted(by_seed)]
            for rate, by_seed in sorted(rates.items())
        }
        for recipe, rates in found.items()
    }


def chosen(tuning: Tuning) -> dict[str, float]:
    """The rate of each recipe: the best mean over the tuning seeds."""
    return {recipe: float(max(rates, key=lambda rate: fmean(rates[rate]))) for recipe, rates in tuning.items()}


def rates_table(tuning: Tuning) -> str:
    """What every rate reached, the chosen one bold."""
    every = sorted({rate for rates in tuning.values() for rate in rates}, key=float)
    best = chosen(tuning)
    lines = ["| recipe | " + " | ".join(every) + " |", "|---" * (len(every) + 1) + "|"]
    for recipe, rates in tuning.items():
        cells = []
        for rate in every:
            text = f"{fmean(rates[rate]):.1f}" if rate in rates else ""
            cells.append(f"**{text}**" if float(rate) == best[recipe] else text)
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gained(results: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Points that each recipe gained over its start, by seed."""
    (name,) = results["runs"][0]["measures"]
    ends, starts = reached(results, name), reached(results, name, "start")
    return {arm: {seed: ends[arm][seed] - starts[arm][seed] for seed in sorted(ends[arm])} for arm in ends}


def cosines(results: dict[str, Any], bench: dict[str, Any]) -> list[Row]:
    """The recipes that the bench knows; the largest mean gain first."""
    measured, gains = bench["gradients"][CELL]["pairs"], gained(results)
    rows = [
        (recipe, measured[pair]["cosine"], measured[pair]["alignment"], gains[recipe]) for recipe, pair in BENCH.items()
    ]
    return sorted(rows, key=lambda row: -fmean(row[3].values()))


def agreement(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Rank correlation between the mean gains of the same recipes on two tasks."""
    one, other = gained(first), gained(second)
    return rank_correlation(*([fmean(gains[arm].values()) for arm in one] for gains in (one, other)))


def correlation(rows: list[Row], place: int, left_out: int | None = None) -> dict[str, float]:
    """Of a predictor with the mean gain over the seeds, all but one where asked."""
    gains = [fmean(gain for seed, gain in row[3].items() if seed != left_out) for row in rows]
    return rank_correlation([row[place] for row in rows], gains)  # type: ignore[misc]


def cosines_table(rows: list[Row]) -> str:
    """The recipes whose pair the bench knows, and the rank correlations over all of them and without the merged."""
    lines = ["| recipe | nearest pair | cosine | alignment | points gained |", "|---|---|---|---|---|"]
    for recipe, cosine, alignment, gains in rows:
        lines.append(f"| {recipe} | {BENCH[recipe]} | {cosine:.2f} | {alignment:.2f} | {fmean(gains.values()):+.1f} |")
    head = ["predictor", "recipes", "Spearman", "95 %", "permutation p", "without one seed"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    apart = [row for row in rows if row[0] not in MERGED]
    for name, place in (("cosine", 1), ("alignment", 2)):
        for chosen, which in ((rows, "all"), (apart, "without " + " and ".join(MERGED))):
            c = correlation(chosen, place)
            others = [correlation(chosen, place, seed)["spearman"] for seed in rows[0][3]]
            shown = f"{c['spearman']:.2f} | {c['low']:.2f} to {c['high']:.2f} | {c['p']:.3f}"
            span = f"{min(others):.2f} to {max(others):.2f}"
            lines.append(f"| {name} | {which}, {c['pairs']:.0f} | {shown} | {span} |")
    return "\n".join(lines) + "\n"


def agreement_line(first: dict[str, Any], second: dict[str, Any]) -> str:
    """The same as a sentence."""
    c = agreement(first, second)
    return (
        f"Rank correlation of what the {c['pairs']:.0f} recipes gain on Sudoku with what they gain on Countdown: "
        f"{c['spearman']:.2f} ({c['low']:.2f} to {c['high']:.2f}, permutation p {c['p']:.3f}).\n"
    )


def plot(rows: list[Row], unit: str) -> str:
    """Cosine against points gained as SVG, a point a recipe with its standard error over the seeds."""
    points = [
        (cosine, fmean(gains.values()), stdev(gains.values()) / len(gains) ** 0.5, recipe)
        for recipe, cosine, _, gains in rows
    ]
    titles = ("cosine of the expected update with the exact gradient, in the bench", f"points of {unit} gained")
    return scatter(points, titles, margin=2.0, digits=1)


def results_of(name: str) -> dict[str, Any]:
    """The committed results of an experiment."""
    return json.loads((EXPERIMENTS / name / "results.json").read_text())


def main() -> None:
    """The tuning runs, where given, into tuning.json; then tables and plot into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=sorted(TASKS))
    parser.add_argument("tuning", nargs="?", type=Path, help="the folder of the runs that tried the rates")
    given = parser.parse_args()
    folder = EXPERIMENTS / given.study
    if given.tuning is not None:
        (folder / "tuning.json").write_text(json.dumps(tried(given.study, given.tuning), indent=1) + "\n")
    tuning = json.loads((folder / "tuning.json").read_text())
    print("rates:", json.dumps(chosen(tuning)))
    page = write_page((folder / "README.md").read_text(), rates_table(tuning), "rates")
    rows = cosines(results_of(given.study), results_of("estimators"))
    (folder / "cosines.svg").write_text(plot(rows, STUDIES[given.study].scale.name))
    page = write_page(page, cosines_table(rows), "cosines")
    page = write_page(page, agreement_line(results_of("papers"), results_of("papers_countdown")), "agreement")
    (folder / "README.md").write_text(page)


if __name__ == "__main__":
    main()
