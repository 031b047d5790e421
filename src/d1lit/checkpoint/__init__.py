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
from d1lit.checkpoint.sealed import broken, put_whole, settle

__all__ = [
    "FolderCheckpointIO",
    "Resume",
    "broken",
    "checkpoint_folder",
    "config_hash",
    "differing_keys",
    "find_resume",
    "flatten",
    "list_checkpoints",
    "lock_run",
    "newest",
    "prune",
    "put_whole",
    "read_facts",
    "read_tree",
    "settle",
    "verify",
    "write_tree",
]
