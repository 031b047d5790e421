"""Killed, asked to stop, resumed: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.callbacks.signals import Interrupted, StopFlag, requeue
from d1lit.checkpoint import list_checkpoints, verify

WORKER = Path(__file__).parent / "interruption_worker.py"
SLEEP = 0.001
"""Seconds a pass of the network takes at least, so that a run is long enough to be hit."""


class Runs:
    """Starts runs in a process that has imported everything once, and kills them."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == "ready"

    def start(self, folder: Path, **settings: Any) -> int:
        """The process id of a fresh run."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({"folder": str(folder), "sleep": SLEEP} | settings) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Its exit code, negative for a signal that killed it."""
        return int(self._answer())

    def run(self, folder: Path, **settings: Any) -> int:
        """From start to end without disturbance."""
        self.start(folder, **settings)
        return self.wait()

    def _answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    served = Runs()
    yield served
    served.close()


class Reference:
    """The undisturbed run."""

    def __init__(self, runs: Runs, folder: Path) -> None:
        start = time.monotonic()
        assert runs.run(folder) == 0
        self.seconds = time.monotonic() - start
        self.final = (folder / "final.json").read_text()
        self.scalars = (folder / "scalars.jsonl").read_text()


@pytest.fixture(scope="module")
def reference(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(runs, tmp_path_factory.mktemp("reference"))


def test_the_undisturbed_run_has_every_scalar_once(reference: Reference) -> None:
    lines = [json.loads(line) for line in reference.scalars.splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(24))
    assert [line["step"] for line in lines if "val/loss" in line] == list(range(2, 24, 3))


def interrupt(runs: Runs, folder: Path, rng: random.Random, seconds: float, signum: int) -> list[int]:
    """Start a run again and again, each time with a signal at a random moment, until it ends by itself."""
    codes = []
    while not codes or codes[-1] != 0:
        pid = runs.start(folder)
        time.sleep(rng.uniform(0, seconds))
        if not (folder / "final.json").exists():
            os.kill(pid, signum)
        codes.append(runs.wait())
        assert len(codes) < 100
    return codes


def check_same(folder: Path, reference: Reference) -> None:
    assert json.loads((folder / "final.json").read_text()) == json.loads(reference.final)
    assert (folder / "scalars.jsonl").read_text() == reference.scalars


def kill_many(runs: Runs, tmp_path: Path, reference: Reference, least: int, signum: int, code: int, seed: int) -> None:
    kills = 0
    resumed: list[str] = []
    for number in range(1000):
        rng = random.Random(1000 * seed + number)
        codes = interrupt(runs, tmp_path / str(number), rng, reference.seconds, signum)
        # before Lightning runs and after it has ended, Python's own reactions to the signals hold
        assert set(codes) <= {0, code, -signum, *([1, 99] if signum == signal.SIGINT else [])}, codes
        check_same(tmp_path / str(number), reference)
        kills += sum(c != 0 for c in codes)
        resumed += (tmp_path / str(number) / "starts.txt").read_text().splitlines()
        if kills >= least:
            break
    steps = [int(line.split()[0]) for line in resumed]
    print(f"{kills} times {signal.Signals(signum).name} over {number + 1} runs; resumed at {steps}")
    assert any(steps)
    assert all(line.endswith(" 0") for line in resumed)  # no checkpoint was ever refused


def test_killed_at_random_moments_and_resumed_bit_for_bit(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    """Fault F1 in small: SIGKILL; weights, optimizer, schedule and scalars as if nothing had happened."""
    kill_many(runs, tmp_path, reference, 6, signal.SIGKILL, -9, 0)


@pytest.mark.slow
def test_fifty_kills(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    """Fault F1 for this small run."""
    kill_many(runs, tmp_path, reference, 50, signal.SIGKILL, -9, 1)


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_asked_to_stop_at_a_random_moment(
    runs: Runs, tmp_path: Path, reference: Reference, signum: int, code: int
) -> None:
    """Fault F5 in small."""
    kill_many(runs, tmp_path, reference, 3, signum, code, signum)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_asked_to_stop_twenty_times(runs: Runs, tmp_path: Path, reference: Reference, signum: int, code: int) -> None:
    """Fault F5."""
    kill_many(runs, tmp_path, reference, 20, signum, code, 100 + signum)


def wait_for_line(path: Path, count: int) -> None:
    """Until the file has so many lines."""
    deadline = time.monotonic() + 30
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < deadline
        time.sleep(0.001)
