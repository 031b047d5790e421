"""Loggers that outlive a full disk and go on where a resumed run goes on."""

from __future__ import annotations

import csv
import hashlib
import os
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from d1lit.processes import is_first

METRICS = "metrics.csv"
RETRY_SECONDS = 600
"""How long a logger is left alone after it could not write."""


def lasting(logger: Logger) -> Logger:
    """The same logger, which no longer ends a run whose disk is full: one line says so, and later it is tried again."""
    failed_at: float | None = None

    def attempt(call: Any) -> Any:
        def attempted(*args: Any, **kwargs: Any) -> None:
            nonlocal failed_at
            if failed_at is not None:
                if time.monotonic() - failed_at < RETRY_SECONDS:
                    return
                failed_at = None
                if isinstance(logger, TensorBoardLogger):
                    logger._experiment = None  # its writer has ended; the next one has a file of its own
            try:
                call(*args, **kwargs)
            except OSError as error:
                failed_at = time.monotonic()
                rank_zero_warn(f"{logger.log_dir}: nothing is logged for {RETRY_SECONDS // 60} minutes: {error}")

        return attempted

    for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
        setattr(logger, name, attempt(getattr(logger, name)))
    return logger


def with_kept_rows(logger: CSVLogger) -> CSVLogger:
    """The same logger, whose file keeps what an earlier attempt has written: Lightning's begins by deleting it."""
    file = Path(logger.log_dir) / METRICS
    aside = file.with_name(f".{METRICS}.kept")
    if not is_first() or not (file.exists() or aside.exists()):
        return logger
    if file.exists():
        os.replace(file, aside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it deletes
        writer = logger.experiment
    with aside.open(newline="") as handle:
        writer.metrics_keys = next(csv.reader(handle), [])
    os.replace(aside, file)
    return logger


def cut_csv(folder: Path, step: int) -> int:
    """Drop from metrics.csv the rows of `step` or later, and those a full disk cut short; returns how many."""
    file = folder / METRICS
    if not file.exists():
        return 0
    with file.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows, names = list(reader), reader.fieldnames or []
    whole = [row for row in rows if None not in row and None not in row.values()]  # too long, too short
    kept = [row for row in whole if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    if len(kept) == len(rows):
        return 0
    staging = file.with_name(f".cut.{METRICS}")
    with staging.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(staging, file)
    return len(rows) - len(kept)


def stage_logger(make: Any, folder: Path, stage: str) -> Logger:
    """The logger of a stage, from what the configuration calls: one that goes on where a resumed stage does."""
    if getattr(make, "func", None) is WandbLogger:
        # A run of its own for each stage of each run folder; a resumed one is the same.
        identity = hashlib.sha256(f"{folder.resolve()}/{stage}".encode()).hexdigest()[:16]
        return lasting(make(save_dir=folder, name=f"{folder.name} {stage}", version=identity))
    logger = make(save_dir=folder, name="logs", version=stage)
    return lasting(with_kept_rows(logger) if isinstance(logger, CSVLogger) else logger)
