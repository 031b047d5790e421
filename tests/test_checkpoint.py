"""The checkpoint store: nothing lost, nothing changed, and every way in which a disk or a process can fail it."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d1lit.checkpoint import (
    FolderCheckpointIO,
    differing_keys,
    flatten,
    list_checkpoints,
    lock_run,
    newest,
    prune,
    read_facts,
    read_tree,
    verify,
    write_tree,
)
from d1lit.checkpoint.folder import MANIFEST, _manifest_bytes
from d1lit.checkpoint.tree import STORABLE_DTYPES, join_tree, split_tree


def same(a: Any, b: Any) -> bool:
    """Equal in type, order, and every bit."""
    if isinstance(a, torch.Tensor):
        whole = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return whole and a.contiguous().reshape(-1).view(torch.uint8).equal(
            b.contiguous().reshape(-1).view(torch.uint8)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(k) is type(m) for k, m in zip(a, b, strict=True))
            and all(same(a[k], b[k]) for k in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    return a == b


def example_tree(seed: int = 0) -> dict[str, Any]:
    """What a trainer's checkpoint looks like, with the awkward corners."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 4, generator=g)
    return {
        "global_step": seed,
        "state_dict": OrderedDict(a=weight, tied=weight, view=weight[:, 1], bf16=weight.bfloat16()),
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(8, 4, generator=g)}, 1: {}},
                "param_groups": [
                    {"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "fused": None, "capturable": False}
                ],
            }
        ],
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 1}}}},
        "text": "naïve \ud800 \x00 ✓",
        "numbers": [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1e308, 2**70, -1],
        "$tensor": "not a tag",
        "odd": [{"$tuple": [1]}, {"$dict": {}}, {}, [], (), {1: "int", "1": "str"}],
        "a/b": torch.zeros(0, 3),
        "a": {"b": torch.ones(())},
    }


# -------------------------------------------------------------------------------------------------------- losslessness


def test_round_trip_of_every_kind_of_value(tmp_path: Path) -> None:
    tree = example_tree()
    write_tree(tmp_path / "step_1", tree, {"step": 1, "world_size": 2})
    back, facts = read_tree(tmp_path / "step_1")
    assert same(tree, back)
    assert facts == {"step": 1, "world_size": 2} == read_facts(tmp_path / "step_1")
    assert back["state_dict"]["a"] is back["state_dict"]["tied"]  # tied weights stay tied
    assert {path.suffix for path in (tmp_path / "step_1").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("dtype", sorted(STORABLE_DTYPES, key=str), ids=str)
def test_round_trip_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (64,), dtype=torch.uint8)
    tree = {"x": raw.view(dtype), "t": raw.view(dtype).reshape(2, -1).t(), "scalar": raw.view(dtype)[0]}
    write_tree(tmp_path / "step_1", tree)
    assert same(tree, read_tree(tmp_path / "step_1")[0])


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.lists(st.floats(width=32), max_size=3).map(torch.tensor)
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(
            st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$float", "$dict"]), t, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_tree_survives_json(tree: Any) -> None:
    structure, tensors = split_tree(tree)
    text = json.dumps(structure, allow_nan=False)
    assert same(tree, join_tree(json.loads(text), safetensors.torch.load(safetensors.torch.save(tensors))))


class Thing:
    """Something no checkpoint should hold."""


class Name(str):
    """A str, almost."""


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [0, {"b": Thing()}]}, "a/1/b"),
        ({"a": {"f": lambda: None}}, "a/f"),
        ({"a": {1.5: 0}}, "a "),
        ({"a": {True: 0}}, "a "),
        ({"a": {(1, 2): 0}}, "a "),
        ({"hparams": b"bytes"}, "hparams"),
        ({"s": {1, 2}}, "s"),
        ({"n": Name("x")}, "n"),
        ({"d": torch.float32}, "d"),
        ({"p": Path("x")}, "p"),
        ({"t": torch.zeros(2, device="meta")}, "t"),
        ({"t": torch.eye(2).to_sparse()}, "t"),
        ({"t": torch.zeros(2, dtype=torch.complex128)}, "t"),
        ({"t": torch.zeros(2, dtype=torch.complex64).conj()}, "t"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, value: Any, path: str) -> None:
    with pytest.raises(TypeError, match=rf"^{path}"):
        write_tree(tmp_path / "step_1", value)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="contain itself"):
        write_tree(tmp_path / "step_1", {"a": loop})


