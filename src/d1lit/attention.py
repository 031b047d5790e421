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
    """A noised row, and behind it its clean columns from `start` on (BD3LM, arXiv 2503.09573).

    Noised tokens see the prompt, their own noised block and earlier clean ones; clean tokens the prompt and clean
    blocks up to their own; the prompt itself.
    """
    of, is_clean = _twice(block, start), _is_second(block, start)
    query, key = of[:, :, None], of[:, None, :]
    own, earlier = (key == query) & (query >= 0), (key < query) & (key >= 0)
    clean = is_clean & (earlier | (own & is_clean[:, None]))
    noised = ~is_clean & ~is_clean[:, None] & own
    return _with_self((clean | noised | _is_prompt(of, is_clean)) & _twice(seen, start)[:, None])


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
