"""Accuracy and loss on validation rows while a stage runs, and the weights that were best on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from d1lit.models import Policy, save_weights

Measure = Callable[[Policy], dict[str, float]]


class Validate(L.Callback):
    """Every so many optimizer steps, generate the validation rows as in evaluation and log `val/...`.

    Of a module that has a `validation_loss` (SFT), that too, as `val/loss`.

    Validation rows are cut from train, so choosing weights by them leaves the test untouched. Rollouts draw from their
    own streams, so looking more often changes nothing of the training.

    Args:
        measure: the policy's numbers on the validation rows; `accuracy` decides which weights are best.
        folder: where the best weights are kept; None keeps none.
        every_n_steps: optimizer steps between two looks.
        batch_size: validation demonstrations that go through the network at a time.
    """

    def __init__(self, measure: Measure, folder: Path | None, every_n_steps: int, batch_size: int = 8) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.validation.every_n_steps: {every_n_steps} is below 1. Try: 1 or more")
        self.measure = measure
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.best: float | None = None
        self._looked_at = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best number so far goes on after a resume."""
        return {"best": self.best, "looked_at": self._looked_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self.best, self._looked_at = state_dict["best"], state_dict["looked_at"]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time."""
        step = trainer.global_step
        if step == self._looked_at or (step % self.every_n_steps and step != trainer.max_steps):
            return
        self._looked_at = step
        policy = pl_module.policy
        assert isinstance(policy, Policy)
        numbers = self.measure(policy)
        loss = getattr(pl_module, "validation_loss", lambda batch_size: None)(self.batch_size)
        if loss is not None:
            numbers = {**numbers, "loss": loss}
        pl_module.log_dict({f"val/{name}": value for name, value in numbers.items()}, rank_zero_only=True)
        if self.folder is not None and (self.best is None or numbers["accuracy"] > self.best):
            self.best = numbers["accuracy"]
            save_weights(policy, self.folder)
