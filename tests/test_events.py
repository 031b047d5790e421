"""Event files: a resumed run writes no step twice."""

from __future__ import annotations

import csv
import errno
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.summary.writer.record_writer import RecordWriter

from d1lit.evaluation import append_records, write_whole
from d1lit.report import loggers
from d1lit.report.events import cut_events, event_files, read_scalars
from d1lit.report.loggers import cut_csv, lasting, stage_logger


def write(folder: Path, steps: range) -> None:
    """One attempt of a run: a file of its own."""
    logger = TensorBoardLogger(folder.parent, name=folder.name, version="")
    for step in steps:
        logger.log_metrics({"train/loss": 1.0 + step}, step)
        if step % 2 == 0:
            logger.log_metrics({"val/accuracy": 2.0 + step}, step)
    logger.finalize("success")


def test_events_of_a_step_that_will_be_run_again_are_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    write(folder, range(7))
    for file in event_files(folder):
        file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote the validation of step 6
    assert cut_events(folder, 4) == 4  # 4 with its validation, 5, and 6
    write(folder, range(4, 7))
    found = read_scalars(folder)
    assert found["train/loss"] == [(step, 1.0 + step) for step in range(7)]
    assert found["val/accuracy"] == [(step, 2.0 + step) for step in range(0, 7, 2)]
    assert cut_events(folder, 7) == 0
    assert cut_events(folder, 0) == 11
    assert cut_events(tmp_path / "absent", 0) == 0


def test_rows_of_a_csv_log_stay_and_no_step_is_there_twice(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "sft"

    def attempt(steps: range, name: str) -> None:
        logger = stage_logger(CSVLogger, tmp_path, "sft")
        for step in steps:
            logger.log_metrics({"train/loss": 1.0 + step, name: 2.0}, step)
        logger.finalize("success")

    attempt(range(5), "a")
    assert cut_csv(folder, 3) == 2
    attempt(range(3, 6), "b")
    assert cut_csv(folder, 6) == 0 and cut_csv(tmp_path / "absent", 0) == 0
    with (folder / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["step"], row["train/loss"]) for row in rows] == [(str(n), str(1.0 + n)) for n in range(6)]
    assert [row["a"] for row in rows] == ["2.0"] * 3 + [""] * 3 and rows[-1]["b"] == "2.0"
    (folder / "metrics.csv").rename(folder / ".metrics.csv.kept")  # killed between the two renames
    attempt(range(6, 7), "b")
    assert len((folder / "metrics.csv").read_text().splitlines()) == 8


def test_rows_that_a_full_disk_cut_short_are_dropped(tmp_path: Path) -> None:
    """The half of a row that there was room for, glued to the next one; and one at the end."""
    (tmp_path / "metrics.csv").write_text("loss,step,x\n1.0,0,2\n1.0,1,1.0,2,2\n1.0,3,2\n1.0,4")
    assert cut_csv(tmp_path, 9) == 2
    assert (tmp_path / "metrics.csv").read_text().split() == ["loss,step,x", "1.0,0,2", "1.0,3,2"]


def test_a_stage_is_a_run_of_its_own_in_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []

    def run(**settings: Any) -> DummyLogger:
        made.append(settings)
        return DummyLogger()

    monkeypatch.setattr(loggers, "WandbLogger", run)
    for folder, stage in (("a", "sft"), ("a", "grpo"), ("b", "sft"), ("a", "sft")):
        stage_logger(partial(run, project="p"), tmp_path / folder, stage)
    assert len({run["version"] for run in made}) == 3 and made[0] == made[3]


def test_a_full_disk_costs_log_lines_and_not_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """F4: TensorBoard's writer raises at every call from then on; later it gets a new file."""
    said: list[str] = []
    monkeypatch.setattr(loggers, "rank_zero_warn", said.append)
    logger = lasting(TensorBoardLogger(tmp_path, name="logs", version="sft"))

    def log(steps: range) -> None:
        for step in steps:
            logger.log_metrics({"train/loss": float(step)}, step)
            logger.save()

    log(range(2))
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", _full)
        patch.setattr(threading, "excepthook", lambda _: None)
        log(range(2, 6))
    assert len(said) == 1 and "No space left" in said[0] and str(tmp_path) in said[0]
    monkeypatch.setattr(loggers, "RETRY_SECONDS", 0)
    log(range(6, 8))
    logger.finalize("success")
    found = [step for step, _ in read_scalars(tmp_path / "logs" / "sft")["train/loss"]]
    assert found[:2] == [0, 1] and found[-2:] == [6, 7]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_the_disk_refuses_is_named() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no such device here")
    with pytest.raises(OSError) as caught:
        append_records(full, [{"a": 1}])
    assert caught.value.filename == str(full)


def test_a_file_that_cannot_be_replaced_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "results.json", "{}")
    assert caught.value.filename == str(tmp_path / "results.json")
