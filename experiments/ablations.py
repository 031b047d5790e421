"""Tables and plots of the studies that share a shape: experiments/masking, inner_updates, losses, papers and others.

python experiments/ablations.py masking                    # README table and plot.svg from the committed results.json
python experiments/ablations.py masking outputs/masking    # ... after making results.json from the runs of the sweep
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from d1lit.rewards.extract import final_answer
from d1lit.statistics import Interval, mean_over_seeds

HERE = Path(__file__).resolve().parent
EMPTIES = 8
"""Empty cells of every test puzzle."""


@dataclass(frozen=True)
class Scale:
    """What a row of the test is worth, kept as a digit."""

    name: str
    digit: Callable[[dict[str, Any]], int]
    values: tuple[float, ...]
    """Of each digit, as a share of 1."""

    def percent(self, digits: str) -> float:
        """Mean value of the rows."""
        return 100 * sum(self.values[int(digit)] for digit in digits) / len(digits)


def right_cells(row: dict[str, Any]) -> int:
    """How many of the empty cells are right."""
    return round(EMPTIES * row["extra"]["cell_accuracy"])


def countdown_outcome(row: dict[str, Any]) -> int:
    """No answer, a wrong one, a right one."""
    return 2 if row["strict"]["value"] == 1.0 else int(final_answer(row["completion"]) is not None)


CELLS = Scale("cell accuracy", right_cells, tuple(n / EMPTIES for n in range(EMPTIES + 1)))
COUNTDOWN_REWARD = Scale("reward", countdown_outcome, (0.0, 0.1, 1.0))  # conf/reward/countdown.yaml


@dataclass(frozen=True)
class Measure:
    """What is read off a run: the digit of every test row."""

    name: str
    stage: str
    probe: str | None
    """None for the evaluation itself."""


@dataclass(frozen=True)
class Study:
    """What a sweep varies, and what its arms are compared with."""

    key: str
    baseline: str
    arms: dict[str, str]
    """What each arm is, in words."""
    measures: tuple[Measure, ...]
    stage: str
    """Whose cost is stated."""
    samples_otherwise: frozenset[str] = frozenset()
    """Arms with a sampler of their own: the same weights start elsewhere."""
    scale: Scale = CELLS


GRPO = (Measure("greedy", "grpo", None),)
PAPERS = {
    "grpo": "d1's diffu-GRPO: one-step likelihood, mean advantage",
    "wd1": "the same likelihood, weighted instead of clipped",
    "dapo": "the same likelihood, z-scored, groups without spread replaced",
    "sft_rl": "the same, the better rollouts' likelihood beside it",
    "coupled_grpo": "a mask and its complement, leave-one-out",
    "unigrpo": "one mask of the answer, z-scored",
    "espo": "bound over complementary masks, one ratio a sequence",
    "spg": "lower bound for the good, upper mixed in for the bad",
    "stable_drl": "SPG's bound, self-normalised weights",
    "gdpo": "bound by three quadrature nodes",
    "bgpo": "four masks, a bound of the ratio for each",
    "dmpo": "weighted denoising towards exp(reward)",
    "gdsd": "the change of a score regressed on the advantage",
    "ebpo": "bound over all blocks in one view",
    "tracerl": "trajectory, 8 steps merged, z-scored",
    "agrpo": "4 steps of the trajectory drawn at random",
    "egspo": "the steps of highest entropy",
    "drift": "4 steps drawn by surprisal, all hidden tokens scored",
    "step_merge": "trajectory in 8 segments",
    "cj_grpo": "every step of the trajectory, z-scored",
    "mask_aware": "trajectory and its order, drawn by Plackett-Luce",
    "just_grpo": "decoded left to right, every token scored given those before it, z-scored",
    "lladou": "trajectory and its order, drawn by a head that learns too, z-scored",
    "d_tree_rpo": "rollouts that branch, an advantage for every edge, self-distillation",
    "igpo": "d1's likelihood; groups that all fail are drawn again around the worked answer",
    "vrpo": "pairs of rollouts instead of eight, preference loss on bounds",
    "mdpo": "every step's prediction judged, the 4 steps of largest advantage scored",
}
"""The recipes of experiments/papers and papers_countdown."""
STUDIES = {
    "masking": Study(
        "arm",
        "row",
        {
            "row": "0.15, each rollout its own, new at every inner update (d1)",
            "none": "0: the prompt as it is",
            "group": "0.15, shared by a group",
            "fixed": "0.15, the same at all inner updates",
        },
        GRPO,
        "grpo",
    ),
    "inner_updates": Study(
        "arm",
        "mu4",
        {
            "mu1": "each rollout used once: 8 updates",
            "mu4": "four times: 32 updates",
            "mu8": "eight times: 64 updates",
        },
        GRPO,
        "grpo",
    ),
    "losses": Study(
        "loss",
        "clipped",
        {
            "clipped": "d1: token ratios clipped at 0.5, mean over tokens",
            "grpo": "clipped at 0.2, mean over each rollout first",
            "dr_grpo": "clipped at 0.2, sum over the canvas's length",
            "dapo": "clipped at 0.2 below and 0.28 above, mean over tokens",
            "dual_clip": "clipped at 0.2, and at 3 where A < 0",
            "cispo": "ratios cut at 5, held out of the gradient",
            "soft_gate": "a smooth gate in place of the clip",
            "bgpo": "linear where A > 0, exponential where A < 0, clipped at 0.2",
            "top_entropy": "clipped, the fifth of the tokens with most entropy",
            "off_policy": "clipped, without rollouts that have moved far and lost",
            "vespo": "weights of whole rollouts, smooth (VESPO)",
            "wd1": "weights from the rewards, no ratio",
            "spg": "no ratio, no clip, mean over tokens",
            "reinforce": "no ratio, no clip, sum over tokens",
            "gspo": "one ratio a rollout, clipped at 0.0003: refused unless asked for",
        },
        GRPO,
        "grpo",
    ),
    "attention": Study(
        "recipe",
        "d1",
        {
            "d1": "everybody sees everything",
            "block_diffusion": "a block sees those before it and itself",
            "d2_any_order": "a token sees those committed before it",
        },
        (Measure("after SFT", "sft", None), Measure("after GRPO", "grpo", None)),
        "grpo",
        frozenset({"block_diffusion", "d2_any_order"}),
    ),
    "schedules": Study(
        "schedule",
        "linear",
        {
            "linear": "t masked, weight 1/t (LLaDA, d1)",
            "linear_unweighted": "t masked, weight 1",
            "cosine": "fewer tokens hidden early (MDLM), its own weight",
        },
        (Measure("greedy", "sft", None), Measure("forced-x", "sft", "forced")),
        "sft",
    ),
    **{
        name: Study(
            "recipe",
            "grpo",
            PAPERS,
            (Measure("sampled", "grpo", None),),
            "grpo",
            frozenset({"mask_aware", "just_grpo", "lladou"}),
            scale,
        )
        for name, scale in (("papers", CELLS), ("papers_countdown", COUNTDOWN_REWARD))
    },
}


# ------------------------------------------------------------------------------------------------------------ gathering


def gather(name: str, folder: Path, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The small record of a sweep: for every run its rows as digits, and its cost.

    Runs of `before` that the folder does not have stay, if they were made with the same packages.
    """
    study, runs = STUDIES[name], {(run["arm"], run["seed"]): run for run in (before or {"runs": []})["runs"]}
    for file in sorted(folder.glob("*/results.json")):
        words = dict(word.split("=", 1) for word in file.parent.name.split(","))
        results = json.loads(file.read_text())
        read = partial(digits, results, file.parent, scale=study.scale)
        found = {measure.name: read(measure) for measure in study.measures}
        start = {m.name: read(Measure(m.name, "base", m.probe)) for m in study.measures}
        cost = results["cost"]["stages"][study.stage]
        runs[words[study.key], results["seed"]] = {
            "arm": words[study.key],
            "seed": results["seed"],
            "start": start,
            "measures": found,
            "forwards": cost["forwards"],
            "flops": cost["flops"],
        }
    environment = json.loads((file.parent / "environment.json").read_text())
    kept = {key: environment[key] for key in ("packages", "python", "platform", "processor", "threads")}
    if before is not None:
        then = before["environment"]["packages"]
        same = all(kept["packages"].get(name) == version for name, version in then.items())
        assert same, "made with other packages: run all arms again"
    arms = list(study.arms)
    ordered = [runs[key] for key in sorted(runs, key=lambda key: (arms.index(key[0]), key[1]))]
    return {"study": name, "values": study.scale.values, "environment": kept, "runs": ordered}


