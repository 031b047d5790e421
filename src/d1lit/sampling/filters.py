"""Token filters: another proposal, drawing from the likeliest tokens only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d1lit.sampling.parts import Cells, Choice, Prediction, Proposal


def top_p(probs: Float[Tensor, "c V"], share: float, keep_crossing: bool = True) -> Bool[Tensor, "c V"]:
    """The fewest tokens whose probabilities reach `share`: the one that crosses it stays (Holtzman et al., 2020).

    Args:
        probs: one distribution a row.
        share: the probability to keep.
        keep_crossing: False drops the token that crosses it, as ReMDM's code does (arXiv 2503.00307).
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    running = ordered.cumsum(-1)
    kept = (running - ordered if keep_crossing else running) <= share
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)


def top_k(probs: Float[Tensor, "c V"], count: int) -> Bool[Tensor, "c V"]:
    """The `count` likeliest tokens, and those as likely as the last of them."""
    least = probs.topk(min(count, probs.shape[-1]), dim=-1).values[:, -1:]
    return probs >= least


@dataclass(frozen=True)
class Filtered:
    """Another proposal on the tokens that pass top-p and top-k, both read at the sampler's temperature.

    The log-probability reported is that of the filtered distribution. At temperature 0 nothing is filtered.
    Differs from Dream's code: confidences still read the whole distribution.
    """

    proposal: Proposal
    top_p: float | None
    """Probability to keep; None: all."""
    top_k: int | None
    """Tokens to keep; None: all."""
    keep_crossing: bool = True
    """As in `top_p`."""

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampler.proposal.top_p: {self.top_p} must be in (0, 1]. Try: 0.95, or null")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampler.proposal.top_k: {self.top_k} must be at least 1. Try: 50, or null")

    def uniforms(self, cells: Cells, vocabulary: int) -> Float[Tensor, "n M ..."]:
        """The inner proposal's."""
        return self.proposal.uniforms(cells, vocabulary)

    def draw(self, prediction: Prediction, temperature: float, uniforms: Float[Tensor, "c ..."]) -> Choice:
        """A token a position from what the filters leave."""
        scaled = prediction.logits / temperature
        scaled[:, prediction.mask_token_id] = -torch.inf
        probs = scaled.softmax(-1)
        kept = torch.ones_like(probs, dtype=torch.bool)
        if self.top_p is not None:
            kept &= top_p(probs, self.top_p, self.keep_crossing)
        if self.top_k is not None:
            kept &= top_k(probs, self.top_k)
        filtered = replace(prediction, logits=prediction.logits.masked_fill(~kept, -torch.inf))
        return self.proposal.draw(filtered, temperature, uniforms)
