"""The folder of a run: one process at a time, and whether it is still the same run."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def lock_run(run_folder: Path | str) -> Iterator[None]:
    """Hold the run's folder for this process; the kernel lets go when the process ends, however it ends.

    In a distributed run rank 0 alone takes it.

    Raises:
        ValueError: if another process holds it, naming its pid and host.
    """
    folder = Path(run_folder)
    owner = folder / ".lock.owner"
    lock = FileLock(str(folder / ".lock"), timeout=0)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"run_dir: {folder} is in use by {_read_owner(owner)}. Try: another run_dir, or wait for it [E502]"
            ) from None
        if (folder / ".lock").exists():
            break
        lock.release()  # a refused run has just removed its new folder, and with it the file that this lock is on
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read_owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on host {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (which has not yet said which)"


# -------------------------------------------------------------------------------------------------------- configuration


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level of dotted keys; list items are numbered."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)):
            value = {str(i): item for i, item in enumerate(value)} or []
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for each key of two flat configurations whose value differs.

    Args:
        old: the configuration the run was started with.
        new: the one it is to go on with.
        ignore: keys, and prefixes ending in a dot, that may change (where the run stands, how it logs).
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if any(key == name or (name.endswith(".") and key.startswith(name)) for name in ignore):
            continue
        before, after = (repr(side[key]) if key in side else "(absent)" for side in (old, new))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines
