"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Matrices learn by Muon (Jordan et al., github.com/KellerJordan/Muon), the rest by AdamW.

    Muon is meant for the matrices of the blocks; embedding and head are tables of vectors and go to AdamW. Both
    optimizers share the learning-rate schedule, each from its own rate.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float,
        matrix_lr: float,
        betas: Sequence[float],
        weight_decay: float,
    ) -> None:
        everything = list(params)
        matrices = [(name, p) for name, p in everything if p.ndim == 2 and ".layers." in name]
        rest = [(name, p) for name, p in everything if not (p.ndim == 2 and ".layers." in name)]
        super().__init__(everything, {})
        self.muon = Muon(matrices, lr=matrix_lr, weight_decay=weight_decay)
        self.adamw = AdamW(rest, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of both."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
