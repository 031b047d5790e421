"""d1's sampling as it ran: Gumbel noise and confidence in bfloat16, where its code means float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.sampling.parts import Cells, Choice, Prediction
from d1lit.sampling.proposal import most_probable, tempered_logits

_STEPS = 2**8
"""Different uniform numbers below 1 that a generator of bfloat16 numbers gives (multiples of 2^-8)."""


@dataclass(frozen=True)
class HalfGumbel:
    """The arg-max of exp(logit) / (-ln u)^T with everything in bfloat16 (d1, arXiv 2504.12216, as its code ran).

    With 256 different uniform numbers the tail of the noise is cut off, and with eight bits of mantissa neighbouring
    logits tie: tokens are drawn from a law that is only near softmax(logits / T).
    Differs from the code: the mask token is never proposed.
    """

    def uniforms(self, cells: Cells, vocabulary: int) -> Float[Tensor, "n M V"]:
        """One number a cell and token."""
        return cells.uniform("proposal", (vocabulary,), torch.float32)

    def draw(self, prediction: Prediction, temperature: float, uniforms: Float[Tensor, "c ..."]) -> Choice:
        """A token a position; its log-probability is that of the exact law."""
        coarse = (uniforms * _STEPS).floor().div(_STEPS).bfloat16()
        # In logarithms, where nothing overflows; both factors are rounded as the quotient would have been.
        noise = (-coarse.log()).pow(temperature).log()
        keys = (prediction.logits.bfloat16() - noise).float()
        tokens = most_probable(keys, prediction.mask_token_id)
        logprobs = torch.log_softmax(tempered_logits(prediction.logits, temperature, prediction.mask_token_id), dim=-1)
        return Choice(tokens, logprobs.gather(1, tokens[:, None])[:, 0])


@dataclass(frozen=True)
class HalfTokenProbability:
    """softmax(logits) of the drawn token in bfloat16 (d1 as it ran): above 0.99 there are three different values."""

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
        """Probability of the drawn token at temperature 1, rounded; equal ones are fixed from left to right."""
        return prediction.probs.gather(1, choice.tokens[:, None])[:, 0].bfloat16().float()
