"""Looking at the machine before a run does: what is there, what is missing, and the cure."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from packaging.requirements import InvalidRequirement, Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from d1lit.app.config_errors import CONF

Level = Literal["ok", "note", "warning", "error"]
_MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("ok", "green"), "note": ("note", "cyan"), "warning": ("warning", "yellow"), "error": ("ERROR", "red"),
}  # fmt: skip
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    level: Level
    said: str
    cure: str = ""
    """What to do; empty where nothing is wrong."""


def examine(model: str | None = None, outputs: Path = Path("outputs"), timeout: float = 3.0) -> list[Finding]:
    """Everything a run will need.

    Args:
        model: a folder or hub id to look at too.
        outputs: where runs will be written.
        timeout: seconds to wait for the hub.
    """
    looks: list[Callable[[], list[Finding]]] = [
        _python, _packages, _devices, _memory, lambda: _disk(outputs), lambda: _writable(outputs), _cache, _math_worker,
        lambda: _hub(timeout),
    ]  # fmt: skip
    findings = [finding for look in looks for finding in look()]
    return findings + (_model(model) if model is not None else [])


def report(findings: Sequence[Finding], console: Console) -> int:
    """Print them; exit status 1 if one of them will stop a run."""
    table = Table(title="d1lit doctor", title_justify="left")
    for column in ("", "what", "found", "cure"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark, colour = _MARKS[finding.level]
        table.add_row(Text(mark, style=colour), Text(finding.subject), Text(finding.said), Text(finding.cure))
    console.print(table)
    bad = [finding.subject for finding in findings if finding.level == "error"]
    console.print(
        f"{len(bad)} of {len(findings)} would stop a run: {', '.join(bad)}" if bad else "Nothing here stops a run."
    )
    return 1 if bad else 0


# ------------------------------------------------------------------------------------------------------------- software


def _python() -> list[Finding]:
    return [Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")]


def _packages() -> list[Finding]:
    """Every package that d1lit asks for, at a version that it takes."""
    try:
        wanted = requires("d1lit") or []
    except PackageNotFoundError:
        return [Finding("d1lit", "error", "is not installed in this environment", "pip install -e . in the repository")]
    found: list[Finding] = []
    good: list[str] = []
    for line in wanted:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            has = version(requirement.name)
        except PackageNotFoundError:
            found.append(Finding(requirement.name, "error", "is not installed", f"pip install '{_plain(requirement)}'"))
            continue
        if requirement.specifier.contains(has, prereleases=True):
            good.append(f"{requirement.name} {has}")
        else:
            said = f"{has} is not {requirement.specifier}"
            found.append(Finding(requirement.name, "error", said, f"pip install '{_plain(requirement)}'"))
    return [Finding("packages", "ok", ", ".join(good)), *found]


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _math_worker() -> list[Finding]:
    """The graders' worker process answers."""
    from d1lit.rewards.graders import math_grader

    example = {"id": "doctor", "question": "", "answer": r"\frac{1}{2}"}
    (grade,) = math_grader(10.0).grade([r"<answer>\boxed{0.5}</answer>"], [example])
    if grade.strict.outcome in ("timeout", "error"):
        cure = "a machine with free memory for a second Python process; tasks without symbolic answers need none"
        return [Finding("math grader", "warning", f"its worker ended with {grade.strict.outcome}", cure)]
    return [Finding("math grader", "ok", f"0.5 is read as equal to 1/2: {grade.strict.value >= 1}")]


# ------------------------------------------------------------------------------------------------------------- hardware


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
        cure = "a GPU for the 8B models; on a machine that has one: a CUDA build of torch, and its driver"
        built = (
            "" if torch.version.cuda is None else f" (torch is built for CUDA {torch.version.cuda}, but sees no device)"
        )
        level: Level = "note" if torch.version.cuda is None else "warning"
        return [Finding("devices", level, f"no GPU{built}; {threads}: enough for model=tiny", cure)]
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        compute = ".".join(map(str, torch.cuda.get_device_capability(number)))
        said = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, compute {compute}"
        busy = free < 0.5 * total
        cure = "nvidia-smi shows who holds the rest" if busy else ""
        found.append(Finding(f"GPU {number}", "warning" if busy else "ok", said, cure))
    if not torch.cuda.is_bf16_supported():
        found.append(Finding("bfloat16", "warning", "not supported", "trainer.precision=32-true, or a newer GPU"))
    return found


def _memory() -> list[Finding]:
    free = _free_memory()
    if free is None:
        cure = "model=tiny needs 2 GiB free, and the system's own monitor says what is"
        return [Finding("memory", "note", "cannot be read on this system", cure)]
    if free < 2 * GIB:
        return [
            Finding("memory", "warning", f"{free / GIB:.1f} GiB free", "2 GiB for model=tiny: close other programs")
        ]
    return [Finding("memory", "ok", f"{free / GIB:.1f} GiB free")]


