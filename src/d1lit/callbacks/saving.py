"""Checkpoints during training: every so many steps, every so many minutes, and at once when the run has to stop."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from d1lit.callbacks.guards import SkipNonFinite
from d1lit.checkpoint.folder import check_free_space
from d1lit.processes import first_decides


class SaveCheckpoints(Checkpoint):
    """Writes `folder/step_N` at optimizer steps, so that a resumed run repeats and misses nothing.

    Accumulated gradients are not in a checkpoint, so it always describes the state after a whole optimizer step. In the
    middle of an accumulation window nothing but Lightning's counters (and the experience a rollout leaves, which is
    drawn again) has moved since the last one; the counters of that step are kept and stored instead of the current
    ones. So the last step can be saved at any time, in the middle of a rollout too.

    A checkpoint that is due is written when the next batch begins: by then the step's scalars have been logged. What
    other callbacks do after the last step (a validation) belongs to that step, because Lightning does not take up a run
    of which no step is left: stopped within it, a run goes on from the checkpoint before.

    As a `Checkpoint` of Lightning's it takes the place of the default one and runs after all other callbacks, so that
    it saves what they have made of the step.

    Args:
        folder: the stage's checkpoint folder.
        every_n_steps: optimizer steps between checkpoints; None for none by steps.
        every_n_minutes: minutes between checkpoints; None for none by the clock.
    """

    def __init__(self, folder: Path | str, every_n_steps: int | None, every_n_minutes: float | None) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"callbacks.save.{name}: must be positive or null, got {value}. Try: null")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self._step = 0
        self._saved_step = 0
        self._saved_at = 0.0
        self._is_due = False
        self._is_writing = False
        self._is_over = False
        """Whether everything that belongs to the last step has been done."""
        self._loops: dict[str, Any] | None = None
        """Lightning's counters after optimizer step `_step`; None where a run could not go on from there."""

    def save_now(self, trainer: L.Trainer) -> Path | None:
        """Write the state after the last optimizer step, unless it is on the disk; all ranks call it together.

        Returns the folder, or None where there was nothing new or the disk refused (one line says so, and training may
        go on: the earlier checkpoints are untouched).
        """
        if self._loops is None or self._step == self._saved_step:
            return None
        # Between a step and our `on_train_batch_end` the weights are ahead of the counters.
        if self._step != trainer.global_step or (self._step == trainer.max_steps and not self._is_over):
            return None
        self._is_due = False
        self._saved_at = time.monotonic()
        self._saved_step = self._step  # also where rank 0 fails below: the others cannot know, and all must call alike
        for logger in trainer.loggers:
            try:
                logger.save()  # what the checkpoint has behind it must not be lost in a buffer
            except OSError as error:
                rank_zero_warn(f"the log up to step {self._step} is not written: {error}")
        path = self.folder / f"step_{self._step}"
        self._is_writing = True
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            rank_zero_warn(f"no checkpoint at step {self._step}: {error}")
            trainer.strategy.barrier()  # the other ranks wait at the end of their save_checkpoint
            return None
        finally:
            self._is_writing = False
        return path

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the counters of the last optimizer step in place of the current ones."""
        if self._is_writing:
            checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._loops)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from what is saved: nothing, or the checkpoint the run resumed from.

        Raises:
            OSError: if the disk has no room for a checkpoint, which would only be found at the first save.
        """
        first_decides(partial(self._check_room, pl_module))
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._is_due = self._is_over = False
        self._loops = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the counters after an optimizer step, and whether a checkpoint is due."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
        by_steps = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        self._is_due = self._is_due or by_steps or self._minutes_are_over(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint that fell due with the last optimizer step; after steps that were left out, later.

        What they failed on may be the weights: the two that are kept shall not both be those.
        """
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if self._is_due and not any(isinstance(guard, SkipNonFinite) and guard.in_a_row for guard in callbacks):
            self.save_now(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The other callbacks have done what they do after the last step."""
        self._is_over = True

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last step of the stage."""
        self.save_now(trainer)

    def _check_room(self, module: L.LightningModule) -> None:
        trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        if self.every_n_steps is not None or self.every_n_minutes is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_free_space(self.folder / "step_0", 2 * trained)  # the weights, and a moment of each at the least

    def _minutes_are_over(self, trainer: L.Trainer) -> bool:
        if self.every_n_minutes is None:
            return False
        over = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(over))  # clocks differ; rank 0's counts
