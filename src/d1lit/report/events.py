"""TensorBoard event files: reading scalars, and cutting off what a resumed run will write again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter


def event_files(folder: Path) -> list[Path]:
    """Event files that stand directly in a folder, oldest first."""
    return sorted(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []


def _events(file: Path) -> Iterator[tuple[bytes, Event]]:
    """Raw records and what they say; ends quietly at a record that a crash cut short."""
    for raw in RawEventFileLoader(str(file)).Load():
        yield raw, Event.FromString(raw)


def cut_events(folder: Path, step: int) -> int:
    """Drop every event of `step` or later, so that a run resumed at `step` has no step twice.

    Returns:
        How many events were dropped.
    """
    dropped = 0
    for file in event_files(folder):
        records = list(_events(file))
        kept = [raw for raw, event in records if event.step < step or event.HasField("file_version")]
        if len(kept) == len(records):
            continue
        dropped += len(records) - len(kept)
        staging = file.with_name(f"cut.{file.name}")
        with staging.open("wb") as handle:
            writer = RecordWriter(handle)
            for raw in kept:
                writer.write(raw)
            writer.flush()
            os.fsync(handle.fileno())
        os.replace(staging, file)
    return dropped


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a folder's event files by tag, as (step, value) in the order of steps."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: sorted((point.step, point.value) for point in accumulator.Scalars(tag)) for tag in tags}
