"""The guard of every update: one that is not finite does not happen, on any process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from d1lit.errors import RunError
from d1lit.processes import all_gather_objects

_MOST_NAMES = 16
"""Rows of a step that its line names; the rest it counts."""


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

    The rows are those that the module calls `row_names`: of the micro-batches whose loss is bad, on any rank; of the
    whole step where only a gradient is.

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
        self._window: list[tuple[Tensor, Sequence[str]]] = []
        """Of each micro-batch since the last step: whether its loss is bad, and its rows."""
        self._bad_rows: list[str] = []
        """The rows of each step of the present streak."""

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counters go on after a resume."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "bad_rows": list(self._bad_rows)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters up."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._bad_rows = [str(rows) for rows in state_dict["bad_rows"]]

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note a loss that is not finite, even if its gradient should be, and whose it is."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._window.append((bad, getattr(pl_module, "row_names", ())))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Decide for all ranks, and take the gradients away if the step must not happen.

        Raises:
            RunError: after too many in a row, naming the rows of each.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        bad = ~gradients_are_finite(parameters).to(pl_module.device)
        window, self._window = self._window, []
        for loss_is_bad, _ in window:
            bad = bad | loss_is_bad.to(bad.device)
        if not bool(trainer.strategy.reduce(bad.float(), reduce_op="max")):
            self.in_a_row, self._bad_rows = 0, []
            return
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        self._bad_rows.append(named(bad_rows(window)))
        rank_zero_warn(
            f"step {trainer.global_step} left out: its loss or gradient is not finite (rows {self._bad_rows[-1]})"
        )
        if self.in_a_row >= self.max_in_a_row:
            rows = "; ".join(dict.fromkeys(self._bad_rows))  # inner updates of one rollout have the same
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


def bad_rows(window: Sequence[tuple[Tensor, Sequence[str]]]) -> list[str]:
    """The rows of the micro-batches whose loss is bad, on all ranks; those of all, where no loss is. All ranks call."""
    mine = [(bool(bad), list(names)) for bad, names in window]
    everyone = [micro for rank in all_gather_objects(mine) for micro in rank]
    hit = [names for bad, names in everyone if bad] or [names for _, names in everyone]
    return list(dict.fromkeys(name for names in hit for name in names))


def named(rows: Sequence[str]) -> str:
    """Rows for a line that a person reads."""
    more = len(rows) - _MOST_NAMES
    return ", ".join(rows[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
