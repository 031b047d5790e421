"""Checkpoints in shards: what each process wrote is read whole, or cut anew for any number of processes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from d1lit.checkpoint import FolderCheckpointIO, newest, read_facts, read_tree, verify, write_tree
from d1lit.checkpoint import shards as shards_module
from d1lit.checkpoint.folder import PIECES, pieces_folder, serialise, write_file
from d1lit.checkpoint.shards import Rows, _mark, own_range, read_part, read_spread, write_pieces
from tests.test_checkpoint import crash_at

WHOLE = {
    "even": torch.arange(24.0).view(8, 3),
    "odd": torch.arange(21, dtype=torch.int64).view(7, 3),
    "few": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16),
    "vector": torch.linspace(0, 1, 5, dtype=torch.float64),
}


def tree_of(rank: int, world_size: int) -> dict:
    """What one process holds: its rows, nested as an optimizer's state is, beside what all have."""

    def rows(name):
        start, stop = own_range(len(WHOLE[name]), rank, world_size)
        return Rows(WHOLE[name][start:stop].clone(), tuple(WHOLE[name].shape))

    return {
        "state_dict": {name: rows(name) for name in WHOLE},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": rows("even")}}}],
        "loops": {"step": 4, "text": ("a", None)},
    }


def written(folder: Path, world_size: int) -> Path:
    """The folder as so many processes write it."""
    beside = pieces_folder(folder)
    beside.mkdir(parents=True)
    for rank in range(world_size):
        mine: dict = {}
        marked = _mark(tree_of(rank, world_size), (), rank, world_size, mine)
        name = f"{PIECES}{rank:05d}.safetensors"
        (beside / f"{name}.json").write_text(json.dumps(write_file(beside / name, serialise(mine))))
    write_tree(folder, marked, {"step": 4})
    assert not beside.exists()
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_shards_read_as_a_whole_are_the_whole(world_size, tmp_path):
    folder = written(tmp_path / "step_4", world_size)
    assert len(list(folder.glob(f"{PIECES}*.safetensors"))) == world_size
    tree, facts = read_tree(folder)
    for name, value in WHOLE.items():
        assert torch.equal(tree["state_dict"][name], value) and tree["state_dict"][name].dtype == value.dtype
    assert torch.equal(tree["optimizer_states"][0]["state"][0]["exp_avg"], WHOLE["even"])
    assert tree["loops"] == {"step": 4, "text": ("a", None)} and facts == {"step": 4}
    assert newest(tmp_path) == (folder, []) and read_facts(folder) == {"step": 4}


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (3, 2), (4, 9), (9, 4)])
def test_another_number_of_processes_reads_its_own_rows(before, after, tmp_path):
    folder = written(tmp_path / "step_4", before)
    for rank in range(after):
        tree = read_spread(folder, rank, after)
        for name, value in WHOLE.items():
            rows, (start, stop) = tree["state_dict"][name], own_range(len(value), rank, after)
            assert rows.shape == tuple(value.shape)
            assert torch.equal(rows.local, value[start:stop]), (name, rank)
            assert rows.local.shape[1:] == value.shape[1:] and rows.local.dtype == value.dtype
        assert tree["optimizer_states"][0]["state"][0]["step"] == 3.0


def test_rows_of_a_process_are_those_that_torch_gives_it():
    for length in range(1, 12):
        for world_size in range(1, 6):
            chunks = [len(part) for part in torch.arange(length).chunk(world_size)]
            ranges = [own_range(length, rank, world_size) for rank in range(world_size)]
            assert [stop - start for start, stop in ranges][: len(chunks)] == chunks


def test_a_damaged_shard_is_refused_by_every_reader(tmp_path):
    folder = written(tmp_path / "step_4", 2)
    file = folder / f"{PIECES}00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert "sha256" in (verify(folder) or "")
    with pytest.raises(ValueError, match="sha256"):
        read_spread(folder, 0, 2)
    with pytest.raises(ValueError, match="sha256"):
        read_tree(folder)
    file.unlink()
    assert "missing" in (verify(folder) or "")