def _free_memory() -> int | None:
    """Bytes that new programs may take, or the limit of a container where that is lower."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = int(match[1]) * 1024 if match else None
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if free is not None and limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _disk(outputs: Path) -> list[Finding]:
    place = next(p for p in (outputs.resolve(), *outputs.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    said = f"{free / GIB:.1f} GiB free at {place}"
    if free < GIB:
        return [
            Finding(
                "disk", "error" if free < GIB // 10 else "warning", said, "free some, or run_dir=PATH on another disk"
            )
        ]
    return [Finding("disk", "ok", said)]


def _writable(outputs: Path) -> list[Finding]:
    place = next(p for p in (outputs.resolve(), *outputs.resolve().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"d1lit")
    except OSError as error:
        cure = "run_dir=PATH where you may write, or chown the folder"
        return [Finding("outputs", "error", f"{place} cannot be written: {error.strerror}", cure)]
    return [Finding("outputs", "ok", f"runs can be written to {outputs}")]


def _cache() -> list[Finding]:
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "d1lit"
    place = Path(os.environ.get("D1LIT_CACHE", default))
    parent = next(p for p in (place, *place.parents) if p.exists())
    if os.access(parent, os.W_OK):
        return [Finding("cache", "ok", f"tiny base models are kept in {place}")]
    return [Finding("cache", "error", f"{place} cannot be written", "D1LIT_CACHE=PATH where you may write")]


# ------------------------------------------------------------------------------------------------------------ the world


def _hub(timeout: float) -> list[Finding]:
    """Whether the hub answers at all; only models and data named by a hub id need it."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    cure = "model.path=FOLDER and task.train_data=FILE need no hub; else check network, proxy and HF_ENDPOINT"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return [Finding("hub", "note", "HF_HUB_OFFLINE is set: only what is cached will be found", cure)]
    try:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "d1lit-doctor"})
        with urllib.request.urlopen(request, timeout=timeout):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code == 407:
            return [Finding("hub", "note", f"{address} answers with {error.code}", cure)]
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        said = (
            "does not answer in time"
            if isinstance(reason, socket.timeout | TimeoutError)
            else f"cannot be reached: {' '.join(str(reason).split()) or type(reason).__name__}"
        )
        return [Finding("hub", "note", f"{address} {said}", cure)]
    token = (
        "a token is set"
        if os.environ.get("HF_TOKEN") or _token_file().is_file()
        else "no token (none is needed to read)"
    )
    return [Finding("hub", "ok", f"{address} answers; {token}")]


def _token_file() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"


def _model(path: str) -> list[Finding]:
    """Config, weights, tokenizer and chat template of a folder, hub id or preset; no weights are loaded or fetched."""
    from d1lit.models import encode_prompt, load_tokenizer
    from d1lit.models.loading import find_folder, load_config, shard_files

    revision = None
    preset = CONF / "model" / f"{path}.yaml"
    if "/" not in path and not Path(path).exists() and preset.is_file():
        chosen = OmegaConf.load(preset)
        if chosen.path is None:
            return [Finding("model", "ok", f"{path} is built in: made by the run itself, nothing is downloaded")]
        path, revision = chosen.path, chosen.revision
    try:
        folder = find_folder(path, revision, weights=False)
        config = load_config(folder)
    except (ValueError, KeyError) as error:
        return [_refused("model", error)]
    found = [
        Finding(
            "model",
            "ok",
            f"{config.family}, width {config.hidden_size}, {config.num_hidden_layers} layers, in {folder}",
        )
    ]
    try:
        if Path(path).expanduser().is_dir() or _are_cached(folder):
            files = shard_files(folder)
            size = sum(file.stat().st_size for file in files)
            found.append(Finding("weights", "ok", f"{len(files)} files, {size / GIB:.2f} GiB"))
        else:
            size = _size_in_index(folder)
            said = "not on this machine" + (f": {size / GIB:.1f} GiB to fetch" if size else "")
            cure = f"the first run fetches them; before it: hf download {path}"
            found.append(Finding("weights", "note", said, cure))
        found += _room_for(size)
    except (ValueError, KeyError) as error:
        found.append(_refused("weights", error))
    try:
        tokenizer = load_tokenizer(str(folder), config)
        ids = encode_prompt(tokenizer, None, "1 + 1 = ?")
        shown = tokenizer.decode(ids)
        found.append(Finding("tokenizer", "ok", f"{len(tokenizer)} tokens; a prompt reads {shown!r}"))
    except Exception as error:  # a tokenizer's files can fail in any way, and each is worth a line
        found.append(_refused("tokenizer", error))
    return found


def _are_cached(folder: Path) -> bool:
    """Whether a snapshot of the hub holds all weights already."""
    from d1lit.models.loading import shard_files

    try:
        return bool(shard_files(folder))
    except ValueError:
        return False


def _size_in_index(folder: Path) -> int:
    """Bytes of all weights as the index says; 0 where there is no index, or it does not say."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return int((index.get("metadata") or {}).get("total_size") or 0)


def _room_for(size: int) -> list[Finding]:
    import torch

    free = max((torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())), default=_free_memory() or 0)
    if size > free:
        cure = "a larger GPU, strategy=fsdp over several, or model=tiny"
        return [Finding("room", "error", f"{size / GIB:.1f} GiB of weights, {free / GIB:.1f} GiB free", cure)]
    return []


def _refused(subject: str, error: Exception) -> Finding:
    text = " ".join(str(error).split())
    said, _, cure = text.partition(" Try: ")
    return Finding(subject, "error", said or type(error).__name__, cure or "copy the model again")


def facts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """For --json."""
    return [finding.__dict__ for finding in findings]
