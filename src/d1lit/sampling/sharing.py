"""Rollouts that branch: which rows stand at one canvas, so that one forward serves all, and whose draws each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from d1lit.types import Tree


@dataclass(frozen=True)
class Sharing:
    """What the rows of a wave have in common in one step."""

    first: Int[Tensor, " m"]
    """The place in the wave of one row of each canvas: these go through the network."""
    canvas: Int[Tensor, " n"]
    """Which of them stands where each row does."""
    drawn_by: Int[Tensor, " n"]
    """The row of the sampling call whose random numbers each row draws: the leftmost leaf below its child."""


def check_tree(tree: Tree, quotas: Sequence[int] | None, room: int | None, has_cache: bool) -> None:
    """Refuse a sampler that a tree cannot go with.

    Args:
        tree: of each group.
        quotas: how many tokens each step of a whole completion fixes; None where that is not known beforehand.
        room: rows that go on together at most; None: any number.
        has_cache: whether rows keep keys and values.

    Raises:
        ValueError: naming the key, the cause and the cure.
    """
    if quotas is None:
        raise ValueError(
            "sampler.tree: edges are equal shares of the steps, and this commit rule takes as many as it likes."
            " Try: FixedQuota."
        )
    if has_cache:
        raise ValueError("sampler.tree: rows that share a forward fill no cache of their own. Try: no cache.")
    num_steps = len(quotas)
    if tree.height > num_steps:
        raise ValueError(
            f"sampler.tree.height: {tree.height} edges are more than the {num_steps} steps. Try: {num_steps} or fewer."
        )
    starts = [*tree.starts(num_steps), num_steps]
    empty = [edge for edge in range(tree.height) if not sum(quotas[starts[edge] : starts[edge + 1]])]
    if empty:
        raise ValueError(
            f"sampler.tree: the steps of edge {empty[0]} fix no token, so the leaves below would be copies. "
            f"Try: sampler.num_steps of at most {sum(quotas)}, or fewer levels."
        )
    if room is not None and room < tree.leaves:
        raise ValueError(
            f"sampler.rows_per_forward: no room for the {tree.leaves} leaves of a tree (a guided one counts twice)."
            f" Try: null, or {2 * tree.leaves}."
        )


def sharing(
    tree: Tree, rows: Sequence[int], steps: Sequence[int], num_steps: int, device: torch.device | str
) -> Sharing:
    """Rows below one node are alike until its children draw, so the first step of an edge still shares its forward.

    The leftmost leaf of a tree draws its own numbers throughout, as it would without a tree. Nothing is read from the
    device: with a quota, the step of every row is known beforehand.

    Args:
        tree: of each group; groups are adjacent rows of the sampling call.
        rows: of the wave.
        steps: how many steps each has taken.
        num_steps: of a whole completion.
        device: where the rows are.
    """
    first: dict[int, int] = {}  # leftmost leaf of a canvas -> its number
    places, canvas, drawn_by = [], [], []
    for place, (row, step) in enumerate(zip(rows, steps, strict=True)):
        width = rows_at_a_canvas(tree, step, num_steps)
        leftmost = row - row % width
        if leftmost not in first:
            first[leftmost] = len(places)
            places.append(place)
        canvas.append(first[leftmost])
        drawn_by.append(row - row % tree.width(tree.edge_of(step, num_steps) + 1))
    return Sharing(*(torch.tensor(numbers, device=device) for numbers in (places, canvas, drawn_by)))


def rows_at_a_canvas(tree: Tree, step: int, num_steps: int) -> int:
    """How many leaves stand at one canvas when a step begins: those below the node that the step before led to."""
    return tree.width(tree.edge_of(step - 1, num_steps) + 1)  # before step 0 that is the root, at level 0


def edges(tree: Tree, commit_step: Int[Tensor, "N C"], num_steps: int) -> Int[Tensor, "N C"]:
    """The edge on which each token was fixed; the tree's height where none was."""
    starts = torch.tensor(tree.starts(num_steps), device=commit_step.device)
    edge = (commit_step[..., None] >= starts).sum(-1) - 1
    return torch.where(commit_step < 0, tree.height, edge)
