"""Checkpoints that survive: verified folders of safetensors and JSON, and the run folder they stand in."""

from d1lit.checkpoint.folder import MANIFEST, list_checkpoints, newest, prune, read_facts, read_tree, verify, write_tree
from d1lit.checkpoint.lightning_io import FolderCheckpointIO
from d1lit.checkpoint.run_folder import (
    differing_keys,
    flatten,
    lock_run,
)
from d1lit.checkpoint.sealed import broken, put_whole, seal, settle

__all__ = [
    "MANIFEST",
    "FolderCheckpointIO",
    "broken",
    "differing_keys",
    "flatten",
    "list_checkpoints",
    "lock_run",
    "newest",
    "prune",
    "put_whole",
    "read_facts",
    "read_tree",
    "seal",
    "settle",
    "verify",
    "write_tree",
]
