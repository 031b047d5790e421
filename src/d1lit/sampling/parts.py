"""What the parts of a block sampler see, and the protocols they meet.

A sampler is put together from orthogonal parts: a proposal (which token), a confidence (how sure), a commit rule (which
positions are fixed now), a remask rule (which are given back) and a cache. Letters as in d1lit.types; here n counts the
rows of one network call, M the positions of the active block that may still be masked, c = n * M rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.types import Draws


@dataclass(frozen=True)
class Cells:
    """The positions looked at in one denoising step, and how to draw a random number for each of them.

    A number hangs on (row id, position, step within the block), so neither the batch a row is in nor the moment it
    entered it can move a draw. The position names the block: no two steps of a row share a number.
    """

    row_ids: Int[Tensor, " n"]
    positions: Int[Tensor, "n M"]
    """Place within the completion."""
    candidates: Bool[Tensor, "n M"]
    """False where a row has fewer masked positions than the widest row, and the column only fills the rectangle."""
    completion_length: int
    step: int
    """Denoising step within the block."""
    num_steps: int
    """Denoising steps planned for the block."""
    quota: int | None
    """Tokens to fix in this step; None where the commit rule decides from the predictions."""
    draws: Draws

    def uniform(
        self, stream: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n M ..."]:
        """A block of `shape` uniforms for each cell."""
        cells = self.row_ids[:, None] * self.completion_length + self.positions
        values = self.draws.uniform(stream, cells.flatten(), shape, step=self.step, dtype=dtype)
        return values.reshape(*cells.shape, *shape)


@dataclass(frozen=True)
class Prediction:
    """What the network says at some positions, after guidance."""

    logits: Float[Tensor, "c V"]
    probs: Float[Tensor, "c V"]
    """softmax(logits) at temperature 1, the mask token included."""
    mask_token_id: int


@dataclass(frozen=True)
class Choice:
    """A drawn token at each position."""

    tokens: Int[Tensor, " c"]
    logprobs: Float[Tensor, " c"]
    """Under the distribution the token was drawn from, which never holds the mask token."""


@runtime_checkable
class Proposal(Protocol):
    """How a token is drawn at temperature > 0; at temperature 0 every sampler takes the most probable one."""

    def uniforms(self, cells: Cells, vocabulary: int) -> Float[Tensor, "n M ..."]:
        """The random numbers of one step: one a cell, or one a cell and token."""
        ...

    def draw(self, prediction: Prediction, temperature: float, uniforms: Float[Tensor, "c ..."]) -> Choice:
        """A token a position from softmax(logits / temperature) without the mask token."""
        ...


@runtime_checkable
class Confidence(Protocol):
    """How sure the prediction is; the higher, the earlier a commit rule fixes the position."""

    def score(
        self,
        prediction: Prediction,
        choice: Choice,
        positions: Int[Tensor, " c"],
        uniforms: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, " c"]:
        """The score of each position."""
        ...

    def uniforms(self, cells: Cells) -> Float[Tensor, "n M"] | None:
        """One random number a cell where the score needs one."""
        ...


@runtime_checkable
class CommitRule(Protocol):
    """Which masked positions of the block are fixed in this step."""

    def quotas(self, block_length: int, num_steps: int) -> tuple[int, ...] | None:
        """How many tokens each step fixes; None where the predictions decide, which costs a host read a step."""
        ...

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """The positions to fix; scores are -inf where `cells.candidates` is False."""
        ...
