"""Run a model's program against its row's tests, walled off: see docs/sandbox.md for what holds and what does not.

Linux only. The work is done by sandbox_warden.py, a process of its own that is killed and started again whenever it
does not answer in time; nothing a model wrote is compiled or run in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from d1lit.errors import RunError

_WARDEN = Path(__file__).with_name("sandbox_warden.py")
_START_SECONDS = 30.0
_CLEAN_SECONDS = 0.8
_LONGEST_VERDICT = 65536


@dataclass(frozen=True)
class Limits:
    """What one process of a run may use."""

    seconds: float = 3.0
    """Wall clock of the program and all its tests; CPU time is held a little above it."""
    memory: int = 512 * 2**20
    """Address space, in bytes."""
    file_size: int = 4 * 2**20
    """Largest file, in bytes."""
    folder: int = 16 * 2**20
    """All files together, in bytes (where mounts can be made)."""
    files: int = 32
    """Open files."""
    processes: int = 1
    """Processes and threads, the program itself included."""

    def __post_init__(self) -> None:
        for key, least in (("seconds", 0.05), ("memory", 64 * 2**20), ("files", 8), ("processes", 1), ("folder", 4096)):
            if getattr(self, key) < least:
                raise ValueError(f"limits.{key}: {getattr(self, key)} is below {least}. Try: {least} or more")


@dataclass(frozen=True)
class Job:
    """A program and how it is tested."""

    program: str
    prompt: str
    """Code that the tests may use (imports, helpers); empty for none."""
    setup: str
    tests: tuple[str, ...]
    entry_point: str
    """Name of the function under test."""


@dataclass(frozen=True)
class Report:
    """What became of a run."""

    outcome: Literal["finished", "late", "broken"]
    """late: stopped at its time limit; broken: the row's own tests or the sandbox failed."""
    passed: int
    total: int
    detail: str = ""

    @property
    def all_passed(self) -> bool:
        """Whether every test passed."""
        return self.outcome == "finished" and self.passed == self.total


@dataclass(frozen=True)
class Protection:
    """Which walls stand on this machine."""

    processes: bool
    """Programs see, signal and outlive nothing outside."""
    network: bool
    files: bool
    """Only read-only libraries and the scratch folder exist."""
    user: bool
    """Programs run as a user that nobody else is."""
    calls: bool
    """The kernel refuses them sockets, other programs and what else sandbox_filter.py lists."""

    def line(self) -> str:
        """One line for a log."""
        names = {"processes": "own processes", "network": "no network", "files": "own files"}
        names |= {"user": "own user", "calls": "filtered system calls"}
        state = asdict(self)
        held = [text for key, text in names.items() if state[key]]
        missing = [text for key, text in names.items() if not state[key]]
        return f"sandbox: {', '.join(held) or 'limits only'}" + (f"; NOT: {', '.join(missing)}" if missing else "")


class SandboxError(RunError):
    """The sandbox cannot be set up, or lost its warden twice in a row."""


def _end(process: subprocess.Popen[bytes], link: socket.socket) -> None:
    link.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


