"""Guards of a run: updates that are not finite do not happen, and collapse is noticed while it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override


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
            raise ValueError(f"callbacks.max_in_a_row must be at least 1, got {max_in_a_row}")
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
            RuntimeError: after too many in a row, naming the rows of each.
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
            raise RuntimeError(
                f"{self.in_a_row} steps in a row, up to step {trainer.global_step}, had a loss or gradient that is not "
                f"finite; their rows: {rows}. Try: a smaller learning rate, or look at these rows"
            )

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


# ------------------------------------------------------------------------------------------------------------ collapse

Action = Literal["warn", "stop"]


@dataclass(frozen=True)
class Alarm:
    """A logged number and the bound it should keep.

    Args:
        metric: name under which it is logged ("rollout/zero_std_fraction").
        action: warn: one line; stop: end the run after this step with an error that says why.
        above: alarm when the number is greater.
        below: alarm when it is less.
        drop: alarm when it lies this much below its running mean.
        ratio: alarm when it is more than this many times its running mean.
        patience: logged values in a row that break the bound before the alarm sounds.
        memory: weight of the past in the running mean, per value.
        warmup: values before drop and ratio are looked at.
    """

    metric: str
    action: Action = "warn"
    above: float | None = None
    below: float | None = None
    drop: float | None = None
    ratio: float | None = None
    patience: int = 1
    memory: float = 0.9
    warmup: int = 10

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop"):
            raise ValueError(f"alarm on {self.metric}: action must be warn or stop, got {self.action!r}")
        if all(bound is None for bound in (self.above, self.below, self.drop, self.ratio)):
            raise ValueError(f"alarm on {self.metric}: has no bound; set above, below, drop or ratio")
        if self.patience < 1 or not 0 <= self.memory < 1:
            raise ValueError(f"alarm on {self.metric}: needs patience >= 1 and 0 <= memory < 1")

    def broken(self, value: float, mean: float, count: int) -> str | None:
        """Which bound the value breaks, given the running mean of `count` earlier ones."""
        if not math.isfinite(value):
            return "is not finite"
        if self.above is not None and value > self.above:
            return f"is above {self.above:g}"
        if self.below is not None and value < self.below:
            return f"is below {self.below:g}"
        if count < self.warmup:
            return None
        if self.drop is not None and value < mean - self.drop:
            return f"is more than {self.drop:g} below its running mean {mean:.4g}"
        if self.ratio is not None and value > self.ratio * mean:
            return f"is more than {self.ratio:g} times its running mean {mean:.4g}"
        return None


class CollapseAlarms(L.Callback):
    """Watches logged numbers for the ways a policy collapses: groups agree, reward falls, length or KL runs away.

    Each alarm sees the metric once an optimizer step, where the module has logged it.

    Args:
        alarms: what to watch.
    """

    def __init__(self, alarms: Iterable[Alarm]) -> None:
        self.alarms = tuple(alarms)
        self._state = {str(i): {"mean": 0.0, "count": 0, "in_a_row": 0} for i in range(len(self.alarms))}
        self._step = -1

    @override
    def state_dict(self) -> dict[str, Any]:
        """Running means go on after a resume."""
        return {"state": {key: dict(value) for key, value in self._state.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the running means up, as far as the alarms are still the same number."""
        self._state |= {key: value for key, value in state_dict["state"].items() if key in self._state}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the numbers of the step that has just ended (they are complete only now).

        Raises:
            RuntimeError: if an alarm with action stop sounds.
        """
        if trainer.global_step == self._step:
            return
        first, self._step = self._step < 0, trainer.global_step
        if first:
            return
        for key, alarm in enumerate(self.alarms):
            value = trainer.callback_metrics.get(alarm.metric)
            if value is not None:
                self._look(alarm, self._state[str(key)], float(value), trainer.global_step)

    def _look(self, alarm: Alarm, state: dict[str, Any], value: float, step: int) -> None:
        reason = alarm.broken(value, state["mean"], state["count"])
        state["in_a_row"] = state["in_a_row"] + 1 if reason else 0
        if math.isfinite(value):
            state["count"] += 1
            weight = max(1 / state["count"], 1 - alarm.memory)  # a plain mean at first, then an exponential one
            state["mean"] += weight * (value - state["mean"])
        if reason is None or state["in_a_row"] < alarm.patience:
            return
        state["in_a_row"] = 0
        message = f"alarm at step {step}: {alarm.metric} = {value:.4g} {reason} ({alarm.patience} in a row)"
        if alarm.action == "stop":
            raise RuntimeError(f"{message}; the checkpoints before it are in the stage's folder")
        rank_zero_warn(message)
