"""Checkpoints of a run whose tensors are spread over its processes: each writes and reads its own rows.

A checkpoint is the same folder as any other. Beside the tensors that every process has, it holds a file a process with
that process's rows of the tensors that are spread; read as a whole it gives whole tensors, so it can be taken up by
one process, by other numbers of them, and under any strategy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from d1lit.checkpoint.folder import (
    PIECES,
    STRUCTURE,
    check_free_space,
    check_on_disk,
    pieces_folder,
    read_checked,
    read_manifest,
    serialise,
    write_file,
)
from d1lit.checkpoint.tree import Pieces, join_tree
from d1lit.processes import all_gather_objects, is_first, world


@dataclass(frozen=True)
class Rows:
    """This process's rows of a tensor that is spread over the processes by its first dimension."""

    local: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""


def own_range(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows that FSDP2 gives a process: those of `torch.chunk`."""
    size = -(-length // world_size)
    return min(rank * size, length), min((rank + 1) * size, length)


def write_pieces(tree: Any, folder: Path) -> Any:
    """Write this process's rows beside where the checkpoint will stand; all processes call it.

    Returns:
        The tree with `Pieces` in the place of `Rows`, which `write_tree` takes.

    Raises:
        OSError: on every process, if any of them could not write.
    """
    here = world()
    mine: dict[str, Tensor] = {}
    marked = _mark(tree, (), here.rank, here.world_size, mine)
    beside = pieces_folder(folder)

    def make_room() -> None:
        if is_first():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def write() -> None:
        check_free_space(folder, here.world_size * sum(tensor.nbytes for tensor in mine.values()))
        name = f"{PIECES}{here.rank:05d}.safetensors"
        entry = write_file(beside / name, serialise(mine))
        (beside / f"{name}.json").write_text(json.dumps(entry))

    try:
        _on_all(make_room)
        _on_all(write)
    except OSError:
        if is_first():
            shutil.rmtree(beside, ignore_errors=True)
        raise
    return marked


def _on_all(act: Callable[[], None]) -> None:
    """What each process does; an error of one is everyone's, so that none waits for it."""
    error = None
    try:
        act()
    except OSError as found:
        error = str(found)
    errors = [found for found in all_gather_objects(error) if found is not None]
    if errors:
        raise OSError(errors[0])


def _mark(node: Any, path: tuple[str, ...], rank: int, world_size: int, mine: dict[str, Tensor]) -> Any:
    if isinstance(node, Rows):
        name = "/".join(path)
        mine[f"{name}#{rank}"] = node.local
        return Pieces(tuple(f"{name}#{other}" for other in range(world_size)))
    if isinstance(node, dict):
        return type(node)((key, _mark(value, (*path, str(key)), rank, world_size, mine)) for key, value in node.items())
    if isinstance(node, (list, tuple)):
        return type(node)(_mark(value, (*path, str(n)), rank, world_size, mine) for n, value in enumerate(node))
    return node


def read_spread(folder: Path, rank: int, world_size: int) -> Any:
    """A checkpoint with `Rows` of this process where tensors were spread, however many processes wrote it.

    Every byte is checked; of the others' rows nothing is kept in memory.

    Raises:
        ValueError: if the folder is damaged, unfinished or not a checkpoint.
    """
    files = read_manifest(folder)["files"]
    tensors: dict[str, Tensor] = {}
    structure: Any = None
    where: dict[str, Path] = {}
    for name, entry in files.items():
        if name.startswith(PIECES):
            check_on_disk(folder / name, entry)
            with safe_open(str(folder / name), framework="pt") as file:
                where |= dict.fromkeys(file.keys(), folder / name)
            continue
        content = read_checked(folder / name, entry)
        if name == STRUCTURE:
            structure = json.loads(content)
        else:
            tensors |= load(content)

    def own(names: list[str]) -> Rows:
        return _own_rows(names, where, rank, world_size)

    return join_tree(structure, tensors, own)


def read_part(folder: Path, key: str) -> dict[str, Callable[[], Tensor]]:
    """The tensors of one entry of a checkpoint by name, each read and put together when it is called for.

    The caller has verified the folder; nothing else of it is read.
    """
    files = read_manifest(folder)["files"]
    where: dict[str, Path] = {}
    for file in (folder / name for name in files if name != STRUCTURE):
        with safe_open(str(file), framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        with safe_open(str(where[name]), framework="pt") as opened:
            return opened.get_tensor(name)

    class Names(dict[str, Any]):
        def __missing__(self, name: str) -> Callable[[], Tensor]:
            return partial(read, name)

    structure = json.loads(read_checked(folder / STRUCTURE, files[STRUCTURE]))
    return join_tree(structure[key], Names(), lambda names: lambda: torch.cat([read(name) for name in names]))


def _own_rows(names: list[str], where: Mapping[str, Path], rank: int, world_size: int) -> Rows:
    slices, lengths, rest = [], [], []
    for name in names:
        with safe_open(str(where[name]), framework="pt") as file:
            shape = file.get_slice(name).get_shape()
            lengths.append(shape[0])
            rest = shape[1:]
    start, stop = own_range(sum(lengths), rank, world_size)
    before = 0
    for name, length in zip(names, lengths, strict=True):
        first, last = max(start - before, 0), min(stop - before, length)
        if first < last or (not slices and before + length == sum(lengths)):  # an empty share keeps dtype and width
            with safe_open(str(where[name]), framework="pt") as file:
                slices.append(file.get_slice(name)[first : max(first, last)].clone())
        before += length
    return Rows(torch.cat(slices), (sum(lengths), *rest))
