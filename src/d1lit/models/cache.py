"""Keys and values of a whole canvas, for the approximate samplers that recompute only a span of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """What every block saw of the canvas the last time it was computed; handed to `hidden` as `cache`.

    `KVCache()` without a span is filled by a forward of the whole canvas. `cache.at(start, stop)` shares its storage
    and says that the ids of the next forward stand at canvas positions start .. stop - 1: their keys and values
    overwrite the old ones, and their queries attend to the whole canvas. With span = (block start, end of canvas) this
    is the prefix cache and with span = the block the dual cache of Fast-dLLM (arXiv 2505.22618). Keys are kept after
    the rotary embedding: positions of a canvas do not move.
    """

    span: tuple[int, int] | None = None
    keys: dict[int, Float[Tensor, "R H T E"]] = field(default_factory=dict)
    values: dict[int, Float[Tensor, "R H T E"]] = field(default_factory=dict)
    canvas: dict[str, Tensor] = field(default_factory=dict)
    """The ids, attention and positions of the last full forward; a shifted model needs the token before the span."""

    def at(self, start: int, stop: int) -> KVCache:
        """The same storage with the span start .. stop - 1."""
        if not self.keys:
            raise ValueError("cache: a span needs a cache that a forward of the whole canvas has filled")
        return replace(self, span=(start, stop))

    def select(self, rows: Int[Tensor, " n"] | Bool[Tensor, " R"]) -> KVCache:
        """A cache of some rows only, for when the others are finished."""
        return KVCache(
            self.span,
            {layer: tensor[rows] for layer, tensor in self.keys.items()},
            {layer: tensor[rows] for layer, tensor in self.values.items()},
            {name: tensor[rows] for name, tensor in self.canvas.items()},
        )

    def update(
        self, layer: int, keys: Float[Tensor, "R H Q E"], values: Float[Tensor, "R H Q E"]
    ) -> tuple[Float[Tensor, "R H T E"], Float[Tensor, "R H T E"]]:
        """Store the span's keys and values of one block and return those of the whole canvas."""
        if self.span is None:
            self.keys[layer], self.values[layer] = keys.detach(), values.detach()
            return keys, values
        start, stop = self.span
        self.keys[layer][:, :, start:stop] = keys.detach()
        self.values[layer][:, :, start:stop] = values.detach()
        return self.keys[layer], self.values[layer]

    def remember(self, ids: Int[Tensor, "R T"], position_ids: Int[Tensor, "R T"] | None) -> None:
        """Keep the ids and positions of a forward of the whole canvas."""
        self.canvas["ids"] = ids.clone()
        self.canvas.pop("position_ids", None)
        if position_ids is not None:
            self.canvas["position_ids"] = position_ids

    def write_ids(self, start: int, ids: Int[Tensor, "R Q"]) -> None:
        """Keep the remembered canvas in step with the ids of a span."""
        torch.narrow(self.canvas["ids"], 1, start, ids.shape[1]).copy_(ids)