def test_shards_hold_everything_once(tmp_path: Path) -> None:
    tree = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    write_tree(tmp_path / "step_1", tree, shard_bytes=1000)
    assert len(list((tmp_path / "step_1").glob("*.safetensors"))) == 5
    assert same(tree, read_tree(tmp_path / "step_1")[0])


def test_a_small_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    big = torch.randn(1000, 1000)
    write_tree(tmp_path / "step_1", {"row": big[3], "cell": big[5, 5]})
    assert sum(path.stat().st_size for path in (tmp_path / "step_1").iterdir()) < 10_000
    assert same(big[3], read_tree(tmp_path / "step_1")[0]["row"])


def test_bytes_that_do_not_read_back_keep_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a byte between a write and its check: said at once, and nothing older is removed."""
    store = FolderCheckpointIO(keep=2)
    for step in (1, 2):
        store.save_checkpoint(example_tree(step), tmp_path / f"step_{step}")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, b"?" + bytes(data)[1:]))
    with pytest.raises(OSError, match=r"does not read back as written: .*step_3"):
        store.save_checkpoint(example_tree(3), tmp_path / "step_3")
    assert newest(tmp_path)[0] == tmp_path / "step_2"
    assert verify(tmp_path / "step_1") is None


# ------------------------------------------------------------------------------------------- which checkpoint is taken


def test_the_newest_is_by_number_not_by_text(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write_tree(tmp_path / f"step_{step}", {"step": step})
    (tmp_path / "step_1000x").mkdir()
    (tmp_path / "events").write_text("")
    assert newest(tmp_path) == (tmp_path / "step_100", [])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_100", "step_10", "step_9"]
    assert newest(tmp_path / "absent") == (None, [])


def test_pruning_counts_only_checkpoints_that_verify(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_tree(tmp_path / f"step_{step}", {"step": torch.tensor(step)})
    flip_bit(tmp_path / "step_5" / "tensors-00000.safetensors", 100)
    removed = prune(tmp_path, keep=2)
    assert [path.name for path in removed] == ["step_2", "step_1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4", "step_5"]
    with pytest.raises(ValueError, match="keep must be at least 2"):
        prune(tmp_path, keep=1)


def test_pruning_keeps_one_checkpoint_for_each_step_that_is_held(tmp_path: Path) -> None:
    for step in range(2, 20, 2):
        write_tree(tmp_path / f"step_{step}", {"step": torch.tensor(step)})
    flip_bit(tmp_path / "step_10" / "tensors-00000.safetensors", 100)
    prune(tmp_path, keep=2, hold={1, 5, 11, 17, 18})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_18", "step_16", "step_8", "step_4"]


def test_differing_keys_are_listed() -> None:
    old = flatten({"loss": {"beta": 0.04, "parts": [1, 2]}, "seed": 1, "run_dir": "a", "logger": {"x": 1}})
    new = flatten({"loss": {"beta": 0.01, "parts": [1, 3]}, "run_dir": "b", "logger": {"y": 1}, "model": {}})
    assert differing_keys(old, new, ignore=("run_dir", "logger.")) == [
        "loss.beta: 0.04 -> 0.01",
        "loss.parts.1: 2 -> 3",
        "model: (absent) -> {}",
        "seed: 1 -> (absent)",
    ]
    assert differing_keys(old, dict(reversed(old.items()))) == []


# ---------------------------------------------------------------------------------------------- F2: crash at each call

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


def crash_at(k: int, work: Any) -> bool:
    """Run `work` in a child that dies at its k-th call to the file system; False if it made fewer.

    A write that is hit leaves half of its bytes behind. Calls above k never happen, as after a SIGKILL.
    """
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        count = 0

        def breaking(name: str, real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == k:
                    if name == "write":
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os._exit(137)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, breaking(name, getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 137)
    return code == 137


def test_a_crash_at_every_call_of_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Fault F2, exhaustively: a save that also prunes, killed before each of its calls."""
    store = FolderCheckpointIO(keep=2)
    trees = {step: example_tree(step) for step in (1, 2, 3, 4)}
    k = 0
    crashed = True
    outcomes = []
    while crashed:
        k += 1
        folder = tmp_path / str(k)
        for step in (1, 2, 3):
            write_tree(folder / f"step_{step}", trees[step])
        crashed = crash_at(k, lambda folder=folder: store.save_checkpoint(trees[4], folder / "step_4"))
        path, refused = newest(folder)
        assert path is not None and path.name in ("step_3", "step_4") and refused == []
        assert same(read_tree(path)[0], trees[int(path.name[5:])])
        outcomes.append(path.name)
        # the next save is not troubled by what the crash left behind
        store.save_checkpoint(trees[4], folder / "step_4")
        assert sorted(p.name for p in folder.iterdir()) == ["step_3", "step_4"]
        shutil.rmtree(folder)
    print(f"crashed at {k - 1} calls: {outcomes.count('step_3')} left the old, {outcomes.count('step_4') - 1} the new")
    assert k > 20 and outcomes[0] == "step_3" and outcomes[-1] == "step_4"
    assert outcomes == sorted(outcomes)  # once the new one is there, it stays


