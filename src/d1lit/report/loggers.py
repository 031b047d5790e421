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


def csv_rows(save_dir: Path | str, name: str, version: str) -> CSVLogger:
    """`metrics.csv` under save_dir/name/version; rows that an earlier attempt has written stay.

    Differs from Lightning's, which begins by deleting them.
    """
    logger = CSVLogger(save_dir, name=name, version=version)
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
    """Drop the rows of `step` or later from a folder's metrics.csv; returns how many."""
    file = folder / METRICS
    if not file.exists():
        return 0
    with file.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows, names = list(reader), reader.fieldnames or []
    kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    if len(kept) == len(rows):
        return 0
    staging = file.with_name(f".cut.{METRICS}")
    with staging.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(staging, file)
    return len(rows) - len(kept)


def wandb_run(save_dir: Path | str, name: str, version: str, project: str) -> WandbLogger:
    """A run of Weights & Biases for each stage of each run folder; a resumed one is the same."""
    folder = Path(save_dir).resolve()
    identity = hashlib.sha256(f"{folder}/{name}/{version}".encode()).hexdigest()[:16]
    return WandbLogger(name=f"{folder.name} {version}", save_dir=folder, project=project, id=identity)
