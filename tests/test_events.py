"""Event files: a resumed run writes no step twice."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from d1lit.report.events import cut_events, event_files, read_scalars


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
