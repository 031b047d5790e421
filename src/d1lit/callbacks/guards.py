"""The guard of every update: one that is not finite does not happen, on any process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from d1lit.errors import RunError


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Whether every gradient on this rank is finite: a boolean scalar tensor, without a wait for the device."""
    verdicts = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            verdicts.append(torch.isfinite(local).all())
    return torch.stack(verdicts).all() if verdicts else torch.tensor(True)


class SkipNonFinite(L.Callback):
    """Leaves out optimizer steps whose loss or gradient is not finite, on all ranks alike.

    A gradient of None is what torch's optimizers pass over: no decay, no momentum, no step count. So taking the
    gradients away before the step leaves weights and optimizer state as they are, bit for bit. Lightning's own counters
    go on (the data order and the learning-rate schedule are functions of them). A module that finds nothing to learn
    from (no valid token) returns a loss of nan; the step is then skipped by the same rail.

    `guard/skipped` counts the steps left out since the run began.

    Args:
        max_in_a_row: skipped steps in a row that end the run.
    """

    def __init__(self, max_in_a_row: int = 5) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"callbacks.max_in_a_row: must be at least 1, got {max_in_a_row}. Try: 5")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        self._loss_is_bad: Tensor | None = None
        self._rows: list[int] = []
        self._bad_rows: list[list[int]] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counters go on after a resume."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "rows": self._rows, "bad_rows": self._bad_rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters up."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._rows, self._bad_rows = state_dict["rows"], state_dict["bad_rows"]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rows, to name them should the step fail. An inner update has those of its rollout."""
        self._rows = row_ids(batch) or self._rows

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note a loss that is not finite, even if its gradient should be."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._loss_is_bad = bad if self._loss_is_bad is None else self._loss_is_bad | bad

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Decide for all ranks, and take the gradients away if the step must not happen.

        Raises:
            RunError: after too many in a row, naming the rows of each.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        bad = ~gradients_are_finite(parameters).to(pl_module.device)
        if self._loss_is_bad is not None:
            bad = bad | self._loss_is_bad.to(bad.device)
        self._loss_is_bad = None
        if not bool(trainer.strategy.reduce(bad.float(), reduce_op="max")):
            self.in_a_row, self._bad_rows = 0, []
            return
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        self._bad_rows.append(self._rows)
        rank_zero_warn(f"step {trainer.global_step} left out: its loss or gradient is not finite (rows {self._rows})")
        if self.in_a_row >= self.max_in_a_row:
            rows = "; ".join(str(rows) for rows in self._bad_rows)
            cause = (
                f"{self.in_a_row} steps in a row, up to step {trainer.global_step}, had a loss or gradient that is not "
                f"finite; their rows: {rows}"
            )
            raise RunError("train/loss", cause, "a smaller learning rate, or look at these rows", "E701")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the count."""
        pl_module.log("guard/skipped", float(self.skipped), batch_size=1)


def row_ids(batch: Any) -> list[int]:
    """The integers named `row_ids` anywhere in a batch of dataclasses, dictionaries, lists and tuples."""
    if is_dataclass(batch):
        batch = {field.name: vars(batch)[field.name] for field in fields(batch)}
    if isinstance(batch, Mapping):
        own = batch.get("row_ids")
        if isinstance(own, Tensor):
            return own.tolist()
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [row for item in batch for row in row_ids(item)]
    return []
