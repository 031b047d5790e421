"""The heavy forms are alive: the list of mutants fits the code, and a short soak measures what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutants import MUTANTS
from tests.faults.soak import measured

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str) -> str:
    """`python -m tests.faults` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.faults", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_mutant_still_has_its_place_in_the_code() -> None:
    assert len(MUTANTS) >= 20
    for mutant in MUTANTS:
        compile(mutant.source(), mutant.file, "exec")
    assert f" {len(MUTANTS)} mutants" in (ROOT / "docs" / "reliability.md").read_text()


def test_growth_is_a_slope_over_the_settled_part() -> None:
    rows = [(step, 100.0 + (50.0 if step >= 20 else 0.0) + 0.003 * step, 7 + step // 90, 3) for step in range(1, 101)]
    found = measured(rows, 100)
    assert found.mb_per_1000_steps == pytest.approx(3.0)
    assert (found.more_files, found.more_threads) == (1, 0)


@pytest.mark.nightly
def test_every_mutant_of_a_guard_is_noticed() -> None:
    """F20."""
    print(command("mutants").splitlines()[-1])


@pytest.mark.slow
def test_a_short_soak_does_not_grow() -> None:
    """F21 in small; 1 MB per 1,000 steps is the figure, and so few steps can only show a leak of ten times that."""
    line = command("soak", "--steps", "400").splitlines()[-1]
    print(line)
    assert "+0 open files, +0 threads, 0 zombies" in line
    assert float(line.split(" MB, ")[1].split()[0]) < 10.0
