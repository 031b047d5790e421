"""Scoring without gradient, as for old and reference log-probs: `score` against the textbook's whole logits.

python benchmarks/scoring.py [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import textbook
import torch
from measuring import (
    LARGE_VOCABULARY,
    MIDDLE,
    TINY,
    Measured,
    Run,
    Setup,
    Size,
    against,
    compare,
    fresh_policy,
    keep,
    plain,
    publish,
    random_prompts,
    setup,
    table,
)

from d1lit.costs import LLADA_8B, NetworkShape, body_flops, full, head_flops, scoring_flops
from d1lit.models import Policy
from d1lit.scoring import score
from d1lit.types import Corruption, Rollout


@dataclass(frozen=True)
class Case:
    """Groups of rollouts to score, and the least factors in time and memory with a view for each row."""

    size: Size
    groups: int
    group_size: int
    prompt_length: int
    completion_length: int
    time_floor: float | None
    memory_floor: float | None


def cases(quick: bool) -> list[Case]:
    """The shapes whose factors are promised, and one more."""
    if quick:
        return [Case(TINY, 1, 2, 8, 8, None, None)]
    return [
        Case(Size(126464, 512, 4), 1, 4, 200, 256, 1.5, 10.0),
        Case(LARGE_VOCABULARY, 1, 4, 100, 128, None, None),
        Case(MIDDLE, 1, 6, 64, 64, None, None),
    ]


@dataclass(frozen=True)
class Rows:
    """Rollouts with random tokens and the same views for both sides: one a row, or one a group."""

    rollout: Rollout
    noised_ids: torch.Tensor
    """[N, L]"""
    corruption: Corruption
    shared: Corruption
    shared_noised_ids: torch.Tensor
    """[N, L]: every row with its group's view."""


def random_rows(policy: Policy, case: Any, device: str, mask_prob: float = 0.15) -> Rows:
    """Prompts of groups, completions of ordinary tokens up to full length."""
    rows = case.groups * case.group_size
    prompts = random_prompts(case.groups, case.prompt_length, case.size.vocab_size, device)
    prompt_ids = prompts.prompt_ids.repeat_interleave(case.group_size, 0)
    generator = torch.Generator().manual_seed(1)
    completion_ids = torch.randint(0, case.size.vocab_size - 2, (rows, case.completion_length), generator=generator).to(
        device
    )
    blank = torch.zeros(completion_ids.shape, device=device)
    rollout = Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
        completion_ids=completion_ids,
        completion_mask=torch.ones_like(completion_ids, dtype=torch.bool),
        row_ids=torch.arange(rows, device=device),
        group_size=case.group_size,
        commit_step=torch.zeros_like(completion_ids),
        sampled_logprobs=blank,
        confidence=blank,
        entropy=blank,
    )
    noised = textbook.masked_prompts(prompt_ids, mask_prob, policy.mask_token_id, case.completion_length, seed=2)

    def corruption(views: torch.Tensor, view_of: torch.Tensor) -> Corruption:
        weight = torch.ones(rows, 1, case.completion_length, device=device)
        return Corruption(views, view_of[:, None], completion_ids[:, None], weight, case.prompt_length)

    each = torch.arange(rows, device=device)
    first = noised[:: case.group_size]
    return Rows(
        rollout,
        noised,
        corruption(noised, each),
        corruption(first, each // case.group_size),
        first.repeat_interleave(case.group_size, 0),
    )


def textbook_scoring_flops(shape: NetworkShape, rows: int, length: int) -> int:
    """Body and head at every position of every row."""
    return body_flops(shape, full(rows, length)) + head_flops(shape, rows * length)


def factors(shape: NetworkShape, case: Case) -> tuple[float, float]:
    """What the formulas promise with a view a row, and with one a group."""
    rows = case.groups * case.group_size
    base = textbook_scoring_flops(shape, rows, case.prompt_length + case.completion_length)
    lengths = (case.prompt_length, case.completion_length)
    return base / scoring_flops(shape, rows, *lengths), base / scoring_flops(shape, case.groups, *lengths)


def measure(case: Case, chosen: Setup) -> dict[str, Any]:
    """One shape."""
    policy = fresh_policy(case.size, chosen.device)
    rows = random_rows(policy, case, chosen.device)

    @torch.inference_mode()
    def plainly() -> torch.Tensor:
        return textbook.completion_logprobs(policy, rows.noised_ids, rows.rollout.completion_ids)

    @torch.inference_mode()
    def each_row() -> torch.Tensor:
        return score(policy, rows.rollout, rows.corruption).logprobs[:, 0]

    @torch.inference_mode()
    def each_group() -> torch.Tensor:
        return score(policy, rows.rollout, rows.shared).logprobs[:, 0]

    contenders: dict[str, Run] = {"textbook": plainly, "row": each_row, "group": each_group}
    measured = compare(contenders, chosen.rounds, chosen.device)
    error = float((plainly() - each_row()).abs().max())
    with torch.inference_mode():
        own = textbook.completion_logprobs(policy, rows.shared_noised_ids, rows.rollout.completion_ids)
    shared_error = float((own - each_group()).abs().max())
    return {
        "case": {**asdict(case)},
        "measured": plain(measured),
        "largest_difference": {"row": error, "group": shared_error},
        "rows": [
            row(case, "row", measured, policy.shape, error, 0),
            row(case, "group", measured, policy.shape, shared_error, 1),
        ],
    }


def row(
    case: Case, name: str, measured: dict[str, Measured], shape: NetworkShape, error: float, place: int
) -> list[Any]:
    """For the table."""
    one = measured[name]
    floors = (case.time_floor, case.memory_floor) if name == "row" else (None, None)
    memory = f"{one.memory_factor:.1f}" + ("" if floors[1] is None else f" (floor {floors[1]:g})")
    paper = Case(case.size, 1, 6, 200, 256, None, None)
    return [
        str(case.size),
        f"{case.groups} x {case.group_size}, {case.prompt_length}, {case.completion_length}",
        name,
        measured["textbook"].seconds,
        one.seconds,
        against(one, floors[0]),
        factors(shape, case)[place],
        f"{measured['textbook'].peak_mb:.0f} -> {one.peak_mb:.0f}",
        memory,
        f"{error:.1e}",
        factors(LLADA_8B, paper)[place],
    ]


HEADINGS = (
    "network", "B x G, P, C", "views", "textbook s", "ours s", "factor (range)", "FLOP ratio", "peak MB",
    "memory factor", "largest difference, nats", "8B on a GPU, G 6, arithmetic",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    chosen = setup("scoring", arguments)
    records = []
    for case in cases(chosen.quick):
        records.append(measure(case, chosen))
        keep("scoring", chosen, [table(HEADINGS, [line for record in records for line in record["rows"]])], records)
    publish("scoring", chosen, [table(HEADINGS, [line for record in records for line in record["rows"]])], records)


if __name__ == "__main__":
    main()
