"""A checkpoint is a folder `step_N`: safetensors and JSON, under a manifest of sha256 sums that is written last.

The folder appears under its name in one rename, when every byte of it is on the disk. A crash at any point leaves the
previous checkpoint or the new one, never a half of either under a name that `newest` would take.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from d1lit.checkpoint.tree import holds_pieces, join_tree, split_tree

SCHEMA = 1
"""Version of the layout of the folder; a reader refuses a newer one."""

MANIFEST = "manifest.json"
STRUCTURE = "structure.json"
PIECES = "shard-"
"""How the files begin that single processes of a run have written (shards.py)."""
_SHARD_BYTES = 2**30
"""Tensors are serialised in memory, a shard at a time."""
_FREE_SPACE_FACTOR = 2.2
"""Free space asked for, in sizes of the new checkpoint: itself, its successor before pruning, and a reserve."""
_STEP = re.compile(r"step_(\d+)(\.replaced)?")


# ---------------------------------------------------------------------------------------------------------- writing


def write_tree(
    folder: Path | str, tree: Any, facts: Mapping[str, Any] | None = None, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write a nested structure with tensors as a checkpoint folder, durably and in one step.

    A folder of the same name is replaced; a crash in between leaves it as `<name>.replaced`, where `newest` finds it.

    Args:
        folder: where the checkpoint will stand; the folder around it is made.
        tree: see `split_tree` for what it may hold.
        facts: what the manifest says besides (step, world size); JSON values.
        shard_bytes: tensors are grouped into files of about this size.

    Raises:
        TypeError: if the tree holds something that cannot be stored; nothing has been written then.
        OSError: if the disk is too full (ENOSPC, checked before) or fails; the staging folder is removed.
    """
    folder = Path(folder)
    structure, tensors = split_tree(tree)
    encoded = json.dumps(structure, allow_nan=False, separators=(",", ":")).encode()
    _make_folder(folder.parent)
    check_free_space(folder, len(encoded) + sum(tensor.nbytes for tensor in tensors.values()))
    staging = folder.parent / f".{folder.name}.staging"
    _remove(staging)
    try:
        os.mkdir(staging)
        files = {}
        for i, shard in enumerate(_shards(tensors, shard_bytes)):
            name = f"tensors-{i:05d}.safetensors"
            files[name] = write_file(staging / name, serialise(shard))
        if holds_pieces(structure):
            files |= _adopted(pieces_folder(folder), staging)
        files[STRUCTURE] = write_file(staging / STRUCTURE, encoded)
        write_manifest(staging, facts or {}, files)
        sync_folder(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _put_in_place(staging, folder)


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """The last file of a folder: what is said of it, and the sums of all others."""
    write_file(folder / MANIFEST, _manifest_bytes({"schema": SCHEMA, "facts": dict(facts), "files": dict(files)}))


def pieces_folder(folder: Path) -> Path:
    """Where the processes of a run leave their rows of a checkpoint until the first puts it together."""
    return folder.parent / f".{folder.name}.pieces"


def _adopted(beside: Path, staging: Path) -> dict[str, Any]:
    """Move the files that the processes have written into the checkpoint being made; their manifest entries."""
    entries = {}
    for note in sorted(beside.glob("*.json")):
        name = note.name.removesuffix(".json")
        os.rename(beside / name, staging / name)
        entries[name] = json.loads(note.read_text())
    shutil.rmtree(beside)
    return entries


def _put_in_place(staging: Path, folder: Path) -> None:
    replaced, damaged = folder.with_name(f"{folder.name}.replaced"), folder.with_name(f".{folder.name}.removing")
    if folder.exists():
        # Only a whole checkpoint may push out the one that an earlier crash left as `.replaced`.
        aside = replaced if damage(folder) is None else damaged
        _remove(aside)
        os.rename(folder, aside)
    os.rename(staging, folder)
    sync_folder(folder.parent)
    _remove(replaced)
    _remove(damaged)


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterable[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def serialise(shard: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file; views into one storage are copied apart, as the format wants them."""
    whole: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in shard.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        whole[name] = tensor
    return safetensors.torch.save(whole)


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Write and flush to the disk; returns the manifest's entry. Raw `os` calls: tests break each of them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except OSError as error:  # neither call says which file it was
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        os.mkdir(folder)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """A rename or a new file is on the disk only when the folder that holds its name is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_space(folder: Path, estimate: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < _FREE_SPACE_FACTOR * estimate:
        raise OSError(
            errno.ENOSPC,
            f"checkpoint not written: it needs {estimate / 2**20:.1f} MiB and {_FREE_SPACE_FACTOR} times that free, "
            f"found {free / 2**20:.1f} MiB; free some space or point run_dir elsewhere",
            str(folder),
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------- reading


def read_tree(folder: Path | str) -> tuple[Any, dict[str, Any]]:
    """The structure that `write_tree` stored, on the CPU, and the facts of its manifest.

    Each file is checked against the manifest in the very bytes that are then used.

    Raises:
        ValueError: if the folder is not a whole checkpoint of a schema this version reads, naming file and cause.
    """
    folder = Path(folder)
    body = read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    structure = None
    for name, entry in body["files"].items():
        content = read_checked(folder / name, entry)
        try:
            if name == STRUCTURE:
                structure = json.loads(content)
            else:
                tensors |= safetensors.torch.load(content)
        except (ValueError, RecursionError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / name}: not written by d1lit ({error}); use an earlier checkpoint") from error
    try:
        return join_tree(structure, tensors), body["facts"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STRUCTURE}: does not fit its tensors ({error!r}); use an earlier one") from error


def verify(folder: Path | str) -> str | None:
    """None if every byte of the checkpoint is as it was written, else the reason in one line; so for a failing disk."""
    try:
        return damage(folder)
    except OSError as error:
        return str(error)


def damage(folder: Path | str) -> str | None:
    """None if every byte of the checkpoint is as it was written, else the reason in one line.

    Raises:
        OSError: if the disk does not say, which is no damage: asked again it may.
    """
    folder = Path(folder)
    try:
        for name, entry in read_manifest(folder)["files"].items():
            check_on_disk(folder / name, entry)
    except ValueError as error:
        return str(error)
    return None


def read_facts(folder: Path | str) -> dict[str, Any]:
    """The facts in a checkpoint's manifest (step, world size)."""
    return read_manifest(Path(folder))["facts"]


def newest(folder: Path | str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint of the most steps that verifies, and the ones above it that were refused, with the reason.

    Raises:
        OSError: if the disk does not say whether one of them is good.
    """
    refused: list[tuple[Path, str]] = []
    for path in list_checkpoints(folder):
        reason = damage(path)
        if reason is None:
            return path, refused
        refused.append((path, reason))
    return None, refused


def list_checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints in a folder by their names alone, most steps first."""
    folder = Path(folder)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match:
            found.append((_step(path), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _step(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def prune(folder: Path | str, keep: int, hold: Collection[int] = ()) -> list[Path]:
    """Remove the checkpoints below the `keep` newest that verify, and what crashed saves left; returns what went.

    Of each step in `hold` the newest that verifies and is not after it stays too.

    Damaged checkpoints above them stay for whoever wants to look. Each goes by a rename first, so that a crash in the
    middle of a removal leaves nothing that looks like a checkpoint.
    """
    if keep < 2:
        raise ValueError(f"checkpoint keep must be at least 2, so that one survives a damaged other; got {keep}")
    folder = Path(folder)
    removed = []
    good = 0
    for path in list_checkpoints(folder):
        is_held = any(_step(path) <= step for step in hold)
        if (good < keep or is_held) and verify(path) is None:
            good += 1
            hold = [step for step in hold if step < _step(path)]
            continue
        if good < keep:
            continue
        doomed = folder / f".{path.name}.removing"
        _remove(doomed)
        os.rename(path, doomed)
        removed.append(path)
    for pattern in (".step_*.staging", ".step_*.removing", ".step_*.pieces"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)
    return removed


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The manifest vouches for the files, its digest for itself; one way to write it, so that every bit counts."""
    text = json.dumps(body, sort_keys=True, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"body": body, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False).encode()


def read_manifest(folder: Path, needs: str | None = STRUCTURE) -> dict[str, Any]:
    """What the manifest says, if it is whole and names the file that the folder cannot be without."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: missing, so the save never finished; use an earlier checkpoint")
    raw = path.read_bytes()
    body = _intact_body(raw, needs)
    if body is None:
        raise ValueError(f"{path}: damaged ({len(raw)} bytes do not match their own checksum); use an earlier one")
    if body["schema"] != SCHEMA:
        raise ValueError(f"{path}: written in schema {body['schema']}, this version reads {SCHEMA}; update d1lit")
    for name in body["files"]:
        # A manifest is data from elsewhere: it may name files of its own folder only.
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError(f"{path}: names a file outside its folder ({name!r})")
    return body


def _intact_body(raw: bytes, needs: str | None) -> dict[str, Any] | None:
    try:
        body = json.loads(raw)["body"]
        entries = body["files"].values()
        well_formed = all(type(entry["size"]) is int and type(entry["sha256"]) is str for entry in entries)
        complete = {"schema", "facts", "files"} <= body.keys() and needs in (None, *body["files"])
        return body if well_formed and complete and _manifest_bytes(body) == raw else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{path}: missing; use an earlier checkpoint")
    content = path.read_bytes()
    _compare(path, len(content), hashlib.sha256(content).hexdigest(), entry)
    return content


def check_on_disk(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{path}: missing; use an earlier checkpoint")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _compare(path, path.stat().st_size, digest, entry)


def _compare(path: Path, size: int, digest: str, entry: Mapping[str, Any]) -> None:
    if size != entry["size"]:
        raise ValueError(f"{path}: {size} bytes instead of {entry['size']}; use an earlier checkpoint")
    if digest != entry["sha256"]:
        raise ValueError(f"{path}: its bytes have changed since it was written (sha256); use an earlier checkpoint")