class _Warden:
    """One warden process; serves one run at a time."""

    def __init__(self, limits: Limits, weak: bool, python: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            settings = json.dumps({"link": theirs.fileno(), "limits": asdict(limits), "weak": weak})
            self.process = subprocess.Popen(
                [python, "-I", "-S", str(_WARDEN), settings],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={},
                cwd="/",
            )
        self.owner, self.link, self.limits = os.getpid(), ours, limits
        self.close = weakref.finalize(self, _end, self.process, ours)
        hello = self._hello()
        if "error" in hello:
            self.close()
            cure = (
                "a machine or container that allows namespaces (docker run --cap-add SYS_ADMIN), or allow_weak=true "
                "as an ordinary user (docs/sandbox.md)"
            )
            raise SandboxError("sandbox", f"the walls cannot be built here ({hello['error']})", cure, "E704")
        self.protection = Protection(**hello)

    def _hello(self) -> dict[str, Any]:
        data, until = b"", time.monotonic() + _START_SECONDS
        while not data.endswith(b"\n"):
            part = self.link.recv(4096) if _readable([self.link], until) else b""
            if not part:
                self.close()
                cure = "running src/d1lit/rewards/sandbox_warden.py"
                raise SandboxError("sandbox", "the warden did not start", cure, "E704")
            data += part
        return json.loads(data)

    def run(self, job: Job) -> Report | None:
        """The report of one run, or None where the warden is gone."""
        reading, writing = os.pipe()
        tests = {"prompt": job.prompt, "setup": job.setup, "tests": job.tests, "entry_point": job.entry_point}
        files = [_in_memory(job.program), _in_memory(json.dumps(tests)), writing]
        start = time.monotonic()
        try:
            socket.send_fds(self.link, [b"1"], files)
        except OSError:
            os.close(reading)
            return None
        finally:
            for file in files:
                os.close(file)
        try:
            verdict = self._verdict(reading, start + self.limits.seconds)
        finally:
            os.close(reading)
        if not self._stopped():
            return None
        return self._report(verdict, job, time.monotonic() - start)

    def _verdict(self, reading: int, until: float) -> bytes | None:
        """What the tests' process wrote; None at the deadline. Only that process holds the other end."""
        data = b""
        while len(data) < _LONGEST_VERDICT:
            if not _readable([reading], until):
                return None
            part = os.read(reading, 4096)
            if not part:
                return data
            data += part
        return b""

    def _stopped(self) -> bool:
        """Have everything killed and removed; False where the warden does not say so in time."""
        try:
            self.link.sendall(b"0")
            return bool(_readable([self.link], time.monotonic() + _CLEAN_SECONDS) and self.link.recv(1))
        except OSError:
            return False

    def _report(self, verdict: bytes | None, job: Job, seconds: float) -> Report:
        total = len(job.tests)
        if verdict is None:
            return Report("late", 0, total, f"stopped after {seconds:.1f} s")
        if not verdict.endswith(b"\n"):
            return Report("broken", 0, total, "the tests ended without a verdict")
        result = json.loads(verdict)
        if result["broken"] is not None:
            return Report("broken", result["passed"], total, result["broken"])
        return Report("finished", result["passed"], total, result["failure"] or "")


def _readable(files: Sequence[Any], until: float) -> bool:
    return bool(select.select(files, [], [], max(until - time.monotonic(), 0.0))[0])


def _in_memory(text: str) -> int:
    file = os.memfd_create("d1lit")
    data = memoryview(text.encode("utf-8", "surrogatepass"))
    while data:
        data = data[os.write(file, data) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


class Sandbox:
    """Runs programs against tests; wardens start with the first run and serve the next ones too.

    Args:
        limits: of each process.
        allow_weak: run with resource limits alone where the machine allows no namespaces.
        force_weak: leave the namespaces out, whatever the machine allows (to test what limits alone do).
        workers: runs at a time; None for one a processor core.
        python: interpreter of the programs; the standard library is all they get.

    Raises:
        SandboxError: at the first run, where the walls cannot be built and `allow_weak` is not set.
    """

    def __init__(
        self,
        limits: Limits,
        allow_weak: bool = False,
        force_weak: bool = False,
        workers: int | None = None,
        python: str = sys.executable,
    ) -> None:
        self.limits, self.allow_weak, self.force_weak, self.python = limits, allow_weak, force_weak, python
        self.workers = workers or os.cpu_count() or 1
        self._idle: queue.LifoQueue[_Warden] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._all: weakref.WeakSet[_Warden] = weakref.WeakSet()
        atexit.register(self.close)

    def __getstate__(self) -> dict[str, Any]:
        names = ("limits", "allow_weak", "force_weak", "workers", "python")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def protection(self) -> Protection:
        """Which walls stand."""
        warden = self._take()
        self._idle.put(warden)
        return warden.protection

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the wardens."""
        return tuple(warden.process.pid for warden in self._all)

    def run(self, job: Job) -> Report:
        """Run one program; returns within the limit plus a second, with nothing left running."""
        for _ in range(2):
            warden = self._take()
            report = warden.run(job)
            if report is not None:
                self._idle.put(warden)
                return report
            warden.close()
        return Report("broken", 0, len(job.tests), "the warden was lost twice")

    def run_all(self, jobs: Sequence[Job]) -> list[Report]:
        """Run several programs, `workers` at a time; reports in the order of the jobs."""
        if len(jobs) < 2 or self.workers < 2:
            return [self.run(job) for job in jobs]
        with ThreadPoolExecutor(min(self.workers, len(jobs))) as pool:
            return list(pool.map(self.run, jobs))

    def close(self) -> None:
        """End the wardens; the next run starts new ones."""
        with contextlib.suppress(queue.Empty):
            while True:
                warden = self._idle.get_nowait()
                if warden.owner == os.getpid():
                    warden.close()
                else:
                    warden.close.detach()  # a forked copy must not end its parent's wardens

    def _take(self) -> _Warden:
        with contextlib.suppress(queue.Empty):
            while True:
                warden = self._idle.get_nowait()
                if warden.owner == os.getpid():
                    return warden
                warden.close.detach()
        warden = self._start()
        with self._lock:
            self._all.add(warden)
        return warden

    def _start(self) -> _Warden:
        if not hasattr(os, "memfd_create"):
            raise SandboxError("sandbox", "it needs Linux", "another task, or a Linux container", "E704")
        if self.force_weak:
            return _Warden(self.limits, True, self.python)
        try:
            return _Warden(self.limits, False, self.python)
        except SandboxError:
            if not self.allow_weak:
                raise
            return _Warden(self.limits, True, self.python)
