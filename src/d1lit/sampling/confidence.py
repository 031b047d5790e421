"""Confidence scores: the higher, the earlier a position is fixed. Each is a rule of one or two lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.sampling.parts import Cells, Choice, Confidence, Prediction


@dataclass(frozen=True)
class TokenProbability:
    """softmax(logits) of the drawn token WITHOUT temperature: "low-confidence remasking" of LLaDA and d1.

    At temperature 0 it is the probability of the most probable token (Dream's maskgit_plus, Fast-dLLM).
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
        """Probability of the drawn token at temperature 1."""
        return prediction.probs.gather(1, choice.tokens[:, None])[:, 0]


@dataclass(frozen=True)
class SampledLogProb:
    """Log-probability of the drawn token under the distribution it was drawn from, temperature included."""

    def uniforms(self, cells: Cells) -> None:
        """Needs no random numbers of its own."""
        return None

    def score(
        self,
        prediction: Prediction,
        choice: Choice,
        positions: Int[Tensor, " c"],
        uniforms: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, " c"]:
        """What the proposal reported, in nats."""
        return choice.logprobs


@dataclass(frozen=True)
class Margin:
    """Difference of the two largest probabilities (Dream's topk_margin)."""

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
        """Top-1 minus top-2 probability at temperature 1."""
        top = prediction.probs.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]


@dataclass(frozen=True)
class NegativeEntropy:
    """Minus the entropy of the prediction at temperature 1, in nats (Dream's entropy)."""

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
        """sum p ln p."""
        return -torch.special.entr(prediction.probs).sum(-1)


@dataclass(frozen=True)
class Negated:
    """Another confidence with its sign turned: the least certain positions first, as a control.

    With `NegativeEntropy` it is what the KLASS repository's "entropy" baseline does, against its own comment.
    """

    confidence: Confidence

    def uniforms(self, cells: Cells) -> Float[Tensor, "n M"] | None:
        """The inner confidence's."""
        return self.confidence.uniforms(cells)

    def score(
        self,
        prediction: Prediction,
        choice: Choice,
        positions: Int[Tensor, " c"],
        uniforms: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, " c"]:
        """Minus the inner score."""
        return -self.confidence.score(prediction, choice, positions, uniforms)


@dataclass(frozen=True)
class RandomOrder:
    """A uniform number a position and step: "random remasking" of LLaDA."""

    def uniforms(self, cells: Cells) -> Float[Tensor, "n M"]:
        """One number a cell."""
        return cells.uniform("order")

    def score(
        self,
        prediction: Prediction,
        choice: Choice,
        positions: Int[Tensor, " c"],
        uniforms: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, " c"]:
        """The drawn number itself."""
        assert uniforms is not None
        return uniforms


@dataclass(frozen=True)
class LeftToRight:
    """Minus the position: the leftmost masked tokens first, as an autoregressive model decodes."""

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
        """Minus the place within the completion."""
        return -positions.to(prediction.probs.dtype)


@dataclass(frozen=True)
class PlackettLuce:
    """Another confidence with Gumbel noise: the order is drawn from softmax(confidence / temperature), one by one.

    Descending keys ARE a Plackett-Luce order without replacement, so the recorded confidence, sorted within a step,
    gives back the drawn order. Dream's alg_temp is this with Dream's schedule.
    """

    confidence: Confidence
    temperature: float
    """Of the order, not of the tokens; towards 0 the order becomes that of the confidence."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"sampler.confidence.temperature: {self.temperature} must be above 0."
                " Try: the inner confidence alone for a fixed order."
            )

    def uniforms(self, cells: Cells) -> Float[Tensor, "n M"]:
        """One number a cell."""
        return cells.uniform("order")

    def score(
        self,
        prediction: Prediction,
        choice: Choice,
        positions: Int[Tensor, " c"],
        uniforms: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, " c"]:
        """The Gumbel key of each position."""
        assert uniforms is not None
        scores = self.confidence.score(prediction, choice, positions, None)
        return scores / self.temperature - (-uniforms.log()).log()
