"""Folders of weights that appear whole or not at all, under the sums of their files, so that damage is seen later."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d1lit.checkpoint.folder import MANIFEST, check_on_disk, read_manifest, sync_folder, write_manifest
from d1lit.processes import is_first


def put_whole(folder: Path, write: Callable[[Path], Any], with_manifest: bool = True) -> None:
    """Let `write` fill a folder, bring it to the disk, and only then put it in the place of what stands there.

    Args:
        folder: where it will stand.
        write: fills the folder it is given; every process calls it, the first one writes.
        with_manifest: leave one, which `broken` reads; without, nothing is added to what is written.

    Raises:
        OSError: if the disk is full or fails; what stood there still does.
    """
    staging, old = _beside(folder, "staging"), _beside(folder, "removing")
    if is_first():
        settle(folder)
        staging.mkdir(parents=True)
    try:
        write(staging)
        if not is_first():
            return
        seal(staging, with_manifest)
        if folder.exists():
            os.rename(folder, old)
        os.rename(staging, folder)
    except BaseException:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def seal(folder: Path, with_manifest: bool = True) -> None:
    """Bring what is in a folder to the disk, and write down the sums of its files beside them.

    A manifest names files of its own folder only: those in folders within (a tokenizer's chat templates) have no sum.
    """
    inside = sorted(folder.rglob("*"))
    for path in inside:
        if path.is_dir():
            sync_folder(path)
        else:
            _sync(path)
    if with_manifest:
        write_manifest(folder, {}, {path.name: _sums(path) for path in folder.iterdir() if path.is_file()})
    sync_folder(folder)


def settle(folder: Path) -> None:
    """Undo what a `put_whole` that was killed has left, or finish it where nothing was missing but the last rename."""
    staging, old = _beside(folder, "staging"), _beside(folder, "removing")
    if not folder.exists() and old.exists():
        os.rename(staging if (staging / MANIFEST).exists() and broken(staging) is None else old, folder)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def broken(folder: Path) -> str | None:
    """None if every file of a sealed folder is as it was written, else the reason in one line.

    Raises:
        OSError: if the disk does not say.
    """
    try:
        for name, entry in read_manifest(folder, needs=None)["files"].items():
            check_on_disk(folder / name, entry)
    except ValueError as error:
        return str(error)
    return None


def _beside(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sums(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return {"sha256": digest, "size": os.fstat(handle.fileno()).st_size}
