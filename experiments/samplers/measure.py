"""What each sampler reaches with the same networks, and for how many network passes.

python experiments/samplers/measure.py outputs/attention/recipe=d1,seed=2*    # evaluate, results.json, table and plot
python experiments/samplers/measure.py                                        # table and plot from results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "estimators"))

from ablations import CELLS, Measure, digits, write_page
from tables import scatter

from d1lit.app.cli import evaluate
from d1lit.app.composing import CONF
from d1lit.statistics import mean_over_seeds

HERE = Path(__file__).resolve().parent
BASELINE = "low_confidence"
LEFT_OUT = {
    "any_order": "for networks trained in that attention: experiments/attention",
    "block_diffusion": "for networks trained in that attention: experiments/attention",
    "order_head": "needs a trained head",
    "tree": "one rollout of it is one of low_confidence",
    "d1": "low_confidence in bfloat16, every position generated",
    "gumbel": "draws as low_confidence does, and greedy it is the same",
    "nucleus": "greedy it is low_confidence",
    "sampled_logprob": "greedy it is low_confidence",
}
"""Of conf/sampler, with the reason."""


def samplers() -> list[str]:
    """Those that are measured."""
    return sorted({file.stem for file in CONF.glob("sampler/*.yaml")} - LEFT_OUT.keys())


def measured(run: Path, sampler: str) -> dict[str, Any]:
    """Right cells of every row, and passes, of one network decoded by one sampler."""
    with TemporaryDirectory() as folder:
        words = [f"run={run}", f"sampler={sampler}", f"output={folder}", "evaluation.forced_prefixes=[]"]
        assert evaluate(words) == 0, sampler
        results = json.loads((Path(folder) / "results.json").read_text())
        (entry,) = results["evaluations"]
        cells = digits(results, Path(folder), Measure("greedy", entry["stage"], None), CELLS)
    return {"cells": cells, "passes": round(entry["passes"], 3), "truncated": entry["truncated_fraction"]}


def gather(runs: list[Path]) -> dict[str, Any]:
    """The record of all samplers on all runs, by seed of the run."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        seed = str(json.loads((run / "results.json").read_text())["seed"])
        for sampler in samplers():
            found.setdefault(sampler, {})[seed] = measured(run, sampler)
    environment = json.loads((runs[0] / "environment.json").read_text())
    kept = {key: environment[key] for key in ("packages", "python", "platform", "processor", "threads")}
    return {"values": CELLS.values, "environment": kept, "samplers": found}


def accuracies(results: dict[str, Any], sampler: str) -> list[float]:
    """Cell accuracy in per cent, by seed."""
    found = results["samplers"][sampler]
    return [CELLS.percent(found[seed]["cells"]) for seed in sorted(found)]


def passes(results: dict[str, Any], sampler: str) -> float:
    """Mean over the seeds."""
    return fmean(one["passes"] for one in results["samplers"][sampler].values())


def write_table(results: dict[str, Any]) -> str:
    """By rising number of passes; differences to the baseline of the same network with Student's interval."""
    lines = ["| sampler | passes | cell accuracy | minus low_confidence (95 %) | no end |", "|---|---|---|---|---|"]
    base = accuracies(results, BASELINE)
    for sampler in sorted(results["samplers"], key=lambda name: (passes(results, name), name)):
        own = accuracies(results, sampler)
        apart = mean_over_seeds([a - b for a, b in zip(own, base, strict=True)])
        text = f"{apart.value:+.1f} [{apart.low:+.1f}, {apart.high:+.1f}]"
        text = "" if sampler == BASELINE else f"**{text}**" if apart.low > 0 or apart.high < 0 else text
        cut = fmean(one["truncated"] for one in results["samplers"][sampler].values())
        lines.append(f"| {sampler} | {passes(results, sampler):.1f} | {fmean(own):.1f} | {text} | {100 * cut:.1f} |")
    return "\n".join(lines) + "\n"


def write_plot(results: dict[str, Any]) -> str:
    """Passes against cell accuracy as SVG, with the standard error over the networks."""
    points = []
    for sampler in sorted(results["samplers"]):
        own = accuracies(results, sampler)
        points.append((passes(results, sampler), fmean(own), stdev(own) / len(own) ** 0.5, sampler))
    titles = ("network passes a completion", "cell accuracy, per cent")
    return scatter(points, titles, margin=3.0, digits=0)


def main() -> None:
    """Results, where runs are given; then table and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs on Sudoku, one a seed")
    given = parser.parse_args()
    file = HERE / "results.json"
    if given.runs:
        file.write_text(json.dumps(gather(sorted(given.runs)), indent=1) + "\n")
    results = json.loads(file.read_text())
    (HERE / "plot.svg").write_text(write_plot(results))
    page = HERE / "README.md"
    page.write_text(write_page(page.read_text(), write_table(results)))
    print(write_table(results))


if __name__ == "__main__":
    main()
