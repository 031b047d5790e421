"""Remask rules: which tokens of the active block are hidden again after a step, to be predicted anew.

With one of these the commit steps in a rollout are those of the LAST time each token was fixed, and the canvases
between can no longer be read off them (`record_trace` keeps those).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from d1lit.sampling.commit import QuotaSchedule, ranks
from d1lit.sampling.parts import Standing
from d1lit.sampling.prediction import Canvas


@dataclass(frozen=True)
class LowestConfidence:
    """Running-confidence remasking (RCR of MDPO, arXiv 2508.13148), together with `CommitAll` as the commit rule.

    A step fixes all that is masked and remasks the least confident tokens of the block, until as many stand as the
    schedule says. A token keeps the confidence it was fixed with until it is remasked.
    Differs from the published code: tokens of finished blocks are never remasked.
    """

    schedule: QuotaSchedule
    verifies: ClassVar[bool] = False
    runs_all_steps: ClassVar[bool] = False

    def remask(self, standing: Standing) -> Bool[Tensor, "n M"]:
        """As many of the lowest scores as later steps have to fix, leftmost on ties."""
        cells = standing.cells
        later = sum(self.schedule.quotas(standing.age.shape[1], cells.num_steps)[cells.step + 1 :])
        return (ranks(-standing.confidence) < later) & cells.candidates


# ----------------------------------------------------------------------------------------------------------------- WINO


@dataclass(frozen=True)
class Unverified:
    """WINO's verification (arXiv 2507.18578): tokens the network finds improbable without seeing them are remasked.

    Every forward carries a hidden copy of the block (`with_shadow`), which sees all but the token it verifies. Nothing
    is remasked in a step that fixed a single token, and fewer than the step before had fixed: so a block ends.
    """

    threshold: float
    verifies: ClassVar[bool] = True
    runs_all_steps: ClassVar[bool] = False

    def remask(self, standing: Standing) -> Bool[Tensor, "n M"]:
        """The improbable ones, the least probable first where they are too many."""
        assert standing.verified is not None
        here, age = standing.cells.candidates, standing.age
        fixed_now = (here & (age == 0)).sum(1, keepdim=True)
        fixed_before = (here & (age == 1)).sum(1, keepdim=True)
        low = (standing.verified < self.threshold) & here & (age > 0)
        too_many = low.sum(1, keepdim=True) >= fixed_before
        limit = torch.where(too_many, fixed_before - 1, age.shape[1])
        order = ranks(torch.where(low, -standing.verified, -torch.inf))
        return low & (order < limit) & (fixed_now > 1)


def with_shadow(canvas: Canvas, first: Int[Tensor, " n"], block_length: int, mask_token_id: int) -> Canvas:
    """The canvas with a hidden copy of each row's block behind it, that nobody but itself sees (WINO's layout).

    A hidden copy stands at its token's position and attends to everything except that token.

    Args:
        canvas: the rows.
        first: where each row's block starts in the canvas.
        block_length: of the block.
        mask_token_id: what the copy shows.
    """
    ids, (n, length) = canvas.ids, canvas.ids.shape
    block = first[:, None] + torch.arange(block_length, device=ids.device)
    place = torch.arange(length, device=ids.device)
    seen = ids.new_ones((n, length), dtype=torch.bool) if canvas.attention is None else canvas.attention
    attention = torch.zeros(n, length + block_length, length + block_length, dtype=torch.bool, device=ids.device)
    attention[:, :length, :length] = seen[:, None]
    attention[:, length:, :length] = seen[:, None] & (place != block[:, :, None])
    attention[:, length:, length:] = True
    return Canvas(
        torch.cat([ids, torch.full_like(block, mask_token_id, dtype=ids.dtype)], 1),
        attention,
        canvas.prompt_length,
        torch.cat([place.expand(n, -1), block], 1),
    )
