"""How time and memory grow with B, C, G and V, beside the formulas: ours and the textbook, one direction at a time.

python benchmarks/growth.py [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import textbook
import torch
from measuring import TINY, Setup, Size, compare, fresh_policy, keep, plain, publish, random_prompts, setup, table
from rollout import our_sampler
from scoring import random_rows
from update import BETA, EPSILON, Case, constants, gradients, textbook_update_flops

from d1lit.costs import RolloutPlan, exact_rollout_flops, textbook_rollout_flops, update_flops
from d1lit.draws import CounterDraws
from d1lit.scoring import score

SIZE = Size(8192, 128, 4)
PLAN = RolloutPlan(rows=4, prompt_length=32, completion_length=64, block_length=16, steps_per_block=4)
UPDATE = Case(SIZE, 1, 4, 32, 64)


@dataclass(frozen=True)
class Direction:
    """What grows, its values, and how to measure one of them."""

    name: str
    values: Sequence[int]
    measure: Callable[[int, Setup], dict[str, Any]]


def measure_rollout(size: Size, plan: RolloutPlan, chosen: Setup) -> dict[str, Any]:
    """Temperature 0.9."""
    policy = fresh_policy(size, chosen.device)
    prompts = random_prompts(plan.rows, plan.prompt_length, size.vocab_size, chosen.device)
    steps = plan.num_blocks * plan.steps_per_block
    sampler = our_sampler(plan, 0.9, cached=False)
    measured = compare(
        {
            "textbook": lambda: textbook.sample(
                policy, prompts.prompt_ids, plan.completion_length, steps, plan.block_length, 0.9
            ),
            "ours": lambda: sampler(policy, prompts, 1, CounterDraws(0)),
        },
        chosen.rounds,
        chosen.device,
    )
    flops = {"textbook": textbook_rollout_flops(policy.shape, plan), "ours": exact_rollout_flops(policy.shape, plan)}
    return {"measured": plain(measured), "flops": flops}


def measure_update(case: Case, chosen: Setup) -> dict[str, Any]:
    """A view a group."""
    policy = fresh_policy(case.size, chosen.device, train_body=True)
    rows = random_rows(policy, case, chosen.device)
    old, ref, advantages = constants(rows)

    def step(logprobs: torch.Tensor) -> list[torch.Tensor]:
        return gradients(policy, textbook.clipped_loss(logprobs, old, ref, advantages, EPSILON, BETA))

    measured = compare(
        {
            "textbook": lambda: step(
                textbook.completion_logprobs(policy, rows.noised_ids, rows.rollout.completion_ids)
            ),
            "ours": lambda: step(score(policy, rows.rollout, rows.shared).logprobs[:, 0]),
        },
        chosen.rounds,
        chosen.device,
    )
    lengths = (case.prompt_length, case.completion_length)
    number = case.groups * case.group_size
    flops = {
        "textbook": textbook_update_flops(policy.shape, number, sum(lengths)),
        "ours": update_flops(policy.shape, case.groups, *lengths, trains_weights=True),
    }
    return {"measured": plain(measured), "flops": flops}


def directions(quick: bool) -> list[Direction]:
    """One at a time, the rest as in PLAN and UPDATE."""
    size, update = (TINY, replace(UPDATE, size=TINY)) if quick else (SIZE, UPDATE)
    short = (1, 2) if quick else (1, 2, 4, 8, 16)
    lengths = (16, 32) if quick else (16, 32, 64, 128, 256)
    groups = (2, 4) if quick else (2, 4, 8, 16)
    vocabularies = (64, 128) if quick else (2048, 8192, 32768, 126464)
    return [
        Direction("B, rollout", short, lambda b, s: measure_rollout(size, replace(PLAN, rows=b), s)),
        Direction("C, rollout", lengths, lambda c, s: measure_rollout(size, replace(PLAN, completion_length=c), s)),
        Direction("V, rollout", vocabularies, lambda v, s: measure_rollout(replace(SIZE, vocab_size=v), PLAN, s)),
        Direction("G, update", groups, lambda g, s: measure_update(replace(update, group_size=g), s)),
        Direction("C, update", lengths, lambda c, s: measure_update(replace(update, completion_length=c), s)),
        Direction(
            "V, update", vocabularies, lambda v, s: measure_update(replace(UPDATE, size=replace(SIZE, vocab_size=v)), s)
        ),
    ]


def rows_of(direction: Direction, points: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """For the table: measured, and next to it the formula scaled to meet the first value."""
    rows = []
    for value, point in zip(direction.values, points, strict=True):
        cells: list[Any] = [direction.name, value]
        for who in ("textbook", "ours"):
            scale = points[0]["measured"][who]["seconds"] / points[0]["flops"][who]
            one = point["measured"][who]
            cells += [one["seconds"], scale * point["flops"][who], one["peak_mb"]]
        rows.append(cells)
    return rows


# ----------------------------------------------------------------------------------------------------------------- plot

_WIDTH, _HEIGHT, _LEFT, _TOP = 250, 150, 52, 30
_COLOURS = {"textbook": "#b3402a", "ours": "#1f6f8b"}


def panel(x: int, y: int, title: str, values: Sequence[int], lines: dict[str, list[float]], unit: str) -> str:
    """One small plot, both axes logarithmic; dashed lines are the formulas."""
    from math import log10

    everything = [v for line in lines.values() for v in line if v > 0]
    low, high = log10(min(everything)), log10(max(everything))
    low, high = low - 0.05, max(high, low + 0.1) + 0.05
    first, last = log10(values[0]), log10(values[-1])

    def place(value: float, height: float) -> str:
        across = _LEFT + (log10(value) - first) / (last - first) * _WIDTH
        up = _TOP + (high - log10(max(height, 10**low))) / (high - low) * _HEIGHT
        return f"{x + across:.1f},{y + up:.1f}"

    parts = [
        f'<text x="{x + _LEFT}" y="{y + 18}" class="title">{title}, {unit}</text>',
        f'<rect x="{x + _LEFT}" y="{y + _TOP}" width="{_WIDTH}" height="{_HEIGHT}" class="frame"/>',
    ]
    for value in (values[0], values[-1]):
        across = place(value, 10**low).split(",")[0]
        parts.append(f'<text x="{across}" y="{y + _TOP + _HEIGHT + 14}" text-anchor="middle">{value}</text>')
    for height in (min(everything), max(everything)):
        up = place(values[0], height).split(",")[1]
        parts.append(f'<text x="{x + _LEFT - 4}" y="{up}" text-anchor="end">{height:.2g}</text>')
    for name, line in lines.items():
        points = " ".join(place(value, height) for value, height in zip(values, line, strict=True))
        dashes = ' stroke-dasharray="4 3"' if "formula" in name else ""
        parts.append(f'<polyline points="{points}" stroke="{_COLOURS[name.split()[0]]}"{dashes}/>')
    return "\n".join(parts)


def plot(directions_: Sequence[Direction], tables: Sequence[list[list[Any]]]) -> str:
    """All directions: seconds above, memory below."""
    parts = []
    for column, (direction, rows) in enumerate(zip(directions_, tables, strict=True)):
        x = column * (_WIDTH + _LEFT + 20)
        seconds = {
            "textbook": [row[2] for row in rows],
            "textbook formula": [row[3] for row in rows],
            "ours": [row[5] for row in rows],
            "ours formula": [row[6] for row in rows],
        }
        memory = {"textbook": [row[4] for row in rows], "ours": [row[7] for row in rows]}
        parts.append(panel(x, 0, direction.name, direction.values, seconds, "CPU seconds"))
        parts.append(panel(x, _HEIGHT + 70, direction.name, direction.values, memory, "peak MB"))
    width, height = len(directions_) * (_WIDTH + _LEFT + 20) + 20, 2 * _HEIGHT + 150
    style = (
        "text{font:11px sans-serif;fill:#333}.title{font-weight:bold}.frame{fill:none;stroke:#bbb}"
        "polyline{fill:none;stroke-width:1.8}"
    )
    legend = (
        f'<text x="{_LEFT}" y="{height - 12}"><tspan fill="{_COLOURS["textbook"]}">textbook</tspan>, '
        f'<tspan fill="{_COLOURS["ours"]}">d1lit</tspan>; dashed: operations by formula, scaled to the first point; '
        "both axes logarithmic</text>"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="white"/><style>{style}</style>\n{body}\n{legend}</svg>\n'
    )


HEADINGS = (
    "grows", "value", "textbook s", "by formula", "textbook MB", "ours s", "by formula", "ours MB",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep, plot."""
    chosen = setup("growth", arguments, rounds=3)
    grown = directions(chosen.quick)
    records, tables = [], []
    for direction in grown:
        points = [direction.measure(value, chosen) for value in direction.values]
        tables.append(rows_of(direction, points))
        records.append({"direction": direction.name, "values": list(direction.values), "points": points})
        keep("growth", chosen, [table(HEADINGS, [row for rows in tables for row in rows])], records)
    publish("growth", chosen, [table(HEADINGS, [row for rows in tables for row in rows])], records)
    Path(chosen.out / "growth.svg").write_text(plot(grown, tables))


if __name__ == "__main__":
    main()
