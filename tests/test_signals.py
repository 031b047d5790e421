"""Killed, asked to stop, resumed: the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
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
import torch
from torch import nn

from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.callbacks.signals import StopOnSignal
from d1lit.checkpoint import list_checkpoints, read_facts, verify
from d1lit.stopping import Interrupted, StopFlag, requeue, requeued
from tests.end_to_end import small

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
    assert [line["step"] for line in lines if "val/loss" in line] == list(range(3, 25, 3))


def interrupt(runs: Runs, folder: Path, rng: random.Random, seconds: float, signum: int) -> list[int]:
    """Start a run again and again, each time with a signal at a random moment, until it ends by itself."""
    codes = []
    while not codes or codes[-1] != 0:
        pid = runs.start(folder)
        time.sleep(rng.uniform(0, seconds))
        if not (folder / "final.json").exists():
            with contextlib.suppress(ProcessLookupError):  # it has ended between the two lines
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


def test_killed_during_saves(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    """Fault F1: five kills in the middle of a save, one after the other in one run; several fall into one mu cycle."""
    for visit in (12, 15, 11, 20, 9):
        assert runs.run(tmp_path, at=("fsync", visit, signal.SIGKILL)) == -9
    assert runs.run(tmp_path) == 0
    check_same(tmp_path, reference)
    print("resumed at", (tmp_path / "starts.txt").read_text().split("\n"))


@pytest.mark.nightly
def test_fifty_kills(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    """Fault F1 for this small run."""
    kill_many(runs, tmp_path, reference, 50, signal.SIGKILL, -9, 1)


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_asked_to_stop_at_a_random_moment(
    runs: Runs, tmp_path: Path, reference: Reference, signum: int, code: int
) -> None:
    """Fault F5 in small."""
    kill_many(runs, tmp_path, reference, 3, signum, code, signum)


@pytest.mark.nightly
@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_asked_to_stop_twenty_times(runs: Runs, tmp_path: Path, reference: Reference, signum: int, code: int) -> None:
    """Fault F5."""
    kill_many(runs, tmp_path, reference, 20, signum, code, 100 + signum)


# A run is 24 optimizer steps of two micro-batches; rollouts (10 passes) at even steps, validation (4 batches) after
# steps 3, 6, ...; (moment, its n-th visit) -> the step whose checkpoint is left behind.
MOMENTS = [
    ("rollout", 13, 2),  # within the second rollout
    ("inner 0 micro 0", 2, 2),  # the first half of the window; the second does not begin
    ("inner 0 micro 1", 2, 3),  # the window is over, and the validation after it does not begin
    ("inner 1 micro 0", 3, 5),
    ("inner 1 micro 1", 3, 6),
    ("validation", 6, 6),  # within the second validation: the next run begins it again
    ("validation", 9, 9),
    ("validation", 30, 22),  # within that of the last step: Lightning would not take a finished run up again
    ("save", 3, 6),
]


@pytest.mark.parametrize(
    ("moment", "visit", "step"),
    [pytest.param(*m, marks=pytest.mark.slow if i % 3 else ()) for i, m in enumerate(MOMENTS)],
)
def test_asked_twice_at_a_chosen_moment(
    runs: Runs, tmp_path: Path, reference: Reference, moment: str, visit: int, step: int
) -> None:
    """Fault F5: the checkpoint is that of the last whole optimizer step, whatever was going on; nothing is lost."""
    assert runs.run(tmp_path, at=(moment, visit, signal.SIGTERM), every_n_steps=2) == 143
    (newest, *_) = list_checkpoints(tmp_path / "stages" / "only" / "checkpoints")
    assert verify(newest) is None
    assert newest.name == f"step_{step}"
    assert not (tmp_path / "final.json").exists()
    assert runs.run(tmp_path) == 0
    check_same(tmp_path, reference)


def test_a_validation_that_is_interrupted_again_and_again(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    for visit, signum, code in [(6, signal.SIGTERM, 143), (2, signal.SIGKILL, -9), (4, signal.SIGTERM, 143)]:
        assert runs.run(tmp_path, at=("validation", visit, signum)) == code
    # the fourth and last pass had begun
    assert runs.run(tmp_path, at=("inner 0 micro 1", 1, signal.SIGKILL)) == -9
    assert runs.run(tmp_path) == 0
    check_same(tmp_path, reference)


@pytest.mark.parametrize(
    ("moment", "visit", "step"), [("rollout", 13, 2), ("inner 1 micro 0", 3, 5), ("validation", 7, 6)]
)
def test_a_signal_to_one_of_two_ranks_stops_both_with_a_checkpoint(
    runs: Runs, tmp_path: Path, moment: str, visit: int, step: int
) -> None:
    """Rank 1 alone is asked; without agreement rank 0 would wait for it for ever."""
    assert (
        runs.run(tmp_path, at=(moment, visit, signal.SIGTERM), ranks=2) != 0
    )  # the forking parent says it its own way
    (newest, *_) = list_checkpoints(tmp_path / "stages" / "only" / "checkpoints")
    assert verify(newest) is None
    assert newest.name == f"step_{step}"
    assert read_facts(newest)["world_size"] == 2


def test_saves_by_the_clock(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    assert runs.run(tmp_path, every_n_steps=None, every_n_minutes=1e-6, at=("validation", 6, signal.SIGKILL)) == -9
    names = [path.name for path in list_checkpoints(tmp_path / "stages" / "only" / "checkpoints")]
    assert names == ["step_5", "step_4"]  # after every step; step 6 is written when its validation is over
    assert runs.run(tmp_path, every_n_steps=None) == 0
    check_same(tmp_path, reference)


def test_training_goes_on_where_the_disk_refuses(runs: Runs, tmp_path: Path, reference: Reference) -> None:
    """Fault F4 in a run: no file may grow beyond 3 kB, so no checkpoint is ever written, and the run ends well."""
    assert runs.run(tmp_path, max_file_bytes=3000) == 0
    assert list((tmp_path / "stages" / "only" / "checkpoints").iterdir()) == []
    check_same(tmp_path, reference)


def test_slurm_is_asked_to_queue_the_job_again(runs: Runs, tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    environment = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "123"}
    at = ("inner 1 micro 0", 3, signal.SIGUSR1)
    assert runs.run(tmp_path / "run", at=at, environment=environment) == 138
    assert (tmp_path / "asked").read_text() == "requeue 123\n"
    assert list_checkpoints(tmp_path / "run" / "stages" / "only" / "checkpoints")


@pytest.mark.filterwarnings("ignore:SLURM job")
def test_requeue_minds_arrays_and_strange_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit $FAIL\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", "0")
    assert not requeue({})
    assert not requeue({"SLURM_JOB_ID": "1; rm -rf /"})
    assert requeue({"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "7"})
    assert asked.read_text() == "requeue 4_7\n"
    assert not requeue({"SLURM_JOB_ID": "5", "SUBMITIT_EXECUTOR": "slurm"}), "submitit asks"
    assert asked.read_text() == "requeue 4_7\n"
    monkeypatch.setenv("FAIL", "1")
    assert not requeue({"SLURM_JOB_ID": "5"})
    scontrol.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requeue({"SLURM_JOB_ID": "5"})


@pytest.mark.parametrize(("signum", "rank", "asked"), [(10, "0", "requeue 5\n"), (10, "1", None), (15, "0", None)])
def test_what_ends_outside_a_trainer_is_queued_again_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, rank: str, asked: str | None
) -> None:
    """By the first process, and for SIGUSR1 alone."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    flag = StopFlag()
    with pytest.raises(Interrupted), requeued(), flag.installed():
        os.kill(os.getpid(), signum)
        flag.raise_if_stopped()
    assert ((tmp_path / "asked").read_text() if asked else None) == asked
    assert asked is not None or not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_only_being_prepared_ends_at_once(signum: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    flag, before = StopFlag(), signal.getsignal(signum)
    with flag.preparing():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.received == signal.SIGUSR1, "goes by the flag, so that the queue can be asked"
        with pytest.raises(Interrupted) as end:
            os.kill(os.getpid(), signum)
            time.sleep(60)
    assert end.value.code == code
    assert signal.getsignal(signum) is before
    with StopFlag().preparing(), contextlib.suppress(Interrupted):
        os.kill(os.getpid(), signum)
    said = capfd.readouterr().err
    assert said == f"SIGUSR1: stopping once the run is prepared\n{signal.Signals(signum).name}: stopping at once\n"


def test_the_flag_serves_loops_outside_a_trainer() -> None:
    flag = StopFlag()
    before = [signal.getsignal(signum) for signum, _ in SIGNALS]
    with flag.installed():
        flag.raise_if_stopped()
        assert not flag.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first one counts
        assert flag.should_stop()
        with pytest.raises(Interrupted) as caught:
            flag.raise_if_stopped()
        assert caught.value.code == 143
    assert [signal.getsignal(signum) for signum, _ in SIGNALS] == before


@pytest.mark.parametrize("at", [1, 3, 4])
def test_within_a_rollout_the_pass_after_a_signal_is_the_last(at: int) -> None:
    """One process asks before every pass: four that sample, then one of old log-probs."""
    flag, module, begun = StopFlag(), small.make_module(small.small_policy()), []
    (lookup,) = [part for part in module.modules() if isinstance(part, nn.Embedding)]

    def begin(*_: Any) -> None:
        begun.append(torch.is_grad_enabled())  # of an update, not of a rollout
        if len(begun) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    lookup.register_forward_hook(begin)
    with flag.installed(), pytest.raises(SystemExit) as caught:
        small.fit(module, callbacks=[StopOnSignal(flag)])
    assert caught.value.code == 143
    assert begun == [False] * at, "passes began after the signal"


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"every_n_minutes": -1.0}])
def test_intervals_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive or null"):
        SaveCheckpoints("x", **{"every_n_steps": None, "every_n_minutes": None} | settings)
