"""Masked cross-entropy for supervised training, and the ways its sum is normalised.

Like the aggregations of policy losses, a normalisation divides by GLOBAL counts, so that the shares of all
micro-batches and ranks add up to the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TokenLosses = Float[Tensor, "n T"]
Normalization = Callable[[TokenLosses, Bool[Tensor, "n T"], float | int, float | int], Float[Tensor, ""]]


def per_target_token(
    losses: TokenLosses, is_target: Bool[Tensor, "n T"], num_targets: float | int, num_rows: float | int
) -> Float[Tensor, ""]:
    """Over all tokens that could have been hidden, end-of-sequence padding included (d1, arXiv 2504.12216).

    d1 writes the count as tokens of the batch minus prompt tokens.
    """
    return losses.sum() / num_targets


def per_row(
    losses: TokenLosses, is_target: Bool[Tensor, "n T"], num_targets: float | int, num_rows: float | int
) -> Float[Tensor, ""]:
    """Each row over its own answer length, then the mean of the rows (LLaDA's guide, arXiv 2502.09992)."""
    return (losses.sum(1) / is_target.sum(1).clamp(min=1)).sum() / num_rows


def batch_mean(
    losses: TokenLosses, is_target: Bool[Tensor, "n T"], num_targets: float | int, num_rows: float | int
) -> Float[Tensor, ""]:
    """The sum of each row, then the mean of the rows: a bound on nats a sequence."""
    return losses.sum() / num_rows


@dataclass(frozen=True)
class MaskedCrossEntropy:
    """Cross-entropy of the hidden tokens, each times its weight (LLaDA, arXiv 2502.09992, and d1, arXiv 2504.12216)."""

    normalize: Normalization
    """What the sum is divided by: `per_target_token` (d1), `per_row` (LLaDA) or `batch_mean`."""

    def __call__(
        self,
        nll: TokenLosses,
        weight: Float[Tensor, " n"] | Float[Tensor, "n T"],
        is_masked: Bool[Tensor, "n T"],
        is_target: Bool[Tensor, "n T"],
        num_targets: float | int,
        num_rows: float | int,
    ) -> Float[Tensor, ""]:
        """This micro-batch's share of the loss.

        Args:
            nll: -log p of each clean token, in nats; its value where nothing is hidden does not matter.
            weight: the schedule's weight at each row's time, or one for each token (CART).
            is_masked: which tokens were hidden.
            is_target: which could have been: the completion with its padding, not the prompt.
            num_targets: targets in the global batch.
            num_rows: rows in the global batch.
        """
        weight = weight[:, None] if weight.ndim == 1 else weight
        return self.normalize(torch.where(is_masked, nll * weight, 0.0), is_target, num_targets, num_rows)