def test_a_crash_while_the_only_checkpoint_is_replaced_leaves_one(tmp_path: Path) -> None:
    old, new = example_tree(1), example_tree(2)
    k = 0
    crashed = True
    while crashed:
        k += 1
        folder = tmp_path / str(k)
        write_tree(folder / "step_1", old)
        crashed = crash_at(k, lambda folder=folder: write_tree(folder / "step_1", new))
        path, _ = newest(folder)
        assert path is not None
        assert same(read_tree(path)[0], old) or same(read_tree(path)[0], new)
        # and a second crash in the repair leaves one as well
        crash_at(max(1, k - 3), lambda folder=folder: write_tree(folder / "step_1", new))
        path, _ = newest(folder)
        assert path is not None
        write_tree(folder / "step_1", new)
        assert same(read_tree(folder / "step_1")[0], new)
        assert not (folder / "step_1.replaced").exists()
        shutil.rmtree(folder)
    assert k > 15


# ---------------------------------------------------------------------------------------------------- F3: damaged disk


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    for step in (1, 2):
        write_tree(tmp_path / f"step_{step}", example_tree(step), {"step": step})
    return tmp_path


def check_fallback(folder: Path, named: str) -> None:
    path, refused = newest(folder)
    assert path == folder / "step_1"
    assert len(refused) == 1 and named in refused[0][1] and "\n" not in refused[0][1]
    with pytest.raises(ValueError, match="step_2"):
        read_tree(folder / "step_2")


def test_a_hundred_flipped_bits_are_each_detected(two_checkpoints: Path) -> None:
    """Fault F3: bits over all files in proportion to nothing but chance, the manifest as often as the weights."""
    rng = random.Random(0)
    files = sorted((two_checkpoints / "step_2").iterdir())
    for i in range(100):
        path = files[i % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip_bit(path, bit)
        check_fallback(two_checkpoints, path.name)
        flip_bit(path, bit)
    assert verify(two_checkpoints / "step_2") is None


def test_twenty_truncations_are_each_detected(two_checkpoints: Path) -> None:
    rng = random.Random(1)
    files = sorted((two_checkpoints / "step_2").iterdir())
    for i in range(21):
        path = files[i % len(files)]
        content = path.read_bytes()
        path.write_bytes(content[: 0 if i < len(files) else rng.randrange(len(content))])
        check_fallback(two_checkpoints, path.name)
        path.write_bytes(content)
    assert verify(two_checkpoints / "step_2") is None


@pytest.mark.parametrize("name", [MANIFEST, "structure.json", "tensors-00000.safetensors"])
def test_a_missing_file_or_a_link_in_its_place_is_detected(two_checkpoints: Path, name: str) -> None:
    path = two_checkpoints / "step_2" / name
    path.rename(two_checkpoints / name)
    check_fallback(two_checkpoints, name)
    if name != MANIFEST:
        path.symlink_to(two_checkpoints / name)
        check_fallback(two_checkpoints, name)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"schema": 2}, "schema 2, this version reads 1; update d1lit"),
        ({"files": {}}, "damaged"),
        ({"files": {"structure.json": {"size": 1, "sha256": ""}, "../x": {"size": 1, "sha256": ""}}}, "outside"),
        (
            {"files": {"structure.json": {"size": 1, "sha256": ""}, "/etc/hostname": {"size": 1, "sha256": ""}}},
            "outside",
        ),
        ({"files": {"structure.json": {"size": "1", "sha256": ""}}}, "damaged"),
        ({"files": None}, "damaged"),
    ],
)
def test_a_manifest_that_is_whole_but_wrong_is_refused(
    two_checkpoints: Path, change: dict[str, Any], cause: str
) -> None:
    path = two_checkpoints / "step_2" / MANIFEST
    body = json.loads(path.read_text())["body"] | change
    path.write_bytes(_manifest_bytes(body))
    check_fallback(two_checkpoints, cause)


