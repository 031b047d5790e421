"""Runs of `train.py` that are killed, or asked to stop, at random moments, and started again by the same command."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.served import Server
from tests.faults.jobs import Ending, Job, check_same, ending

STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
"""Exit status of a run that was asked to stop; SIGUSR1 is what asks SLURM for a place in the queue as well."""


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody touched."""

    ending: Ending


@dataclass
class Tally:
    """What was done to the runs, and where it hit them."""

    runs: int = 0
    signals: int = 0
    """Runs that a signal ended."""
    in_a_save: int = 0
    resumed_at: list[int] = field(default_factory=list)
    """Optimizer steps at which a stage went on."""
    in_a_cycle: int = 0
    """... of which within the inner updates of a rollout."""
    most_in_a_run: int = 0

    def line(self) -> str:
        """In words."""
        return (
            f"{self.signals} signals over {self.runs} runs, up to {self.most_in_a_run} in one epoch; {self.in_a_save} "
            f"within a save; {len(self.resumed_at)} went on from a checkpoint, {self.in_a_cycle} of them within a "
            f"cycle of inner updates (steps {sorted(set(self.resumed_at))})"
        )


def undisturbed(server: Server, job: Job, words: tuple[str, ...], folder: Path) -> Undisturbed:
    """Run it once without a fault."""
    log = folder.with_suffix(".log")
    assert server.run((*words, f"run_dir={folder}"), log, prepared=True) == 0, log.read_text()
    return Undisturbed(ending(folder, job))


def disturb(
    server: Server,
    job: Job,
    words: tuple[str, ...],
    folder: Path,
    moment: Callable[[int], None],
    signum: int,
    most: int,
) -> Tally:
    """Start a run again and again, with a signal at the chosen moments, until it ends by itself.

    Args:
        server: starts the runs.
        job: what is run.
        words: its command line.
        folder: of the run.
        moment: returns when the signal is to be sent; it is given the process id.
        signum: the signal.
        most: signals after which the run is left alone.
    """
    tally, log = Tally(runs=1), folder.with_suffix(".log")
    allowed = {0, -signum, STOPPED.get(signal.Signals(signum), -signum)}
    status = 1
    while status != 0:
        pid = server.start((*words, f"run_dir={folder}"), log, prepared=True)
        if tally.signals < most:
            moment(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        status = server.wait()
        assert status in allowed, f"status {status}\n{log.read_text()[-3000:]}"
        tally.signals += status != 0
        tally.in_a_save += bool(list(folder.glob("stages/*/checkpoints/.step_*.staging")))
    tally.resumed_at = [int(step) for step in re.findall(r": goes on from step_(\d+)", log.read_text())]
    tally.in_a_cycle = sum(step % job.num_inner != 0 for step in tally.resumed_at)
    tally.most_in_a_run = tally.signals
    return tally


def ended(pid: int) -> bool:
    """Whether a process is dead, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def at_random(rng: random.Random, folder: Path) -> Callable[[int], None]:
    """A random moment: now and then of the start-up, else a few updates on, within the time an update takes.

    Progress is read off the event files, so that a slow machine does not move all signals to the start.
    """

    def written() -> int:
        return sum(file.stat().st_size for file in folder.glob("logs/*/events*"))

    def wait(pid: int) -> None:
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0.0, 1.0))
            return
        left, size, seen = rng.randint(1, 12), written(), time.monotonic()
        took = 0.05
        while left and not ended(pid):
            if (now := written()) != size:
                left, size, took, seen = left - 1, now, time.monotonic() - seen, time.monotonic()
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, min(1.0, took)))

    return wait


def within_a_save(rng: random.Random, folder: Path) -> Callable[[int], None]:
    """Within the first to fourth save of the process, a random moment after its first file has appeared."""

    def wait(pid: int) -> None:
        left, inside = rng.randint(1, 4), False
        while left and not ended(pid):
            found = any(True for _ in folder.glob("stages/*/checkpoints/.step_*.staging"))
            left -= found and not inside
            inside = found
            time.sleep(0.0003)
        time.sleep(rng.uniform(0.0, 0.003))

    return wait


def many(
    server: Server, job: Job, home: Path, signals: int, signum: int, seed: int, in_saves: int = 0, most: int = 8
) -> Tally:
    """So many signals over as many runs as it takes, each run compared with the undisturbed one.

    Args:
        server: starts the runs.
        job: what is run; it saves at every step when it is killed, and only when asked to stop otherwise.
        home: where the runs stand.
        signals: how many in all.
        signum: which.
        seed: of the moments.
        in_saves: how many of them have to fall within a save.
        most: signals a run, after which it may end.
    """
    words = job.with_saves(1 if signum == signal.SIGKILL else None)
    reference = undisturbed(server, job, words, home / "undisturbed")
    total, rng = Tally(), random.Random(seed)
    while total.signals < signals or total.in_a_save < in_saves:
        folder = home / f"run{total.runs}"
        short = total.in_a_save < in_saves and total.signals >= signals - in_saves
        moment = within_a_save(rng, folder) if short else at_random(rng, folder)
        left = max(signals - total.signals, in_saves - total.in_a_save)
        tally = disturb(server, job, words, folder, moment, signum, min(most, left))
        check_same(ending(folder, job), reference.ending)
        total.runs += 1
        total.signals += tally.signals
        total.in_a_save += tally.in_a_save
        total.in_a_cycle += tally.in_a_cycle
        total.resumed_at += tally.resumed_at
        total.most_in_a_run = max(total.most_in_a_run, tally.most_in_a_run)
        print(f"{signal.Signals(signum).name}: {json.dumps(vars(tally))}", flush=True)
    return total
