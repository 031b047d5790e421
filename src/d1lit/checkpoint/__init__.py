"""Checkpoints that survive: verified folders of safetensors and JSON, and the run folder they stand in."""

from d1lit.checkpoint.folder import list_checkpoints, newest, prune, read_facts, read_tree, verify, write_tree
from d1lit.checkpoint.lightning_io import FolderCheckpointIO
from d1lit.checkpoint.run_folder import (
    Resume,
    checkpoint_folder,
    config_hash,
    differing_keys,
    find_resume,
    flatten,
    lock_run,
)

__all__ = [
    "FolderCheckpointIO",
    "Resume",
    "checkpoint_folder",
    "config_hash",
    "differing_keys",
    "find_resume",
    "flatten",
    "list_checkpoints",
    "lock_run",
    "newest",
    "prune",
    "read_facts",
    "read_tree",
    "verify",
    "write_tree",
]