def digits(results: dict[str, Any], folder: Path, measure: Measure, scale: Scale) -> str:
    """The rows of an evaluation, one digit a row."""
    entries = results["evaluations"] if measure.probe is None else results["probes"]
    (entry,) = [e for e in entries if e["stage"] == measure.stage and e.get("probe") == measure.probe]
    rows = [json.loads(line) for line in (folder / entry["rows_file"]).read_text().splitlines()]
    rows.sort(key=lambda row: row["index"])
    return "".join(str(scale.digit(row)) for row in rows)


# --------------------------------------------------------------------------------------------------------------- tables


def reached(results: dict[str, Any], measure: str, when: str = "measures") -> dict[str, dict[int, float]]:
    """Per cent of what could be had, by arm and seed; `when` is "start" or "measures", the end."""
    found: dict[str, dict[int, float]] = {}
    scale = STUDIES[results["study"]].scale
    for run in results["runs"]:
        found.setdefault(run["arm"], {})[run["seed"]] = scale.percent(run[when][measure])
    return found


def against(values: dict[str, dict[int, float]], arm: str, baseline: str) -> list[float]:
    """Differences to the baseline, seed by seed: both arms start from the same weights and see the same prompts."""
    return [values[arm][seed] - values[baseline][seed] for seed in sorted(values[baseline])]


