"""math-verify in a process that can be killed: a deadline holds even when its C code hears no signal.

Timeouts by SIGALRM fail in threads (every reward silently 0) and inside one long C call (sympy's big powers); pools
wait for ever for a worker that never comes back. A process of its own, killed and forked anew, has neither fault.

A reward must not depend on how busy the machine is. So the deadline counts the worker's processor time, and the kernel
ends the worker there. Beside it stands a far longer limit by the clock, for a worker that waits instead of working.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from d1lit.types import Verdict

_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0
_PATIENCE = 15.0
"""The clock's limit in deadlines, unless told otherwise: a machine may be this many times too busy."""


class _Died(Exception):
    """The serving child ended before it answered; another one is up."""


class _Gone(Exception):
    """The whole worker ended."""


class _Late(Exception):
    """The deadline ended the comparison; the next child is up."""


class _Silent(Exception):
    """No word from the worker until the clock's limit."""


def _end(process: subprocess.Popen[bytes], link: socket.socket) -> None:
    """Close the link and kill the worker's whole process group."""
    link.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


class _Worker:
    """One running worker process and the link to its serving child."""

    def __init__(self, seconds: float, memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", str(_WORKER), str(theirs.fileno()), str(seconds), str(memory)]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.owner = os.getpid()
        self.link = ours
        self.buffer = b""
        self.child = 0
        self.close = weakref.finalize(self, _end, self.process, ours)
        self.await_child(time.monotonic() + _START_SECONDS)

    def _read(self, until: float) -> dict[str, Any]:
        """The next well-formed line. Raises _Silent or _Gone."""
        while True:
            line, newline, rest = self.buffer.partition(b"\n")
            if newline:
                self.buffer = rest
                with contextlib.suppress(ValueError):
                    return json.loads(line)
                continue
            ready, _, _ = select.select([self.link], [], [], max(until - time.monotonic(), 0.0))
            if not ready:
                raise _Silent
            try:
                received = self.link.recv(65536)
            except OSError as error:
                raise _Gone from error
            if not received:
                raise _Gone
            self.buffer += received

    def await_child(self, until: float) -> None:
        """Wait for a child that serves."""
        while True:
            message = self._read(until)
            if "pid" in message:
                self.child = message["pid"]
                return

    def kill_child(self) -> None:
        """Kill the serving child; the next question waits for the next child."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        self.child = 0

    def ask(self, number: int, gold: str, answer: str, until: float) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises _Died, _Late, _Silent or _Gone."""
        if not self.child:
            self.await_child(time.monotonic() + _START_SECONDS)
        try:
            self.link.sendall(json.dumps({"id": number, "gold": gold, "answer": answer}).encode() + b"\n")
        except OSError as error:
            raise _Gone from error
        while True:
            message = self._read(until)
            if "pid" in message:
                self.child = message["pid"]
                raise _Late if message["was_late"] else _Died
            if message.get("id") == number:
                return message


class MathVerify:
    """Equality of two mathematical expressions by math-verify (github.com/huggingface/Math-Verify), within a deadline.

    The worker starts with the first call. One that dies is replaced and the request repeated once within the same
    limit of the clock. Differs from the library's defaults: 12 decimals must agree, not 6.

    Args:
        seconds: deadline of one comparison, in seconds of the worker's processor time.
        memory: address space of the worker, in bytes.
        wall_seconds: limit of one comparison by the clock; None for 15 times `seconds`.

    Raises:
        ValueError: limits that cannot hold.
    """

    def __init__(self, seconds: float = 2.0, memory: int = 2 * 2**30, wall_seconds: float | None = None) -> None:
        self.seconds = seconds
        self.memory = memory
        self.wall_seconds = _PATIENCE * seconds if wall_seconds is None else wall_seconds
        if not 0.0 < seconds <= self.wall_seconds:
            raise ValueError(
                f"seconds: {seconds} of processor time do not fit into {self.wall_seconds} s. "
                "Try: 0 < seconds <= wall_seconds"
            )
        self._worker: _Worker | None = None
        self._number = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "memory": self.memory, "wall_seconds": self.wall_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def pids(self) -> tuple[int, ...]:
        """Ids of the worker's processes: the parent and its serving child; empty before the first call."""
        return (self._worker.process.pid, self._worker.child) if self._worker else ()

    def start(self) -> None:
        """Start the worker now, so that no comparison pays for it."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the worker; the next call starts another."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._worker is not None:
            if self._worker.owner == os.getpid():
                self._worker.close()
            else:
                self._worker.close.detach()  # a forked copy must not kill its parent's worker
            self._worker = None

    def _running(self) -> _Worker:
        if self._worker is None or self._worker.owner != os.getpid():
            self._drop()
            self._worker = _Worker(self.seconds, self.memory)
        return self._worker

    def __call__(self, gold: str, answer: str) -> Verdict:
        """1 or 0 with outcome "ok"; 0 with "unparsed" where the answer is no mathematics.

        Where the judge failed, or could not read the gold answer: 0 with "timeout" or "error".
        """
        with self._lock:
            return self._judge(gold, answer)

    def _judge(self, gold: str, answer: str) -> Verdict:
        until: float | None = None
        for _ in range(2):
            try:
                worker = self._running()
                until = until or time.monotonic() + self.wall_seconds
                self._number += 1
                message = worker.ask(self._number, gold, answer, until)
            except _Died:
                continue
            except _Gone:
                self._drop()
                until = None  # starting anew is no part of the comparison
                continue
            except _Late:
                return Verdict(0.0, "timeout", answer)
            except _Silent:
                self._kill_child()
                return Verdict(0.0, "timeout", answer)
            if "equal" in message:
                return Verdict(float(message["equal"]), "ok", answer)
            if message.get("unread") == "answer":
                return Verdict(0.0, "unparsed", answer)
            return Verdict(0.0, "error", answer)
        return Verdict(0.0, "error", answer)

    def _kill_child(self) -> None:
        if self._worker is None or not self._worker.child:
            self._drop()  # not even a child came up in time
        else:
            self._worker.kill_child()
