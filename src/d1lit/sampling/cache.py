"""Approximate rollouts: keys and values of a block's surroundings are computed once a block, not once a step.

The first step of a block runs the whole canvas; the later ones run a span of it and attend to stored keys and values
elsewhere. In a bidirectional network those are stale as soon as a token of the block changes, so the samples follow
another law than the exact sampler's: `approximation_nats` measures by how much. Fast-dLLM (arXiv 2505.22618), here
for whole batches: a finished row leaves its storage too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor


@runtime_checkable
class SpanStorage(Protocol):
    """Keys and values of a canvas, as a network takes them in `hidden(..., cache=...)`."""

    def at(self, start: int, stop: int) -> SpanStorage:
        """The same storage, for a forward of positions start .. stop - 1 that overwrites what they had stored."""
        ...

    def select(self, rows: Int[Tensor, " n"]) -> SpanStorage:
        """The storage of some rows."""
        ...


@runtime_checkable
class RolloutCache(Protocol):
    """Which part of the canvas the later steps of a block compute."""

    @property
    def storage(self) -> Callable[[], SpanStorage]:
        """Makes an empty storage, of the kind the network fills."""
        ...

    def span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Positions recomputed while the block start .. stop - 1 of a canvas of `length` is active."""
        ...


@dataclass(frozen=True)
class PrefixCache:
    """Everything before the block is stored; the block and the masks after it are recomputed."""

    storage: Callable[[], SpanStorage]

    def span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """From the block to the end of the canvas."""
        return start, length


@dataclass(frozen=True)
class DualCache:
    """Everything outside the block is stored, the masks after it included."""

    storage: Callable[[], SpanStorage]

    def span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The block alone."""
        return start, stop
