"""Two processes of the real method, one of which is broken: no step, or an end within a minute, never a hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d1lit.checkpoint import list_checkpoints, verify
from tests.end_to_end.faulty_worker import NUM_UPDATES, PLACES, bad_steps

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def together(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Two processes under our launcher, as `trainer.devices=2` starts them."""
    worker = [sys.executable, "-m", "tests.end_to_end.faulty_worker", str(folder), fault]
    code = f"import sys; from d1lit.processes import launch; sys.exit(launch({worker!r}, 2))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(("fault", "status", "how"), [("die", 137, "SIGKILL"), ("raise", 1, "status 1")])
def test_a_process_that_fails_ends_the_run_by_name_and_it_goes_on_later(tmp_path, fault, status, how):
    """F14: not after the communication library's time-out, but at once."""
    failed = together(tmp_path, fault)
    seconds = time.time() - float((tmp_path / "failed_at").read_text())
    assert failed.returncode == status, failed.stderr
    assert f"error: process 1 of 2 ended first ({how}); ending the others" in failed.stderr
    assert ("the judge of process 1 has lost its mind" in failed.stderr) == (fault == "raise")
    assert seconds < 60
    resumed = together(tmp_path, "none")
    assert resumed.returncode == 0, resumed.stderr
    assert "grpo: goes on from step_" in resumed.stdout
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0]["weights"] == records[1]["weights"]
    assert 3 <= len(records[0]["moved"]) <= 5, "steps before the fault are not run again"
    print(f"{fault}: ended {seconds:.1f} s after it")


def test_a_signal_to_one_process_within_a_validation_stops_all_with_a_checkpoint(tmp_path):
    """The first process has done its rows by then, and waits for those of the second."""
    stopped = together(tmp_path, "signal")
    assert stopped.returncode == 128 + signal.SIGUSR1, stopped.stderr
    assert "ended first" not in stopped.stderr and "Connection closed" not in stopped.stderr
    (checkpoint, *_) = list_checkpoints(tmp_path / "stage" / "checkpoints")
    assert checkpoint.name == "step_3" and verify(checkpoint) is None


def test_what_is_not_finite_on_one_process_is_no_step_on_both(tmp_path):
    """F6: seven places, each on each process: weights and Adam's state keep every bit, and the skips are counted.

    One process is slow on the way (F14): the other waits.
    """
    done = together(tmp_path, "not_finite")
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    bad = bad_steps()
    assert len(bad) == 2 * len(PLACES) + 2  # a reward spoils two updates
    for record in records:
        assert [step for step, moved in enumerate(record["moved"]) if not moved] == bad
        assert [step for step, moved in enumerate(record["state_moved"]) if not moved] == bad
        assert record["skipped"] == len(bad)
        assert len(record["moved"]) == NUM_UPDATES
    assert records[0]["weights"] == records[1]["weights"]
