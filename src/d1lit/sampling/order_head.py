"""The order by a trained head instead of by how sure the predictions are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.sampling.parts import Cells, Choice, Prediction


@dataclass(frozen=True)
class OrderScore:
    """What the network's order head says of each position (LLaDOU, arXiv 2505.10446), whatever token was drawn there.

    `PlackettLuce(OrderScore(), temperature=1)` draws the order from it, as the paper does and as
    `estimators.learned_order` scores it. A network without a head scores every position 0, as a fresh head does.
    """

    def uniforms(self, cells: Cells) -> None:
        """Needs no random numbers."""
        return None

    def score(
        self,
        prediction: Prediction,
        choice: Choice,
        positions: Int[Tensor, " c"],
        uniforms: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, " c"]:
        """The score, in nats up to a constant of the step."""
        if prediction.order is None:
            return torch.zeros_like(choice.logprobs)
        return prediction.order