def write_table(results: dict[str, Any]) -> str:
    """The study's table as Markdown."""
    study = STUDIES[results["study"]]
    seeds = sorted({run["seed"] for run in results["runs"]})
    head = ["arm", "what", *(f"seed {seed}" for seed in seeds), "mean", f"minus {study.baseline} (95 %)", "TFLOPs"]
    parts = []
    for measure in study.measures:
        values = reached(results, measure.name)
        start = reached(results, measure.name, "start")[study.baseline]
        rows = [["start", "the base model", *_shown([start[seed] for seed in seeds]), "", ""]]
        for arm, what in study.arms.items():
            own = [values[arm][seed] for seed in seeds]
            difference = "" if arm == study.baseline else _difference(against(values, arm, study.baseline))
            flops = [run["flops"] for run in results["runs"] if run["arm"] == arm]
            rows.append([arm, what, *_shown(own), difference, f"{sum(flops) / len(flops) / 1e12:.2f}"])
        if len(study.measures) > 1:
            parts.append(f"{study.scale.name.capitalize()}, {measure.name}, per cent:\n")
        parts.append("\n".join([_row(head), "|" + "---|" * len(head), *map(_row, rows)]) + "\n")
    return "\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(values: Sequence[float]) -> list[str]:
    return [*(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f}"]


def _difference(values: Sequence[float]) -> str:
    """Mean over seeds with Student's interval; bold where 0 lies outside it."""
    interval = mean_over_seeds(values)
    text = f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


# ----------------------------------------------------------------------------------------------------------------- plot

WIDTH, LINE, LEFT, RIGHT = 760, 34, 170, 30
COLOURS = ("#2563eb", "#d97706")


def write_plot(results: dict[str, Any]) -> str:
    """Differences to the baseline as SVG: a dot a seed, a bar the interval of their mean."""
    study = STUDIES[results["study"]]
    arms = [arm for arm in study.arms if arm != study.baseline]
    drawn: list[tuple[int, int, list[float], Interval]] = []
    for number, measure in enumerate(study.measures):
        values = reached(results, measure.name)
        for place, arm in enumerate(arms):
            points = against(values, arm, study.baseline)
            drawn.append((number, place, points, mean_over_seeds(points)))
    every = [0.0, *(v for _, _, points, mean in drawn for v in (*points, mean.low, mean.high))]
    low, high = min(every), max(every)
    height = 60 + LINE * len(arms)

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<path d="M{at(0):.1f} 8V{height - 45}" stroke="#444"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}" text-anchor="middle">points of'
        f" {study.scale.name} above {study.baseline}</text>",
    ]
    for tick in sorted({low, 0.0, high}):
        lines.append(f'<text x="{at(tick):.1f}" y="{height - 28}" text-anchor="middle">{tick:+.1f}</text>')
    for place, arm in enumerate(arms):
        lines.append(f'<text x="{LEFT - 12}" y="{30 + LINE * place}" text-anchor="end">{arm}</text>')
    for number, place, points, mean in drawn:
        y, colour = 26 + LINE * place + 9 * number, COLOURS[number]
        lines.append(f'<path d="M{at(mean.low):.1f} {y}H{at(mean.high):.1f}" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<path d="M{at(mean.value):.1f} {y - 6}V{y + 6}" stroke="{colour}" stroke-width="3"/>')
        lines += [f'<circle cx="{at(p):.1f}" cy="{y}" r="3" fill="{colour}" opacity="0.6"/>' for p in points]
    for number, measure in enumerate(study.measures if len(study.measures) > 1 else ()):
        lines.append(f'<text x="10" y="{14 + 14 * number}" fill="{COLOURS[number]}">{measure.name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


# ----------------------------------------------------------------------------------------------------------------- page


def write_page(page: str, table: str, name: str = "table") -> str:
    """The README with a table between the marks of its name."""
    between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    assert len(between.findall(page)) == 1, f"README.md: one <!-- {name} --> and one <!-- end of {name} -->"
    return between.sub(lambda _: f"\n{table}\n", page)


def main() -> None:
    """Results, where runs are given; then table and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("runs", nargs="?", type=Path, help="the sweep's folder")
    parser.add_argument("--adds", action="store_true", help="keep the runs of results.json that the folder lacks")
    given = parser.parse_args()
    folder = HERE / given.study
    if given.runs is not None:
        file = folder / "results.json"
        before = json.loads(file.read_text()) if given.adds else None
        file.write_text(json.dumps(gather(given.study, given.runs, before), indent=1) + "\n")
    results = json.loads((folder / "results.json").read_text())
    table = write_table(results)
    (folder / "plot.svg").write_text(write_plot(results))
    readme = folder / "README.md"
    readme.write_text(write_page(readme.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
