"""Where the golden numbers and the real data stand, and how their manifests are read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

_SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = Path(os.environ.get("D1LIT_GOLDEN", _SHARED / "golden"))
DATA = Path(os.environ.get("D1LIT_DATA", _SHARED / "data"))

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN} (set D1LIT_GOLDEN)")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (set D1LIT_DATA)")


def d1_entries(name: str) -> list[dict[str, Any]]:
    """All entries of golden/d1 with this name, one a seed; empty where the folder is absent."""
    manifest = GOLDEN / "d1" / "manifest.json"
    if not manifest.is_file():
        return []
    entries = [e for e in json.loads(manifest.read_text())["entries"] if e["name"] == name]
    if not entries:
        raise AssertionError(f"{manifest} lists no entry named {name}")
    return entries


def d1_tensors(entry: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one entry by their manifest name; fails if the file holds fewer than the manifest lists."""
    (file,) = [f for f in entry["files"] if Path(f).name == f"{entry['name']}.safetensors"]
    tensors = load_file(GOLDEN / "d1" / file)
    short = {key.removeprefix(f"{entry['name']}."): value for key, value in tensors.items()}
    missing = set(entry["tensors"]) - set(short)
    assert not missing, f"{file} lacks {sorted(missing)}"
    return short


def d1_model_folder(entry: dict[str, Any], model: str | None = None) -> Path:
    """Folder of the tiny model an entry was made with."""
    return GOLDEN / "d1" / f"seed{entry['seed']}" / (model or entry["settings"]["model"])


def method_cases(section: str) -> list[dict[str, Any]]:
    """All cases of one section of golden/methods ("1_schedules", ...); empty where the folder is absent."""
    manifest = GOLDEN / "methods" / f"{section}.json"
    return json.loads(manifest.read_text()) if manifest.is_file() else []


def method_tensors(case: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """The tensors of one case and seed by their manifest name."""
    tensors = load_file(GOLDEN / "methods" / case["file"])
    prefix = f"s{seed}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def entry_id(entry: dict[str, Any]) -> str:
    """A readable pytest id."""
    return f"{entry['name']}-seed{entry['seed']}" if "seed" in entry else str(entry["name"])
