"""Two processes of the real method, one of which is broken: no step, or an end within a minute, never a hang."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from d1lit.processes import launch
from tests.end_to_end.faulty_worker import NUM_UPDATES, PLACES, bad_steps

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def test_what_is_not_finite_on_one_process_is_no_step_on_both(tmp_path, monkeypatch):
    """F6: seven places, each on each process: weights and Adam's state keep every bit, and the skips are counted."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert launch([sys.executable, "-m", "tests.end_to_end.faulty_worker", str(tmp_path)], 2) == 0
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    bad = bad_steps()
    assert len(bad) == 2 * len(PLACES) + 2  # a reward spoils two updates
    for record in records:
        assert [step for step, moved in enumerate(record["moved"]) if not moved] == bad
        assert [step for step, moved in enumerate(record["state_moved"]) if not moved] == bad
        assert record["skipped"] == len(bad)
        assert len(record["moved"]) == NUM_UPDATES
    assert records[0]["weights"] == records[1]["weights"]
