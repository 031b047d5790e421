"""Lightning's door to the store: `Trainer(plugins=[FolderCheckpointIO(...)])`."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor
from typing_extensions import override

from d1lit.checkpoint.folder import pieces_folder, prune, read_tree, verify, write_tree


class FolderCheckpointIO(CheckpointIO):
    """Saves and loads Lightning checkpoints as verified folders without pickle, and prunes the old ones.

    What is stored is what Lightning hands over: weights, optimizer, schedules, loops, callbacks, hyperparameters and
    whatever the module put in, as long as it is plain data and tensors; anything else is an error that names its place.

    Args:
        keep: verified checkpoints kept beside each other, at least two; 0 keeps them all.
    """

    def __init__(self, keep: int = 2) -> None:
        if keep < 2 and keep != 0:
            raise ValueError(f"checkpoint keep must be at least 2 (0 keeps all), got {keep}; say keep=2")
        self.keep = keep
        self.hold: Collection[int] = ()
        """Steps: of each, the newest checkpoint that is not after it is kept too."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write, read back, and only then remove older ones.

        Raises:
            TypeError: if the checkpoint holds something that is neither plain data nor a tensor.
            OSError: if the disk is too full or fails, or the written bytes do not read back.
        """
        if storage_options is not None:
            raise TypeError("FolderCheckpointIO.save_checkpoint takes no storage_options; leave it out")
        path = Path(path)
        facts = {
            "step": checkpoint.get("global_step", 0),
            "world_size": _world_size(),
        }
        try:
            write_tree(path, checkpoint, facts)
        finally:
            shutil.rmtree(pieces_folder(path), ignore_errors=True)  # there only where the save has failed
        reason = verify(path)
        if reason is not None:
            raise OSError(f"checkpoint does not read back as written: {reason}; the older ones were kept")
        if self.keep:
            prune(path.parent, self.keep, self.hold)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, every byte of it verified. `weights_only` has no meaning where there is no pickle.

        Raises:
            ValueError: if the folder is damaged, unfinished or not a checkpoint.
        """
        if not Path(path).is_dir():
            raise ValueError(f"checkpoint {path}: not a folder; d1lit reads checkpoint folders (step_N) only")
        checkpoint, _ = read_tree(path)
        return checkpoint if map_location is None else _move(checkpoint, torch.device(map_location))

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint folder."""
        if Path(path).is_dir():
            shutil.rmtree(path)


def _world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _move(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return type(tree)((key, _move(item, device)) for key, item in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(_move(item, device) for item in tree)
    return tree
