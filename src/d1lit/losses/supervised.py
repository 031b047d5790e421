"""Masked cross-entropy for supervised training, and the ways its sum is normalised.

Every function returns a numerator and a count apart. The numerators of all micro-batches and ranks, divided by the sum
of all their counts, give the loss of the global batch, whatever it was cut into.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TokenLosses = Float[Tensor, "n T"]
Parts = tuple[Float[Tensor, ""], Float[Tensor, ""]]
Normalization = Callable[[TokenLosses, Bool[Tensor, "n T"]], Parts]


def token_mean(losses: TokenLosses, is_maskable: Bool[Tensor, "n T"]) -> Parts:
    """Over all tokens that could have been hidden, end-of-sequence padding included (d1, arXiv 2504.12216).

    d1 writes the count as tokens of the batch minus prompt tokens.
    """
    return losses.sum(), is_maskable.sum().to(losses.dtype)


def sequence_mean(losses: TokenLosses, is_maskable: Bool[Tensor, "n T"]) -> Parts:
    """Each row over its own answer length, then the mean of the rows (LLaDA's guide, arXiv 2502.09992)."""
    length = is_maskable.sum(1).clamp(min=1)
    return (losses.sum(1) / length).sum(), losses.new_tensor(losses.shape[0])


def batch_mean(losses: TokenLosses, is_maskable: Bool[Tensor, "n T"]) -> Parts:
    """The sum of each row, then the mean of the rows: a bound on nats a sequence."""
    return losses.sum(), losses.new_tensor(losses.shape[0])


def masked_cross_entropy(
    token_losses: TokenLosses,
    is_masked: Bool[Tensor, "n T"],
    is_maskable: Bool[Tensor, "n T"],
    weight: Float[Tensor, "n T"],
    normalize: Normalization = token_mean,
) -> Parts:
    """Weighted cross-entropy of the hidden tokens, as (numerator, count).

    Args:
        token_losses: -log p of each clean token, in nats; its value where nothing is hidden does not matter.
        is_masked: which tokens were hidden.
        is_maskable: which could have been (the completion and its end-of-sequence padding, not the prompt).
        weight: the schedule's weight at each row's time, broadcast over its tokens, or any other.
        normalize: what the sum is divided by.
    """
    return normalize(torch.where(is_masked, token_losses * weight, 0.0), is_maskable)


def unweighted_mean(token_losses: TokenLosses, is_masked: Bool[Tensor, "n T"]) -> Parts:
    """Cross-entropy a hidden token without weights: the number to watch, steadier than the loss."""
    return torch.where(is_masked, token_losses, 0.0).sum(), is_masked.sum().to(token_losses.dtype)