# ------------------------------------------------------------------------------------------------------- F4: disk full


def test_a_disk_that_fills_at_any_write_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault F4 with an injected ENOSPC at the k-th write or fsync, after a short write."""
    write_tree(tmp_path / "step_1", example_tree(1))
    real_write, real_fsync = os.write, os.fsync
    failed = 0
    for k in range(1, 100):
        count = 0

        def full(k: int = k) -> bool:
            nonlocal count
            count += 1
            return count == k

        def write(descriptor: int, data: Any) -> int:
            if full():
                real_write(descriptor, bytes(data)[:7])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real_write(descriptor, bytes(data)[:300])  # short writes are legal

        def fsync(descriptor: int) -> None:
            if full():
                raise OSError(errno.ENOSPC, "No space left on device")
            real_fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            patch.setattr(os, "fsync", fsync)
            try:
                write_tree(tmp_path / "step_2", example_tree(2))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failed += 1
            else:
                break
        path, _ = newest(tmp_path)
        assert path is not None and path.name in ("step_1", "step_2")
        assert not list(tmp_path.glob(".*"))  # the half-written one has given its room back
    assert failed > 12 and same(read_tree(tmp_path / "step_2")[0], example_tree(2))


def test_a_real_size_limit_is_survived(tmp_path: Path) -> None:
    """Fault F4 by the kernel: RLIMIT_FSIZE lets no file grow beyond 4 kB."""
    write_tree(tmp_path / "step_1", example_tree(1))
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_tree(tmp_path / "step_2", {"big": torch.zeros(10_000)})
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert newest(tmp_path) == (tmp_path / "step_1", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_too_little_free_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**21)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    write_tree(tmp_path / "step_1", {"x": torch.zeros(200_000)})  # 0.8 MB: fits 2.2 times into 2 MiB
    with pytest.raises(OSError, match=r"needs 1\.0 MiB and 2\.2 times that free, found 2\.0 MiB") as caught:
        write_tree(tmp_path / "step_2", {"x": torch.zeros(250_000)})
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


# --------------------------------------------------------------------------------------------------------- F13: pickle


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    store = FolderCheckpointIO()
    (tmp_path / "step_1").mkdir()
    torch.save({"x": Bomb()}, tmp_path / "step_1" / "tensors-00000.safetensors")
    (tmp_path / "step_1" / "structure.json").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "step_1" / MANIFEST).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "last.ckpt").write_bytes(pickle.dumps(Bomb()))
    for name in ("step_1", "last.ckpt"):
        with pytest.raises(ValueError, match=name):
            store.load_checkpoint(tmp_path / name)
    # even where the manifest vouches for them
    entries = {}
    for name in ("structure.json", "tensors-00000.safetensors"):
        content = (tmp_path / "step_1" / name).read_bytes()
        entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "step_1" / MANIFEST).write_bytes(_manifest_bytes({"schema": 1, "facts": {}, "files": entries}))
    assert verify(tmp_path / "step_1") is None
    with pytest.raises(ValueError, match="step_1"):
        store.load_checkpoint(tmp_path / "step_1")
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------- F19: two in one folder

HOLD = """
import sys
from d1lit.checkpoint.run_folder import lock_run
with lock_run(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_with_pid_and_host_of_the_first(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {first.pid} on host {socket.gethostname()}"), lock_run(tmp_path):
        pass
    first.kill()  # SIGKILL: nothing of its own can release the lock
    first.wait()
    with lock_run(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} "), lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass
