"""What the parts of a block sampler see, and the protocols they meet.

A sampler is put together from orthogonal parts: a proposal (which token), a confidence (how sure), a commit rule (which
positions are fixed now), a remask rule (which are hidden again), an edit rule (which are replaced) and a cache. Letters
as in d1lit.types; here n counts the rows of one network call, M the positions of the active block that may still be
masked (all of it, where an edit rule reads the standing ones too), c = n * M rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.types import Draws


@dataclass
class Memory:
    """What a part keeps from step to step: tensors [N W ...] by row and by place modulo W, zero to begin with."""

    width: int
    """W: the block length, or the completion's where a part looks beyond the block."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def read(self, name: str, rows: Int[Tensor, " n"], places: Int[Tensor, "n M"]) -> Float[Tensor, "n M ..."]:
        """What is kept at some places of some rows."""
        return self.tensors[name][rows[:, None], places % self.width]

    def write(
        self, name: str, rows: Int[Tensor, " n"], places: Int[Tensor, "n M"], value: Float[Tensor, "n M ..."]
    ) -> None:
        """Keep something there."""
        self.tensors[name][rows[:, None], places % self.width] = value.to(self.tensors[name].dtype)

    def forget(self, rows: Int[Tensor, " n"]) -> None:
        """Begin anew for some rows."""
        for tensor in self.tensors.values():
            tensor[rows] = 0


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
    """False where a token stands: with an edit rule it is read too; else a row has fewer masked positions than the
    widest, and the column only fills the rectangle."""
    completion_length: int
    step: int
    """Denoising step within the block."""
    num_steps: int
    """Denoising steps planned for the block."""
    quota: int | Int[Tensor, "n 1"] | None
    """Tokens to fix in this step, of each row where tokens were given; None where the predictions decide."""
    draws: Draws
    block_length: int = 1
    """Positions of a block, masked or not."""
    index: Int[Tensor, " n"] | None = None
    """Place of each row in the sampling call, by which `memory` is kept."""
    memory: Memory | None = None
    """What the sampler's memory keeps; None where there is no such part."""

    def recall(self, name: str) -> Float[Tensor, "n M ..."]:
        """What the memory keeps at the cells."""
        assert self.memory is not None and self.index is not None
        return self.memory.read(name, self.index, self.positions)

    def keep(self, name: str, value: Float[Tensor, "n M ..."]) -> None:
        """Put something into the memory at the cells."""
        assert self.memory is not None and self.index is not None
        self.memory.write(name, self.index, self.positions, value)

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
    order: Float[Tensor, " c"] | None = None
    """What the network's order head says of the positions; None without one."""


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
        """How many tokens each step fixes; None where the predictions decide, which costs a host read a step.

        Of a block on which tokens stand from the beginning, `block_length` is the number of its masks, perhaps 0.
        """
        ...

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """The positions to fix; scores are -inf where `cells.candidates` is False."""
        ...


# -------------------------------------------------------------------------------------------------- tokens hidden again


@dataclass(frozen=True)
class Standing:
    """The active block after a step's commits: what a remask rule looks at."""

    cells: Cells
    """All positions of the block; a candidate is one where a token stands."""
    confidence: Float[Tensor, "n M"]
    """The score each token was fixed with."""
    age: Int[Tensor, "n M"]
    """Steps since it was fixed: 0 for one of this step."""
    verified: Float[Tensor, "n M"] | None
    """Probability of each token that stood before this step, seen with its own position hidden; on request."""


@runtime_checkable
class RemaskRule(Protocol):
    """Which tokens of the block are hidden again, to be predicted anew."""

    @property
    def verifies(self) -> bool:
        """Whether it reads `verified`, for which every forward carries a hidden copy of the block."""
        ...

    @property
    def runs_all_steps(self) -> bool:
        """Whether a block goes on for its planned steps although nothing is masked any more."""
        ...

    def remask(self, standing: Standing) -> Bool[Tensor, "n M"]:
        """The tokens to hide again; none in the last planned step, or the block would not end."""
        ...


@runtime_checkable
class EditRule(Protocol):
    """Which standing tokens of the block are replaced by the one that the network now finds most probable."""

    @property
    def num_checks(self) -> int:
        """Most steps of a block with nothing masked, so that it ends; one that changes nothing is the last."""
        ...

    def select(self, probability: Float[Tensor, "n M"], differs: Bool[Tensor, "n M"]) -> Bool[Tensor, "n M"]:
        """The positions to replace, from the probability of the most probable token (the mask left out).

        `differs` is True where a token stands and is another one.
        """
        ...


@runtime_checkable
class StepMemory(Protocol):
    """A part that carries something from one denoising step to the next, and may change the logits by it."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it follows the positions behind the block too: then all masked positions are predicted."""
        ...

    def shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """Names of what it keeps at each position, and their shapes."""
        ...

    def __call__(self, logits: Float[Tensor, "n M V"], cells: Cells) -> Float[Tensor, "n M V"]:
        """The logits that the other parts see; reads and writes `cells.memory`."""
        ...
