"""The tables of this study, from its run folders or from what was kept of them.

python experiments/recipes/analyse.py outputs/recipes --keep experiments/recipes/results.json
python experiments/recipes/analyse.py experiments/recipes/results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from d1lit.draws import CounterDraws
from d1lit.statistics import Interval, paired_bootstrap

Results = dict[str, dict[str, dict[str, Any]]]
"""What was found, by recipe and seed."""
METRIC = "cell_accuracy"


def collect(folder: Path) -> Results:
    """Of every run in the folder: share of right cells of each test row after each stage, probes, baselines, cost."""
    found: Results = {}
    for file in sorted(folder.glob("*/results.json")):
        results = json.loads(file.read_text())
        stages = {}
        for entry in results["evaluations"]:
            rows = [json.loads(line) for line in (file.parent / entry["rows_file"]).read_text().splitlines()]
            shares = [round(row["extra"][METRIC], 6) for row in sorted(rows, key=lambda row: row["index"])]
            stages[entry["stage"]] = {"accuracy": entry["accuracy"], METRIC: shares}
        probes = [
            {key: p[key] for key in ("stage", "probe", "pass_at_k", "extra") if key in p} for p in results["probes"]
        ]
        found.setdefault(results["recipe"], {})[str(results["seed"])] = {
            "stages": stages,
            "probes": probes,
            "baselines": {name: b["extra"][METRIC]["mean"] for name, b in results["baselines"].items()},
            "flops": results["cost"]["flops"],
        }
    return found


def cells(run: dict[str, Any], stage: str) -> torch.Tensor:
    """Share of right cells of every test row after a stage, in row order."""
    return torch.tensor(run["stages"][stage][METRIC])


def probe(run: dict[str, Any], stage: str, kind: str) -> dict[str, Any]:
    """One of the run's probes."""
    return next(p for p in run["probes"] if p["probe"] == kind and p["stage"] == stage)


def difference(first: torch.Tensor, second: torch.Tensor) -> Interval:
    """Mean of first - second over the same rows, with a paired bootstrap interval."""
    return paired_bootstrap(second, first, CounterDraws(0))


def shown(interval: Interval) -> str:
    """In per cent, with the interval; bold where zero lies outside it."""
    text = f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


ARMS = (("base", "sft", "base"), ("sft", "sft", "sft"), ("sft_more", "sft_more", "sft_more"), ("grpo", "grpo", "grpo"),
        ("grpo_shuffled", "grpo_shuffled", "grpo"), ("d1", "d1", "grpo"))  # fmt: skip
"""Column, recipe, stage."""
SAMPLED = (("base", "sft", "base"), ("sft", "sft", "sft"), ("grpo", "grpo", "grpo"), ("d1", "d1", "grpo"))
"""Of these pass@k is shown: base before grpo, sft before d1's own GRPO stage."""


def show(runs: Results) -> None:
    """Print the tables as Markdown."""
    seeds = sorted(runs["d1"])
    print("Cell accuracy, per cent of the empty cells, greedy\n")
    print("| seed | " + " | ".join(name for name, _, _ in ARMS) + " | forced-x: base | forced-x: sft | forced-x: d1 |")
    print("|---" * (len(ARMS) + 4) + "|")
    for seed in seeds:
        values = [100 * cells(runs[recipe][seed], stage).mean().item() for _, recipe, stage in ARMS]
        forced = [
            probe(runs["sft"][seed], "base", "forced"),
            probe(runs["sft"][seed], "sft", "forced"),
            probe(runs["d1"][seed], "grpo", "forced"),
        ]
        values += [100 * entry["extra"][METRIC]["mean"] for entry in forced]
        print(f"| {seed} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    print("\nDifferences on the same rows, points of cell accuracy with paired 95 % intervals\n")
    print("| seed | d1: GRPO stage - its start | grpo: GRPO stage - its start | d1 - grpo_shuffled | d1 - sft_more |")
    print("|---|---|---|---|---|")
    for seed in seeds:
        trained = cells(runs["d1"][seed], "grpo")
        pairs = [
            (trained, cells(runs["d1"][seed], "sft")),
            (cells(runs["grpo"][seed], "grpo"), cells(runs["grpo"][seed], "base")),
            (trained, cells(runs["grpo_shuffled"][seed], "grpo")),
            (trained, cells(runs["sft_more"][seed], "sft_more")),
        ]
        print(f"| {seed} | " + " | ".join(shown(difference(*pair)) for pair in pairs) + " |")
    print("\nWhole puzzles solved (greedy), and pass@k of 16 samples at temperature 1, per cent\n")
    names = [name for name, _, _ in SAMPLED]
    passed = [f"pass@{k} {name}" for name in names for k in ("1", "16")]
    print("| seed | " + " | ".join([*names, *passed]) + " |")
    print("|---" * (3 * len(SAMPLED) + 1) + "|")
    for seed in seeds:
        chosen = [(runs[recipe][seed], stage) for _, recipe, stage in SAMPLED]
        solved = [100 * run["stages"][stage]["accuracy"] for run, stage in chosen]
        for run, stage in chosen:
            estimates = probe(run, stage, "pass_at_k")["pass_at_k"]
            solved += [100 * estimates[k]["mean"] for k in ("1", "16")]
        print(f"| {seed} | " + " | ".join(f"{value:.2f}" for value in solved) + " |")
    print("\nWithout a model, on the same rows: ", end="")
    baselines = runs["d1"][seeds[0]]["baselines"].items()
    print("; ".join(f"{name} {100 * share:.1f} % of cells" for name, share in baselines))
    print(f"\nCost of the stages after the base (seed {seeds[0]}): ", end="")
    print("; ".join(f"{name} {runs[name][seeds[0]]['flops']:.2e} FLOPs" for name in runs))


def main(arguments: list[str] | None = None) -> None:
    """Read, keep if asked to, show."""
    parser = argparse.ArgumentParser("analyse", description=__doc__.split("\n")[0])
    parser.add_argument(
        "place", type=Path, nargs="?", default=Path("outputs/recipes"), help="run folders, or a kept file"
    )
    parser.add_argument("--keep", type=Path, default=None, metavar="FILE", help="where to keep what the tables need")
    known = parser.parse_args(arguments)
    runs = collect(known.place) if known.place.is_dir() else json.loads(known.place.read_text())
    if known.keep is not None:
        known.keep.write_text(json.dumps(runs, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    show(runs)


if __name__ == "__main__":
    main()
