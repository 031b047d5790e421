"""One model for two tasks against one for each: the tables of this study, from its run folders or from what was kept.

python experiments/unified/analyse.py outputs/unified outputs/apart    # results.json and the page's table
python experiments/unified/analyse.py                                  # the page's table from results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ablations import write_page

from d1lit.draws import CounterDraws
from d1lit.statistics import paired_bootstrap

HERE = Path(__file__).resolve().parent
STAGES = ("base", "sft", "grpo")
MEASURES = {"countdown": "solved", "sudoku": "right cells"}

Runs = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
"""Of each test row what it got, between 0 and 1: by kind of run (together, apart), task, seed and stage."""


def collect(folders: list[Path]) -> Runs:
    """What the runs found. Countdown: 1 for a solved row; Sudoku: the share of its empty cells that are right."""
    found: Runs = {}
    for file in sorted(file for folder in folders for file in folder.glob("*/results.json")):
        results = json.loads(file.read_text())
        kind = "together" if results["task"] == "unified" else "apart"
        for entry in results["evaluations"]:
            rows = [json.loads(line) for line in (file.parent / entry["rows_file"]).read_text().splitlines()]
            rows.sort(key=lambda row: row["index"])
            by_seed = found.setdefault(kind, {}).setdefault(entry["task"], {}).setdefault(str(results["seed"]), {})
            by_seed[entry["stage"]] = [round(_got(entry["task"], row), 3) for row in rows]
    return found


def _got(task: str, row: dict[str, Any]) -> float:
    return row["extra"]["cell_accuracy"] if task == "sudoku" else float(row["strict"]["value"] >= 1)


def table(runs: Runs) -> str:
    """A row a task and seed; differences on the same test rows with paired bootstrap intervals, bold where 0 is out."""
    head = ["task", "seed", *(f"together: {s}" for s in STAGES), *(f"apart: {s}" for s in STAGES)]
    head += ["together: grpo - sft (95 %)", "grpo: together - apart (95 %)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, what in MEASURES.items():
        for seed in sorted(runs["together"][task]):
            both, alone = runs["together"][task][seed], runs["apart"][task][seed]
            values = [100 * fmean(run[stage]) for run in (both, alone) for stage in STAGES]
            pairs = ((both["sft"], both["grpo"]), (alone["grpo"], both["grpo"]))
            cells = [f"{task}, {what}", seed, *(f"{value:.1f}" for value in values), *(_shown(*p) for p in pairs)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(before: list[float], after: list[float]) -> str:
    found = paired_bootstrap(torch.tensor(before), torch.tensor(after), CounterDraws(0))
    text = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def main() -> None:
    """Results, where runs are given; then the page's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="the sweeps' folders")
    given = parser.parse_args()
    if given.runs:
        (HERE / "results.json").write_text(json.dumps(collect(given.runs), separators=(",", ":")) + "\n")
    written = table(json.loads((HERE / "results.json").read_text()))
    readme = HERE / "README.md"
    readme.write_text(write_page(readme.read_text(), written))
    print(written)


if __name__ == "__main__":
    main()
