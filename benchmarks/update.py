"""One inner update, forward and backward, head and embedding frozen: views of rows and of groups against the textbook.

python benchmarks/update.py [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import textbook
import torch
from measuring import (
    MIDDLE,
    PROPORTIONAL,
    TINY,
    Measured,
    Setup,
    Size,
    against,
    compare,
    fresh_policy,
    keep,
    plain,
    publish,
    relative_difference,
    setup,
    table,
)
from scoring import Rows, random_rows, textbook_scoring_flops

from d1lit.costs import LLADA_8B, NetworkShape, body_backward_flops, full, head_flops, update_flops
from d1lit.models import Policy
from d1lit.scoring import score

EPSILON, BETA = 0.5, 0.04


@dataclass(frozen=True)
class Case:
    """Groups of rollouts; the least factors of `row` in time and memory, and of `group` in memory."""

    size: Size
    groups: int
    group_size: int
    prompt_length: int
    completion_length: int
    row_floor: float | None = None
    row_memory_floor: float | None = None
    group_memory_floor: float | None = None
    has_group_floor: bool = True


def cases(quick: bool) -> list[Case]:
    """The shapes whose factors are promised."""
    if quick:
        return [Case(TINY, 1, 2, 8, 8, has_group_floor=False)]
    large, groups = Size(126464, 512, 4), (4, 8, 16)
    return [
        *(Case(large, 1, g, 100, 128, row_floor=1.3, row_memory_floor=5.0, group_memory_floor=8.0) for g in groups),
        *(Case(PROPORTIONAL, 1, group_size, 200, 256) for group_size in (4, 6, 8, 16)),
        *(Case(MIDDLE, 1, group_size, 64, 64) for group_size in groups),
        *(Case(PROPORTIONAL, 1, group_size, 64, 64) for group_size in groups),
    ]


def constants(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Old and reference log-probs and advantages, which both sides are given."""
    generator = torch.Generator().manual_seed(3)
    shape = rows.rollout.completion_ids.shape
    old, ref = (-10 + torch.rand(shape, generator=generator) for _ in range(2))
    advantages = torch.randn(shape[0], generator=generator)
    device = rows.rollout.device
    return old.to(device), ref.to(device), (advantages - advantages.mean()).to(device)


def gradients(policy: Policy, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of everything that trains."""
    return list(torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad]))


def measure(case: Case, chosen: Setup) -> dict[str, Any]:
    """One shape."""
    policy = fresh_policy(case.size, chosen.device, train_body=True)
    rows = random_rows(policy, case, chosen.device)
    completion_ids = rows.rollout.completion_ids
    old, ref, advantages = constants(rows)

    def step(logprobs: torch.Tensor) -> list[torch.Tensor]:
        return gradients(policy, textbook.clipped_loss(logprobs, old, ref, advantages, EPSILON, BETA))

    def plainly() -> list[torch.Tensor]:
        return step(textbook.completion_logprobs(policy, rows.noised_ids, completion_ids))

    def plainly_shared() -> list[torch.Tensor]:
        return step(textbook.completion_logprobs(policy, rows.shared_noised_ids, completion_ids))

    def each_row() -> list[torch.Tensor]:
        return step(score(policy, rows.rollout, rows.corruption).logprobs[:, 0])

    def each_group() -> list[torch.Tensor]:
        return step(score(policy, rows.rollout, rows.shared).logprobs[:, 0])

    measured = compare({"textbook": plainly, "row": each_row, "group": each_group}, chosen.rounds, chosen.device)
    errors = {
        "row": relative_difference(each_row(), plainly()),
        "group": relative_difference(each_group(), plainly_shared()),
        "group_without_prompt_masks": _without_prompt_masks(policy, case, chosen.device),
    }
    return {
        "case": asdict(case),
        "measured": plain(measured),
        "gradient_difference": errors,
        "rows": [row(case, name, measured, policy.shape, errors[name]) for name in ("row", "group")],
    }


def _without_prompt_masks(policy: Policy, case: Case, device: str) -> float:
    """`group` against `row` where no prompt token is masked: the same loss, so the same gradient."""
    rows = random_rows(policy, case, device, mask_prob=0.0)
    old, ref, advantages = constants(rows)
    both = [
        gradients(
            policy,
            textbook.clipped_loss(
                score(policy, rows.rollout, corruption).logprobs[:, 0], old, ref, advantages, EPSILON, BETA
            ),
        )
        for corruption in (rows.shared, rows.corruption)
    ]
    return relative_difference(*both)


def textbook_update_flops(shape: NetworkShape, rows: int, length: int) -> int:
    """Forward and backward at every position, the body's weights training, the head frozen."""
    backward = body_backward_flops(shape, full(rows, length), trains_weights=True) + head_flops(shape, rows * length)
    return textbook_scoring_flops(shape, rows, length) + backward


def flops_factor(shape: NetworkShape, case: Case, name: str) -> float:
    """What the formulas promise."""
    rows = case.groups * case.group_size
    views = rows if name == "row" else case.groups
    base = textbook_update_flops(shape, rows, case.prompt_length + case.completion_length)
    return base / update_flops(shape, views, case.prompt_length, case.completion_length, trains_weights=True)


def row(case: Case, name: str, measured: dict[str, Measured], shape: NetworkShape, error: float) -> list[Any]:
    """For the table."""
    one = measured[name]
    floor = case.row_floor if name == "row" else 0.9 * case.group_size if case.has_group_floor else None
    memory_floor = case.row_memory_floor if name == "row" else case.group_memory_floor
    memory = f"{one.memory_factor:.1f}" + ("" if memory_floor is None else f" (floor {memory_floor:g})")
    paper = Case(case.size, 1, case.group_size, 200, 256)
    return [
        str(case.size),
        f"{case.groups} x {case.group_size}, {case.prompt_length}, {case.completion_length}",
        name,
        measured["textbook"].seconds,
        one.seconds,
        against(one, floor),
        flops_factor(shape, case, name),
        f"{measured['textbook'].peak_mb:.0f} -> {one.peak_mb:.0f}",
        memory,
        f"{error:.1e}",
        flops_factor(LLADA_8B, paper, name),
    ]


HEADINGS = (
    "network", "B x G, P, C", "views", "textbook s", "ours s", "factor (range)", "FLOP ratio", "peak MB",
    "memory factor", "gradient, relative difference", "8B on a GPU, P 200, C 256, arithmetic",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    chosen = setup("update", arguments)
    records = []
    for case in cases(chosen.quick):
        records.append(measure(case, chosen))
        keep("update", chosen, [table(HEADINGS, [line for record in records for line in record["rows"]])], records)
    same = [[str(r["rows"][0][0]), r["rows"][0][1], f"{r['gradient_difference']['group_without_prompt_masks']:.1e}"]
            for r in records]  # fmt: skip
    publish(
        "update",
        chosen,
        [
            table(HEADINGS, [line for record in records for line in record["rows"]]),
            table(("network", "B x G, P, C", "group against row without prompt masks, relative difference"), same),
        ],
        records,
    )


if __name__ == "__main__":
    main()
