"""Leaving the console to what the run itself has to say."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import datasets
import transformers


def quiet_libraries() -> None:
    """Silence progress bars and remarks of libraries; warnings and errors still come through, a line each."""
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*The number of training batches.*"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.formatwarning = _one_line


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings speak to the user, not of a place in the code."""
    text = " ".join(str(message).split())
    ours = filename.startswith(str(Path(__file__).parent))
    return f"warning: {text}\n" if ours else f"{filename}:{lineno}: {category.__name__}: {text}\n"
