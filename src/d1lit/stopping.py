"""Being asked to stop: what SIGTERM, SIGINT and SIGUSR1 leave behind, and the place in SLURM's queue.

Nothing heavy is imported: a signal may come while the libraries are being read.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what schedulers send some time before the end (`sbatch --signal=USR1@120`): stop and be queued again."""


class Interrupted(SystemExit):
    """The run was asked to stop; uncaught, the process ends with 128 + signal (143 for SIGTERM, 130 for SIGINT)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class StopFlag:
    """Remembers the first signal that asked this process to stop; the handler of training does nothing else."""

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
        with _handlers_as_before():
            self.install()
            yield self

    @contextmanager
    def preparing(self) -> Iterator[StopFlag]:
        """Handle the signals while nothing can be lost: SIGINT and SIGTERM end the process at once.

        SIGUSR1 waits for who asks the flag, as the place in the queue has to be asked for.
        """
        with _handlers_as_before():
            if threading.current_thread() is threading.main_thread():
                for signum in SIGNALS:
                    signal.signal(signum, self._receive_early)
            yield self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            # print() may not be called from a handler: the signal may have come within a print().
            os.write(2, f"{signal.Signals(signum).name}: stopping after a checkpoint\n".encode())

    def _receive_early(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            when = "once the run is prepared" if signum == signal.SIGUSR1 else "at once"
            os.write(2, f"{signal.Signals(signum).name}: stopping {when}\n".encode())
        if signum != signal.SIGUSR1:
            raise Interrupted(signum)


@contextmanager
def _handlers_as_before() -> Iterator[None]:
    """The handlers that a context sets go with it."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(signum, handler)


@contextmanager
def requeued() -> Iterator[None]:
    """Whatever SIGUSR1 ends within the context, training or not, the first process asks for a place in the queue."""
    try:
        yield
    except Interrupted as end:
        from d1lit.processes import is_first

        if end.signum == signal.SIGUSR1 and is_first():
            requeue(os.environ)
        raise


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
        warnings.warn(f"SLURM job id {job!r} is not one; not queued again", stacklevel=2)
        return False
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"SLURM job {job} was not queued again: {error}", stacklevel=2)
        return False
    print(f"SLURM job {job} is queued again", file=sys.stderr, flush=True)
    return True
