"""Accuracy and loss on validation rows while a stage runs, and the weights that were best on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from d1lit.checkpoint import put_whole
from d1lit.models import Policy, save_weights
from d1lit.models.sharding import gathered_parameters

Measure = Callable[[Policy], dict[str, float]]


class Validate(L.Callback):
    """Every so many optimizer steps, generate the validation rows as in evaluation and log `val/...`.

    Of a module that has a `validation_loss` (SFT), that too, as `val/loss`.

    Validation rows are cut from train, so choosing weights by them leaves the test untouched. Rollouts draw from their
    own streams, so looking more often changes nothing of the training. Sharded parameters are gathered once for a look,
    for processes generate for different times.

    A look after N optimizer steps is logged at N, and it is taken when the next batch begins: it belongs to what comes
    after the checkpoint of step N. A run that goes on from that checkpoint looks again, and its logs are cut off at N.
    Only the look after the last step has no batch to wait for, and comes before that step's checkpoint.

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
        self.looked_at = 0
        """Optimizer steps done at the last look; 0 before the first one of this process."""

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best number so far goes on after a resume."""
        return {"best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self.best = state_dict["best"]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the weights of the step that has just ended, if it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the last weights in any case."""
        if trainer.global_step == trainer.max_steps:
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self.looked_at:
            return
        policy = pl_module.policy
        with gathered_parameters(policy):  # pyright: ignore[reportArgumentType] (every stage's module has a Policy)
            numbers = self.measure(policy)  # pyright: ignore[reportArgumentType]
            loss = getattr(pl_module, "validation_loss", lambda batch_size: None)(self.batch_size)
        if loss is not None:
            numbers = {**numbers, "loss": loss}
        if self.folder is not None and (self.best is None or numbers["accuracy"] > self.best):
            self.best = numbers["accuracy"]
            put_whole(self.folder, partial(save_weights, policy))  # pyright: ignore[reportArgumentType]
        named = {f"val/{name}": value for name, value in numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step)
            logger.save()
        # Where alarms and the console look; Lightning's own way there logs at another step.
        trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in named.items()})
        self.looked_at = step
