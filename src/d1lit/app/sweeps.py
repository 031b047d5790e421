"""Jobs of a sweep, each in a process of its own: one that dies takes no other with it, and the table says which."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.table import Table

from d1lit.report.console import console
from d1lit.security import redact

FOLDER = "D1LIT_SWEEP"
"""Environment variable: the folder of the sweep, for whichever process starts a job."""


def run_job(command: Sequence[str], number: int, overrides: Sequence[str], run_dir: Path) -> int:
    """Run one job and note how it ended; its exit status, negative for a signal.

    Args:
        command: what trains, before the overrides.
        number: of the job in the sweep.
        overrides: of this job.
        run_dir: its folder.
    """
    started = time.monotonic()
    words = [word for word in overrides if not word.startswith("run_dir=")]
    notes = notes_of(Path(os.environ[FOLDER]))
    cause = ""
    with own_devices(notes, num_devices(words)) as environment:
        child = subprocess.Popen(
            [*command, *words, f"run_dir={quoted(run_dir)}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert child.stderr is not None
        with saved_before_requeued(child):
            for line in child.stderr:
                sys.stderr.write(line)
                cause = line.strip().removeprefix("error: ") if line.startswith("error: ") else cause
            status = child.wait()
    record = {
        "overrides": redact(words),
        "run_dir": str(run_dir),
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
    }
    (notes / f"job-{number}.json").write_text(json.dumps(record))
    if status:
        print(f"error: the job {' '.join(redact(words))} failed: {cause or _ended(status)}", file=sys.stderr)
    return status


def notes_of(folder: Path, fresh: bool = False) -> Path:
    """Where the jobs of a sweep leave word, beside the folder that holds theirs; emptied if `fresh`."""
    notes = folder.with_name(f"{folder.name}.jobs")
    notes.mkdir(parents=True, exist_ok=True)
    for file in notes.glob("job-*.json") if fresh else ():
        file.unlink()
    return notes


def blank_secrets(notes: Path) -> None:
    """Take the secrets out of the configuration that Hydra's sweeper has left among the notes."""
    file = notes / "multirun.yaml"
    if file.is_file():
        text = yaml.safe_dump(redact(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False)
        whole = file.with_name(f".multirun-{platform.node()}-{os.getpid()}.yaml")  # other jobs may do the same
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, file)


@contextmanager
def saved_before_requeued(child: subprocess.Popen[str]) -> Iterator[None]:
    """Under submitit on SLURM, let the job save and end before submitit's handler queues it again, which ends it.

    The signal reaches every process of a step, submitit's own one too: its handler waits here for the end of the child.
    The child does not ask for the queue (stopping.py).
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or threading.current_thread() is not threading.main_thread():
        yield
        return
    signum = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)
        child.send_signal(number)

    before = signal.signal(signum, remember)
    try:
        yield
    finally:
        signal.signal(signum, before)
    if came:
        signal.raise_signal(signum)


def num_devices(words: Sequence[str]) -> int:
    """How many devices a job's overrides ask for."""
    asked = [word.split("=", 1)[1] for word in words if word.lstrip("+").startswith("trainer.devices=")]
    return int(asked[-1]) if asked and asked[-1].isdecimal() else 1


def visible_devices() -> list[str]:
    """The GPUs named in CUDA_VISIBLE_DEVICES; where it is not set, this machine's, as the driver lists them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]  # torch takes seconds to ask
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]


@contextmanager
def own_devices(folder: Path, count: int = 1) -> Iterator[dict[str, str]]:
    """An environment that shows as many GPUs as asked for, which no other job of the sweep has, once they are free.

    Nothing is shared out where there are fewer than that, or than two.
    """
    devices = visible_devices()
    if len(devices) < max(2, count):
        yield dict(os.environ)
        return
    here = platform.node()  # a sweep's folder may be seen by several machines
    locks = [FileLock(str(folder / f".device-{here}-{device}.lock")) for device in devices]
    while len(taken := _acquired(locks, count)) < count:
        time.sleep(1.0)
    try:
        yield {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices[place] for place in taken)}
    finally:
        for place in taken:
            locks[place].release()


def _acquired(locks: Sequence[FileLock], count: int) -> list[int]:
    """Places of so many locks that are ours now; none where there are not enough."""
    taken: list[int] = []
    for place, lock in enumerate(locks):
        if len(taken) < count:
            with suppress(Timeout):
                lock.acquire(timeout=0)
                taken.append(place)
    if len(taken) == count:
        return taken
    for place in taken:
        locks[place].release()
    return []


def show_sweep(folder: Path, jobs: Sequence[Sequence[str]] | None) -> int:
    """The closing table of a sweep: every job, how it ended, what it reached; 1 if any failed.

    Args:
        folder: of the sweep.
        jobs: what each was told; None where a search has chosen them, which are those that left word.
    """
    if jobs is None:
        jobs = [()] * len(list(notes_of(folder).glob("job-*.json")))
    table = Table(title=f"sweep in {folder}")
    for column in ("job", "what", "ended", "seconds", "accuracy", "folder"):
        table.add_column(column, overflow="fold")
    failed = 0
    for number, overrides in enumerate(jobs):
        file = notes_of(folder) / f"job-{number}.json"
        if not file.exists():
            failed += 1
            table.add_row(str(number), " ".join(redact(list(overrides))), "failed: not run to its end", "", "", "")
            continue
        record = json.loads(file.read_text())
        failed += record["status"] != 0
        ended, found = _ended(record["status"]), reached(Path(record["run_dir"]))
        share = "" if found is None else f"{100 * found:.1f}"
        table.add_row(
            str(number), " ".join(record["overrides"]), ended, str(record["seconds"]), share, record["run_dir"]
        )
    console.print(table)
    print(folder)
    return 1 if failed else 0


def quoted(path: Path) -> str:
    """A path as a value of the command line, whatever signs are in it."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _ended(status: int) -> str:
    if status == 0:
        return "well"
    return f"failed: killed by signal {-status}" if status < 0 else f"failed: exit status {status}"


def reached(run_dir: Path) -> float | None:
    """Accuracy of a run's last evaluation: what a search wants large; None where there is none."""
    file = run_dir / "results.json"
    if not file.exists():
        return None
    evaluations: list[dict[str, Any]] = json.loads(file.read_text())["evaluations"]
    return float(evaluations[-1]["accuracy"]) if evaluations else None
