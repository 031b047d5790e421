"""Float32 copies of half-precision weights for an optimizer to move: steps that bfloat16 cannot hold add up there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

HALF = (torch.bfloat16, torch.float16)


class MasterWeights(Optimizer):
    """Any optimizer, moving float32 copies; the weights of the network are their rounding (arXiv 1710.03740).

    With eight bits of mantissa a weight of 0.02 does not feel a step of 3e-6. Weights in float32 or float64 are moved
    themselves.
    """

    def __init__(
        self, params: Iterable[tuple[str, Tensor]], optimizer: Callable[[Iterable[tuple[str, Tensor]]], Optimizer]
    ) -> None:
        """Copy the half-precision ones.

        Args:
            params: the network's trainable weights.
            optimizer: builds the one that moves the copies.
        """
        named = list(params)
        super().__init__(named, {})
        copies = [p.detach().float() if p.dtype in HALF else p for _, p in named]
        self.inner = optimizer((name, copy) for (name, _), copy in zip(named, copies, strict=True))
        own = {id(copy): p for (_, p), copy in zip(named, copies, strict=True)}
        # The groups are the inner ones with the network's weights in them: clipping reads their gradients.
        self.param_groups = [{**g, "params": [own[id(p)] for p in g["params"]]} for g in self.inner.param_groups]

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            yield from zip(outer["params"], inner["params"], strict=True)

    def _take_rates(self) -> None:
        """Schedules write their rates into the outer groups."""
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key not in ("params", "param_names")})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the copies by the network's gradients, at the groups' present rates, and round."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_rates()
        for weight, copy in self._pairs():
            if copy is not weight:
                copy.grad = None if weight.grad is None else weight.grad.to(copy.dtype)
        self.inner.step()
        for weight, copy in self._pairs():
            if copy is not weight:
                weight.copy_(copy)
                copy.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner state and the copies, in the order of the groups."""
        self._take_rates()
        copies = [None if copy is weight else copy for weight, copy in self._pairs()]
        return {**self.inner.state_dict(), "copies": copies}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the inner state and the copies."""
        copies = state_dict["copies"]
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "copies"})
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer.update({key: value for key, value in inner.items() if key not in ("params", "param_names")})
        for (weight, copy), stored in zip(self._pairs(), copies, strict=True):
            if copy is not weight:
                copy.copy_(stored)
