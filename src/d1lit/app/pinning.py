"""What a run was started with that its configuration only names: the weights it begins with, the rows it trains on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from d1lit.app.plan import Plan
from d1lit.data import EncodedRow
from d1lit.evaluation import write_whole

INPUTS = "inputs.json"
BASE, ROWS, VALIDATION = "the base's weights", "rows of", "validation rows"


def inputs(plan: Plan, base: Path, tokenizer: Any) -> dict[str, str]:
    """Hashes of what a run begins with, by name.

    Args:
        plan: of the run.
        base: the folder its weights are read from.
        tokenizer: of the model.
    """
    found = {BASE: weights_sha256(base)}
    for parts in plan.stages:
        found[f"{ROWS} {parts.name}"] = _sha256(map(_facts, plan.rows_of(parts, tokenizer).rows))
    if plan.task.val_rows and any(parts.validate_every is not None for parts in plan.stages):
        found[VALIDATION] = _sha256(plan.task.rows("val"))
    return found


def weights_sha256(folder: Path) -> str:
    """Of the settings and weights in a model's folder; of a snapshot from the hub, its commit."""
    if re.fullmatch(r"models--[^/]+/snapshots/[0-9a-f]{40}", "/".join(folder.parts[-3:])):
        return f"commit {folder.name}"
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    return _files_sha256(tuple((file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache  # a start asks twice, and weights are gigabytes
def _files_sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def stored_facts(file: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """What a run has written down earlier; None where it is not known, and a line where that is a damaged file's fault.

    Raises:
        OSError: if the disk does not say.
    """
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    say(f"{file} is damaged, so whether anything differs from what it said is not known")
    return None


def keep_inputs(run: Path, now: dict[str, str]) -> None:
    """From now on the run is one with these."""
    write_whole(run / INPUTS, json.dumps(now, indent=2))


def _facts(row: EncodedRow) -> Any:
    return [list(row.prompt_ids), list(row.completion_ids), row.example]


def _sha256(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
