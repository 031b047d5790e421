"""Parts that carry something from one denoising step to the next: how a prediction changed, or the credit of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d1lit.sampling.commit import even_quotas, ranks
from d1lit.sampling.parts import Cells

_TINY = 1e-12
"""Added inside both logarithms, as in the authors' code: the first KL of a position is about 27 nats, never below a
threshold."""


@dataclass(frozen=True)
class PredictionChange:
    """Keeps KL(prediction now || prediction one step ago) of the last steps at each masked position (KLASS).

    Holds a row of probabilities for every position it follows: rows x block length x vocabulary numbers, or rows x
    completion length x vocabulary where it looks ahead.
    """

    history: int
    """Steps whose KL is kept."""
    looks_ahead: bool
    """Follow the positions behind the block too, as the authors' code does: the first step of a block then knows how
    their predictions changed in the block before. False: each block begins anew."""

    def shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """The last prediction and the last KLs."""
        return {"prediction": (vocabulary,), "kl": (self.history,)}

    def __call__(self, logits: Float[Tensor, "n M V"], cells: Cells) -> Float[Tensor, "n M V"]:
        """The logits as they are."""
        probs = logits.softmax(-1)
        change = (probs * ((probs + _TINY).log() - (cells.recall("prediction") + _TINY).log())).sum(-1)
        cells.keep("kl", torch.cat([cells.recall("kl")[..., 1:], change[..., None]], dim=-1))
        cells.keep("prediction", probs)
        return logits


@dataclass(frozen=True)
class StableThreshold:
    """KLASS (arXiv 2511.05664), with `PredictionChange` as the sampler's memory.

    Fixes the positions whose confidence is above a threshold and whose prediction changed by less than kl_threshold
    nats in each of the last steps; where there are none, the most confident ones, as many as an even schedule says.
    """

    threshold: float
    kl_threshold: float
    most_stable_only: bool
    """Of the ready positions fix the one with the smallest latest KL ("min_kl"); False: all of them."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """Ready positions, or the schedule's."""
        kl = cells.recall("kl")
        old_enough = cells.step >= kl.shape[-1] - 1
        ready = (kl < self.kl_threshold).all(-1) & (scores > self.threshold) & cells.candidates & old_enough
        if self.most_stable_only:
            latest = torch.where(ready, -kl[..., -1].to(scores.dtype), -torch.inf)
            chosen = ready & (ranks(latest) == 0)
        else:
            chosen = ready
        quota = even_quotas(cells.block_length, cells.num_steps)[min(cells.step, cells.num_steps - 1)]
        fallback = (ranks(scores) < max(1, quota)) & cells.candidates
        return torch.where(ready.any(1, keepdim=True), chosen, fallback)


@dataclass(frozen=True)
class CreditFusion:
    """Tokens that keep coming out on top gain credit (dInfer, arXiv 2510.08666): logits + alpha log(1 + credit).

    In every step all credits shrink by `decay`, and each masked position's most probable token gains p^gamma.
    """

    alpha: float
    gamma: float
    decay: float
    looks_ahead: ClassVar[bool] = False

    def shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """One credit a token."""
        return {"credit": (vocabulary,)}

    def __call__(self, logits: Float[Tensor, "n M V"], cells: Cells) -> Float[Tensor, "n M V"]:
        """The fused logits."""
        best, token = logits.softmax(-1).max(-1, keepdim=True)
        gain = torch.zeros_like(logits).scatter_(-1, token, best**self.gamma) * cells.candidates[..., None]
        credit = self.decay * cells.recall("credit") + gain
        cells.keep("credit", credit)
        return logits + self.alpha * torch.log1p(credit)
