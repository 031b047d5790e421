"""Leaving in good order: SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint and the right exit code."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn
from typing_extensions import override

from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.stopping import Interrupted, StopFlag


class StopOnSignal(L.Callback):
    """Ends training at the first safe point after a signal: checkpoint and exit code.

    Safe points are the start of every micro-batch; ranks agree on them, so a signal to one rank stops all. In a run of
    one process every pass of the network without gradients (rollout, old and reference log-probs, evaluation) is one as
    well: nothing such a pass does outlives it. What is saved is the state after the last optimizer step (see
    `SaveCheckpoints`). Further signals change nothing; Ctrl-\\ ends a process at once.

    Lightning's own handlers for SIGTERM and SLURM, which talk to other ranks and save from within the handler, are
    replaced while `fit` runs.

    Args:
        flag: one that several stages and evaluation share; None makes one for this callback.
    """

    def __init__(self, flag: StopFlag | None = None) -> None:
        self.flag = flag or StopFlag()
        self._hooks: list[Any] = []
        self._has_saved = False

    def should_stop(self) -> bool:
        """Whether a signal has come to this process."""
        return self.flag.should_stop()

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over from the handlers that Lightning has just set."""
        self._take_over(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over where there was no sanity check."""
        self._take_over(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A safe point."""
        self._stop_if_any_rank_was_asked(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A safe point: the next stage shall not begin."""
        self._stop_if_any_rank_was_asked(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """On the way out from within a pass of the network: the checkpoint."""
        self._remove_polls()
        if isinstance(exception, Interrupted):
            self._save(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the polls; Lightning has already put the earlier handlers back."""
        self._remove_polls()

    def _take_over(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flag.install()
        if not self._hooks and trainer.world_size == 1:
            # Every pass of a language model begins by looking up its tokens.
            lookups = [module for module in pl_module.modules() if isinstance(module, nn.Embedding)]
            self._hooks = [module.register_forward_pre_hook(self._poll_in_forward) for module in lookups]

    def _poll_in_forward(self, module: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            self.flag.raise_if_stopped()

    def _remove_polls(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _stop_if_any_rank_was_asked(self, trainer: L.Trainer) -> None:
        signum = self.flag.received or 0
        if trainer.world_size > 1:
            mine = torch.tensor(float(signum), device=trainer.strategy.root_device)
            signum = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if signum:
            self.flag.received = signum
            # Here and not in on_exception alone, which Lightning does not call in processes that it has forked.
            self._save(trainer)
            raise Interrupted(signum)

    def _save(self, trainer: L.Trainer) -> None:
        if self._has_saved:
            return
        self._has_saved = True
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, SaveCheckpoints):
                callback.save_now(trainer)
