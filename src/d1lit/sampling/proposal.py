"""Token proposals: how a token is drawn from the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.sampling.parts import Cells, Choice, Prediction

_CHUNK = 512
"""Tokens summed together on the first level of the inverse CDF; about the square root of a large vocabulary."""


def most_probable(logits: Float[Tensor, "c V"], mask_token_id: int) -> Int[Tensor, " c"]:
    """The arg-max over all tokens but the mask token, leftmost on ties.

    Two reads of a view instead of a copy with -inf written into it: at a large vocabulary the copy is the cost. And
    `max` rather than `argmax`, which takes twice as long on a CPU and also gives the first of equal values.
    """
    vocabulary = logits.shape[-1]
    if mask_token_id >= vocabulary - 1:
        return logits[:, :mask_token_id].max(-1).indices
    if mask_token_id == 0:
        return logits[:, 1:].max(-1).indices + 1
    below, low = logits[:, :mask_token_id].max(-1)
    above, high = logits[:, mask_token_id + 1 :].max(-1)
    return torch.where(above > below, high + mask_token_id + 1, low)


def greedy(prediction: Prediction) -> Choice:
    """The most probable token, with its log-probability at temperature 1 among all tokens but the mask token."""
    tokens = most_probable(prediction.logits, prediction.mask_token_id)
    chosen = prediction.probs.gather(1, tokens[:, None])[:, 0]
    return Choice(tokens, chosen.log() - torch.log1p(-_mask_probability(prediction)))


def _mask_probability(prediction: Prediction) -> Float[Tensor, " c"]:
    """Probability of the mask token, kept below 1 so that its complement has a logarithm."""
    return prediction.probs[:, prediction.mask_token_id].clamp(max=1 - torch.finfo(prediction.probs.dtype).eps)


def tempered_logits(logits: Float[Tensor, "c V"], temperature: float, mask_token_id: int) -> Float[Tensor, "c V"]:
    """A fresh tensor of logits / temperature that never proposes the mask token."""
    scaled = logits / temperature
    scaled[:, mask_token_id] = -torch.inf
    return scaled


def _invert_cdf(probs: Float[Tensor, "c V"], uniforms: Float[Tensor, " c"]) -> Int[Tensor, " c"]:
    """The first token at which the running sum exceeds u times the total.

    Two levels (sums of chunks, then a running sum inside the chunk that was hit) read the vocabulary once and write
    nothing of its size; the short sums also round less than one long running sum.
    """
    rows, vocabulary = probs.shape
    size = min(_CHUNK, vocabulary)
    whole = vocabulary // size * size
    sums = probs[:, :whole].reshape(rows, -1, size).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], dim=1)
    running = sums.cumsum(-1)
    target = uniforms[:, None].to(probs.dtype) * running[:, -1:]
    # `right=True` skips empty chunks (and tokens of probability 0), which a target equal to a border would select.
    chunk = torch.searchsorted(running, target, right=True).clamp(max=sums.shape[1] - 1)
    rest = target - running.gather(1, chunk) + sums.gather(1, chunk)
    index = chunk * size + torch.arange(size, device=probs.device)
    inside = probs.gather(1, index.clamp(max=vocabulary - 1)).masked_fill(index >= vocabulary, 0.0)
    within = torch.searchsorted(inside.cumsum(-1), rest, right=True)
    # Rounding may push the target past the chunk's end: the last token of positive probability is meant then.
    last = (inside > 0).to(torch.int64).mul(torch.arange(1, size + 1, device=probs.device)).argmax(-1, keepdim=True)
    return (chunk * size + torch.minimum(within, last))[:, 0]


@dataclass(frozen=True)
class InverseCDF:
    """One uniform a position: the token at which the cumulative distribution passes it. Exact in law."""

    def uniforms(self, cells: Cells, vocabulary: int) -> Float[Tensor, "n M"]:
        """One number a cell, whatever the vocabulary."""
        return cells.uniform("proposal")

    def draw(self, prediction: Prediction, temperature: float, uniforms: Float[Tensor, "c ..."]) -> Choice:
        """A token a position from softmax(logits / temperature) without the mask token."""
        probs = torch.softmax(tempered_logits(prediction.logits, temperature, prediction.mask_token_id), dim=-1)
        tokens = _invert_cdf(probs, uniforms)
        return Choice(tokens, probs.gather(1, tokens[:, None])[:, 0].log())


@dataclass(frozen=True)
class Gumbel:
    """The arg-max of exp(logit) / (-ln u)^T with one uniform a token, as LLaDA's and d1's published samplers draw.

    Equal in law to InverseCDF and V times as many random numbers: for runs that replay stored uniforms.
    """

    double: bool
    """True: float64 (ML-GSAI/LLaDA); False: float32 (dllm-reasoning/d1, whose real runs fall to the model's dtype)."""

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the uniforms and of the scores."""
        return torch.float64 if self.double else torch.float32

    def uniforms(self, cells: Cells, vocabulary: int) -> Float[Tensor, "n M V"]:
        """One number a cell and token."""
        return cells.uniform("proposal", (vocabulary,), self.dtype)

    def scores(
        self, logits: Float[Tensor, "c V"], temperature: float, uniforms: Float[Tensor, "c V"]
    ) -> Float[Tensor, "c V"]:
        """exp(logit) / (-ln u)^T, in the published form."""
        return logits.to(self.dtype).exp() / (-uniforms.log()).pow(temperature)

    def draw(self, prediction: Prediction, temperature: float, uniforms: Float[Tensor, "c ..."]) -> Choice:
        """A token a position from softmax(logits / temperature) without the mask token."""
        # In logarithms: the same arg-max, and exp of a large logit cannot overflow.
        keys = prediction.logits.to(self.dtype) - temperature * (-uniforms.log()).log()
        tokens = most_probable(keys, prediction.mask_token_id)
        logprobs = torch.log_softmax(tempered_logits(prediction.logits, temperature, prediction.mask_token_id), dim=-1)
        return Choice(tokens, logprobs.gather(1, tokens[:, None])[:, 0])
