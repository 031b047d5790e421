"""Leaving in good order: SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint and the right exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from d1lit.callbacks.saving import SaveCheckpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what schedulers send some time before the end (`sbatch --signal=USR1@120`): stop and be queued again."""


class Interrupted(SystemExit):
    """The run was asked to stop; uncaught, the process ends with 128 + signal (143 for SIGTERM, 130 for SIGINT)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class StopFlag:
    """Remembers the first signal that asked this process to stop. The handler does nothing else."""

    def __init__(self) -> None:
        self.received: int | None = None

    def should_stop(self) -> bool:
        """Whether a signal has come; cheap enough for any loop."""
        return self.received is not None

    def raise_if_stopped(self) -> None:
        """For loops without side effects outside a trainer (evaluation of a finished run, say).

        Raises:
            Interrupted: if a signal has come.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def install(self) -> None:
        """Become the handler of the three signals; a no-op outside the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._receive)

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        """Handle the signals within the context, and leave the handlers as they were."""
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.install()
        try:
            yield self
        finally:
            for signum, handler in before.items():
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            # print() may not be called from a handler: the signal may have come within a print().
            os.write(2, f"{signal.Signals(signum).name}: stopping after a checkpoint\n".encode())


class StopOnSignal(L.Callback):
    """Ends training at the first safe point after a signal: checkpoint, exit code, and on SLURM a place in the queue.

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
        """On the way out from within a pass of the network: the checkpoint, then the queue."""
        self._remove_polls()
        if isinstance(exception, Interrupted):
            self._save_and_requeue(trainer, exception.signum)

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
            self._save_and_requeue(trainer, signum)
            raise Interrupted(signum)

    def _save_and_requeue(self, trainer: L.Trainer, signum: int) -> None:
        if self._has_saved:
            return
        self._has_saved = True
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, SaveCheckpoints):
                callback.save_now(trainer)
        if signum == signal.SIGUSR1 and trainer.is_global_zero:
            requeue(os.environ)


def requeue(environment: Mapping[str, str]) -> bool:
    """Ask SLURM to queue this job again; False, and a line where it should have worked, if that did not happen.

    Under submitit nothing is asked: it does so itself when the job has ended, and counts how often.
    """
    if "SUBMITIT_EXECUTOR" in environment:
        return False
    job = environment.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    if job is None:
        return False
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        rank_zero_warn(f"SLURM job id {job!r} is not one; not queued again")
        return False
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        rank_zero_warn(f"SLURM job {job} was not queued again: {error}")
        return False
    rank_zero_info(f"SLURM job {job} is queued again")
    return True
