"""The policy-gradient bench: every estimator and loss against the exact gradient of the sampler's expected reward.

python experiments/estimators/run.py            # all of it; the README states what it took
python experiments/estimators/run.py --quick    # the same path in about a minute, numbers too noisy to read
python experiments/estimators/run.py --outcomes # only the pairs that the second panel of the stored results lacks
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from jumps import steps_explained
from outcome import GROUP_SIZE, RATES, outcome, rank_correlation
from pairs import pairs
from tables import plot_of, tables_of
from updates import check_lookup, measure
from world import Setting, World, expected_reward, flat_gradient, trained_world

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    chunks: int
    groups: int
    """Groups of 8 in a chunk; of other sizes, as many as have the same number of rollouts."""
    updates: int
    tuning_seeds: int
    seeds: int
    optimizer_steps: int
    nodes: int


FULL = Size(chunks=12, groups=528, updates=30, tuning_seeds=1, seeds=5, optimizer_steps=3, nodes=6)
QUICK = Size(chunks=3, groups=6, updates=2, tuning_seeds=1, seeds=2, optimizer_steps=1, nodes=2)

BASE = Setting()
CELLS: dict[str, tuple[str, Setting, int]] = {
    f"{model}, {order.replace('_', ' ')}, T {temperature}": (model, Setting(order, temperature), 8)
    for model in ("trained", "untrained")
    for order in ("low_confidence", "random")
    for temperature in (1.0, 0.9)
}
MORE: dict[str, tuple[str, Setting, int]] = {
    "trained, low confidence, T 1.0, G 4": ("trained", BASE, 4),
    "trained, low confidence, T 1.0, G 16": ("trained", BASE, 16),
    "trained, left to right, T 1.0": ("trained", Setting("left_to_right"), 8),
    "trained, low confidence, two a step": ("trained", Setting(tokens_per_step=2), 8),
    "six tokens, blocks of three, T 1.0": ("six tokens", Setting(length=6, block_length=3), 8),
    "six tokens, blocks of three, T 0.9": ("six tokens", Setting(temperature=0.9, length=6, block_length=3), 8),
}
"""Measured on half as many rollouts."""
READ_BY_OUTCOME = "trained, low confidence, T 1.0"
SAME_AS_ANOTHER = {"trajectory, temperature 1"}
"""At temperature 1 this pair is the trajectory itself; training it would count one pair twice."""


def gradients(worlds: dict[str, World], size: Size, save: Any) -> None:
    """Panel 1."""
    for name, (model, setting, group_size) in (CELLS | MORE).items():
        started, world = time.perf_counter(), worlds[model]
        value = expected_reward(world, setting)
        exact = flat_gradient(value, world)
        groups = max(6, size.groups * 8 // group_size)
        chunks = size.chunks if name in CELLS else max(3, size.chunks // 2)
        moments = measure(world, setting, group_size, pairs, chunks, groups, seed=1)
        cell = {
            "setting": asdict(setting),
            "model": model,
            "group_size": group_size,
            "groups": groups * chunks,
            "J": float(value.detach()),
            "gradient_norm": float(exact.norm()),
            "pairs": {pair: found.compare(exact) for pair, found in moments.items()},
            "seconds": time.perf_counter() - started,
        }
        print(f"{name}: J {cell['J']:.3f}, {cell['seconds']:.0f} s", flush=True)
        save("gradients", name, cell)


def changes(worlds: dict[str, World], size: Size, save: Any) -> None:
    """How far the gradient explains a step."""
    for model in ("trained", "untrained"):
        for order in ("low_confidence", "random"):
            for rate in (1e-4, 1e-3):
                found = steps_explained(
                    worlds[model], Setting(order), "trajectory", rate, size.optimizer_steps, size.nodes
                )
                save("jumps", f"{model}, {order.replace('_', ' ')}, rate {rate:g}", found)
                print(f"jumps: {model} {order} {rate:g}: R2 {found['first_order_r2']:.3f}", flush=True)


def training(start: World, size: Size, results: dict[str, Any], save: Any) -> None:
    """Panel 2: those pairs that have not been trained yet, cheapest first (each costs eight runs)."""
    measured = results["gradients"][READ_BY_OUTCOME]["pairs"]
    found = results["outcome"].setdefault("pairs", {})
    for name in sorted(measured, key=lambda name: measured[name]["passes"]):
        if name in found or name in SAME_AS_ANOTHER:
            continue
        found[name] = outcome(name, start, BASE, size.updates, size.tuning_seeds, size.seeds)
        print(f"  {name}: {found[name]['mean']:.3f} at {found[name]['rate']:g}", flush=True)
        reached = [found[pair]["mean"] for pair in found]
        for key in ("cosine", "alignment") if len(found) > 2 else ():
            results["outcome"][key] = rank_correlation([measured[pair][key] for pair in found], reached)
        save("outcome", "pairs", found)


def main() -> None:
    """Everything, saved after each piece."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute; numbers too noisy to read")
    parser.add_argument("--out", type=Path, default=None, help="where results.json, tables.md and plot.svg go")
    parser.add_argument(
        "--tables-only", action="store_true", help="write tables and plot of a stored results.json anew"
    )
    parser.add_argument("--outcomes", action="store_true", help="train the pairs that a stored results.json lacks")
    choice = parser.parse_args()
    out = choice.out or (Path("outputs/estimators-quick") if choice.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    if choice.outcomes:
        more_outcomes(QUICK if choice.quick else FULL, out)
    elif not choice.tables_only:
        compute(QUICK if choice.quick else FULL, out)
    results = json.loads((out / "results.json").read_text())
    (out / "tables.md").write_text(tables_of(results, READ_BY_OUTCOME))
    (out / "plot.svg").write_text(plot_of(results, READ_BY_OUTCOME))
    print(out / "results.json")


def compute(size: Size, out: Path) -> None:
    """All three parts into results.json."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    results: dict[str, Any] = {
        "size": asdict(size),
        "seeds": {"network": 0, "rollouts": 1, "tuning": 100, "outcome": 200},
        "rates": list(RATES),
        "outcome_group_size": GROUP_SIZE,
        "hardware": f"{platform.machine()}, one CPU thread, torch {torch.__version__}",
        "gradients": {},
        "jumps": {},
        "outcome": {},
    }

    def save(part: str, name: str, value: Any) -> None:
        results[part][name] = value
        results["seconds"] = time.perf_counter() - started
        write(results, out)

    worlds = {"untrained": World(0), "trained": trained_world(0, 4), "six tokens": trained_world(0, 6)}
    for setting in (BASE, Setting("random", 0.9)):
        check_lookup(worlds["trained"], setting, pairs)
    gradients(worlds, size, save)
    training(worlds["trained"], size, results, save)
    changes(worlds, size, save)


def more_outcomes(size: Size, out: Path) -> None:
    """The second panel of stored results goes on; it may be stopped after any pair."""
    torch.set_num_threads(1)
    results = json.loads((out / "results.json").read_text())

    def save(part: str, name: str, value: Any) -> None:
        results[part][name] = value
        write(results, out)

    training(trained_world(0, 4), size, results, save)


def write(results: dict[str, Any], out: Path) -> None:
    """Replace results.json in one step."""
    staging = out / "results.json.tmp"
    staging.write_text(json.dumps(results, indent=1) + "\n")
    staging.replace(out / "results.json")


if __name__ == "__main__":
    main()