def test_one_entry_is_read_without_the_rest(tmp_path):
    folder = written(tmp_path / "step_4", 3)
    stored = read_part(folder, "state_dict")
    assert stored.keys() == WHOLE.keys()
    assert all(torch.equal(stored[name](), value) for name, value in WHOLE.items())


def save(store: FolderCheckpointIO, folder: Path) -> None:
    """A sharded save of one process, as the strategy makes it."""
    store.save_checkpoint(write_pieces(tree_of(0, 1), folder), folder)


def test_a_crash_at_every_call_of_a_sharded_save_leaves_a_checkpoint(tmp_path):
    """F2 again, over the rows that each process writes and their way into the checkpoint."""
    store, k, crashed, outcomes = FolderCheckpointIO(keep=2), 0, True, []
    while crashed:
        k += 1
        folder = tmp_path / str(k)
        for step in (1, 2, 3):
            save(store, folder / f"step_{step}")
        crashed = crash_at(k, lambda folder=folder: save(store, folder / "step_4"))
        path, refused = newest(folder)
        assert path is not None and path.name in ("step_3", "step_4") and refused == []
        for name, value in WHOLE.items():
            assert torch.equal(read_tree(path)[0]["state_dict"][name], value)
        outcomes.append(path.name)
        save(store, folder / "step_4")  # not troubled by what the crash left behind
        assert sorted(p.name for p in folder.iterdir()) == ["step_3", "step_4"]
        shutil.rmtree(folder)
    print(f"crashed at {k - 1} calls: {outcomes.count('step_3')} left the old, {outcomes.count('step_4') - 1} the new")
    assert k > 25 and outcomes == sorted(outcomes)


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
def test_a_disk_that_is_full_leaves_the_older_checkpoint_and_no_rows(call, tmp_path, monkeypatch):
    """F4 again, at each of these calls of a sharded save."""
    store, failed, k = FolderCheckpointIO(keep=2), True, 0
    save(store, tmp_path / "step_3")
    real = getattr(os, call)
    while failed:
        k += 1
        count, failed = 0, False

        def full(*args, real=real, at=k, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                save(store, tmp_path / "step_4")
            except OSError:
                failed = True
        assert verify(tmp_path / "step_3") is None
        assert not pieces_folder(tmp_path / "step_4").exists()
        assert newest(tmp_path)[0] is not None
    assert k > 1


def test_the_first_process_tells_the_others_that_it_has_no_folder(tmp_path, monkeypatch):
    """It must not stay away from where they wait."""
    told = []
    monkeypatch.setattr(shards_module, "all_gather_objects", lambda mine: told.append(mine) or [mine, None])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        write_pieces(tree_of(0, 2), tmp_path / "file" / "step_4")
    assert len(told) == 1 and "Not a directory" in told[0]
    monkeypatch.setattr(shards_module, "all_gather_objects", lambda mine: [mine, "No space left on device"])
    with pytest.raises(OSError, match="No space left"):
        write_pieces(tree_of(0, 2), tmp_path / "step_4")
    assert not pieces_folder(tmp_path / "step_4").exists()


def test_what_a_crashed_save_left_is_swept_away_and_a_failed_write_is_everybodys_error(tmp_path, monkeypatch):
    stale = pieces_folder(tmp_path / "step_4")
    stale.mkdir()
    (stale / "shard-00007.safetensors").write_bytes(b"stale")
    (stale / "shard-00007.safetensors.json").write_text("{}")
    marked = write_pieces(tree_of(0, 1), tmp_path / "step_4")
    write_tree(tmp_path / "step_4", marked, {})
    assert verify(tmp_path / "step_4") is None
    assert not (tmp_path / "step_4" / "shard-00007.safetensors").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards_module, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_pieces(tree_of(0, 1), tmp_path / "step_5")
