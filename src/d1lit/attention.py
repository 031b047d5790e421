"""Who may attend to whom in networks that do not see the whole canvas: block by block, or in the order of commitment.

Rows are [prompt; completion]; a position's block or step is -1 in the prompt. Where a row must be seen clean and noised
at once, a second stream stands behind it: the columns from `start` on, once more, at the same positions. Nobody sees
what `seen` leaves out (padding), but everyone sees itself: a query that may see nothing would turn into NaN.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Pattern = Bool[Tensor, "n T T"]


def target_blocks(is_target: Bool[Tensor, "n T"], block_length: int) -> Int[Tensor, "n T"]:
    """The block of each target, counted from the row's first; -1 elsewhere."""
    return torch.where(is_target, (is_target.cumsum(1) - 1) // block_length, -1)


def block_causal(block: Int[Tensor, "n T"], seen: Bool[Tensor, "n T"] | None) -> Pattern:
    """A block sees the prompt, the blocks before it and itself (BD3LM, arXiv 2503.09573); the prompt sees itself.

    Args:
        block: of each position.
        seen: None where nothing is padding.
    """
    pattern = block[:, None, :] <= block[:, :, None]
    return pattern if seen is None else _with_self(pattern & seen[:, None])


def block_streams(block: Int[Tensor, "n T"], seen: Bool[Tensor, "n T"], start: int) -> Pattern:
    """A noised row, and behind it its clean columns from `start` on: every block has one noised copy, its own.

    As `block_copies`.
    """
    of, is_clean = _twice(block, start), _is_second(block, start)
    is_copied_prompt = (of < 0) & is_clean
    return block_copies(of, torch.where(is_clean, -1, of), _twice(seen, start) & ~is_copied_prompt)


def block_copies(block: Int[Tensor, "n T"], copy: Int[Tensor, "n T"], seen: Bool[Tensor, "n T"]) -> Pattern:
    """Clean blocks, and noised copies of some of them, in any order (BD3LM, arXiv 2503.09573).

    A noised token sees the prompt, its own copy and earlier clean blocks; a clean one the prompt and clean blocks up to
    its own; the prompt itself.

    Args:
        block: of each position.
        copy: the number of the copy that a noised position belongs to; -1 of the prompt and of clean positions.
        seen: what somebody may see.
    """
    of, among = block[:, :, None], block[:, None, :]
    from_copy, to_copy = copy[:, :, None], copy[:, None, :]
    clean = (among < of) | ((among == of) & (from_copy < 0))
    pattern = torch.where(to_copy < 0, clean | (among < 0), to_copy == from_copy)
    return _with_self(pattern & seen[:, None])


def order_streams(step: Int[Tensor, "n T"], seen: Bool[Tensor, "n T"], start: int) -> Pattern:
    """A clean row, and behind it a mask slot for each column from `start` on (d2-AnyOrder, arXiv 2509.21474).

    A clean token sees the prompt, those committed in earlier steps and those of its own step to its left; a slot the
    prompt and those committed before its token's step; the prompt itself. Leave out by `seen` what was never committed.
    """
    of, is_slot = _twice(step, start), _is_second(step, start)
    place = torch.arange(len(is_slot), device=step.device)
    query, key = of[:, :, None], of[:, None, :]
    earlier = (key < query) & (key >= 0)
    together = (key == query) & (key >= 0) & (place < place[:, None]) & ~is_slot[:, None]
    return _with_self(((earlier | together) & ~is_slot | _is_prompt(of, is_slot)) & _twice(seen, start)[:, None])


def _twice(values: Tensor, start: int) -> Tensor:
    return torch.cat([values, values[:, start:]], dim=1)


def _is_second(values: Tensor, start: int) -> Bool[Tensor, " T"]:
    length = values.shape[1]
    return torch.arange(2 * length - start, device=values.device) >= length


def _is_prompt(of: Int[Tensor, "n T"], is_second: Bool[Tensor, " T"]) -> Bool[Tensor, "n 1 T"]:
    """Keys of the prompt; a copy of a prompt token is none."""
    return ((of < 0) & ~is_second)[:, None]


def _with_self(pattern: Pattern) -> Pattern:
    return pattern | torch.eye(pattern.shape[1], dtype=torch.bool, device=pattern.device)
