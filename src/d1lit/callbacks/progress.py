"""The progress of a stage on the console: a bar on a terminal; now and then a line elsewhere, and under NO_COLOR."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typing_extensions import override

SHOWN = {
    "rollout/reward": "reward",
    "rollout/length": "length",
    "train/loss": "loss",
    "train/kl": "kl",
    "guard/skipped": "skipped",
    "cost/forwards": "forwards",
}
"""Metrics that stand beside the bar, by their short names; those a stage does not have are left out."""


class ConsoleProgress(L.Callback):
    """Counts optimizer steps, with reward, loss and the time that is left."""

    def __init__(self, stage: str, num_updates: int, console: Console, seconds_between_lines: float = 10.0) -> None:
        self.stage = stage
        self.num_updates = num_updates
        self.console = console
        self.seconds_between_lines = seconds_between_lines
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._first_step = 0
        self._started = 0.0
        self._whole_cycles: tuple[int, float] = (0, 0.0)
        """Steps of the cycles that have ended, and the seconds they took."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._started = self._last_line = time.monotonic()
        self._first_step = trainer.global_step
        self._whole_cycles = (0, 0.0)
        if trainer.is_global_zero and self.console.is_terminal and not self.console.no_color:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=self.console)
            self._bar.add_task(self.stage, total=self.num_updates, completed=self._first_step, metrics="")
            self._bar.start()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move it."""
        if not trainer.is_global_zero:
            return
        done = trainer.global_step - self._first_step
        if done > self._whole_cycles[0] and done % getattr(pl_module, "num_inner_updates", 1) == 0:
            self._whole_cycles = (done, time.monotonic() - self._started)
        metrics = trainer.callback_metrics
        text = " ".join(f"{short} {float(metrics[name]):.3g}" for name, short in SHOWN.items() if name in metrics)
        if self._bar is not None:
            text += self._remaining(trainer)
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, metrics=text)
        elif time.monotonic() - self._last_line >= self.seconds_between_lines:
            self._last_line = time.monotonic()
            self.console.print(
                f"{self.stage}: {trainer.global_step}/{self.num_updates} {text}{self._remaining(trainer)}"
            )

    def _remaining(self, trainer: L.Trainer) -> str:
        """From whole cycles: the first update of a cycle waits for the rollout, the others do not."""
        done, seconds = self._whole_cycles
        if done == 0:
            return ""
        until_end = seconds / done * (self.num_updates - self._first_step)
        return f" ({_clock(max(0.0, self._started + until_end - time.monotonic()))} left)"

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close it."""
        self._close()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class RowsProgress:
    """Says now and then how many rows of an evaluation are done, and how long the others will take."""

    def __init__(self, name: str, say: Callable[[str], None], seconds_between_lines: float = 10.0) -> None:
        self.name = name
        self.say = say
        self.seconds_between_lines = seconds_between_lines
        self._last_line = time.monotonic()
        self._first: tuple[int, float] | None = None
        """Rows there after the first batch, some perhaps from an earlier attempt, and when that was."""

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` rows are there."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        elif now - self._last_line >= self.seconds_between_lines and done < total:
            self._last_line = now
            left = (now - self._first[1]) / (done - self._first[0]) * (total - done)
            self.say(f"{self.name}: {done}/{total} rows evaluated ({_clock(left)} left)")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole // 60 % 60} min"
