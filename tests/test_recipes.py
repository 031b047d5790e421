"""What a run keeps of its stages beside their weights, and what it makes of what an earlier start has left."""

import errno
import os
from pathlib import Path

import pytest
import torch

from d1lit import recipes
from d1lit.checkpoint import broken, put_whole, write_tree
from d1lit.checkpoint import folder as store
from d1lit.errors import ConfigError
from d1lit.models import Policy, save_weights
from d1lit.recipes import Stage, StageFolder, read_costs, run_stage, write_cost
from tests.end_to_end.small import small_policy
from tests.test_checkpoint import crash_at, flip_bit


def test_accounts_are_kept_where_the_stage_has_no_folder_yet(tmp_path):
    """Without checkpoints and logs nothing makes the stage's folder before its account is written."""
    write_cost(StageFolder(tmp_path / "stages" / "sft"), {"forwards": 3, "tokens": 40, "flops": 2.0})
    write_cost(StageFolder(tmp_path / "stages" / "grpo"), {"forwards": 4, "tokens": 2, "flops": 0.5})
    costs = read_costs(tmp_path, ["sft", "grpo", "later"])
    assert (costs["forwards"], costs["tokens"], costs["flops"]) == (7, 42, 2.5)
    assert set(costs["stages"]) == {"sft", "grpo"}
    assert not list(tmp_path.rglob("*.staging"))


class Begins(Exception):
    """The stage's trainer is asked for: what is cut off its logs is cut off now."""


def stage(selects_best: bool = False) -> Stage:
    """One that tells at which step it begins, and goes no further."""

    def make_trainer(folder: Path, first_step: int):
        raise Begins(first_step)

    return Stage("sft", None, False, selects_best, lambda policy: None, lambda: None, make_trainer)  # type: ignore[arg-type, return-value]


def run(folder: StageFolder, said: list[str] | None = None, policy: Policy | None = None, **options: bool) -> Policy:
    starts_over = options.pop("starts_over", False)
    lines = [] if said is None else said
    return run_stage(folder, policy or small_policy(), stage(**options), 0, lines.append, starts_over)


def with_checkpoints(folder: StageFolder, *steps: int) -> StageFolder:
    for step in steps:
        write_tree(folder.checkpoints / f"step_{step}", {"weight": torch.ones(3)}, {"step": step})
    return folder


def test_a_stage_none_of_whose_checkpoints_is_whole_is_refused(tmp_path):
    """It would begin again, and cut its logs off at step 0."""
    folder = with_checkpoints(StageFolder(tmp_path / "sft"), 5, 10)
    for path in folder.checkpoints.iterdir():
        flip_bit(path / "tensors-00000.safetensors", 100)
    with pytest.raises(ConfigError, match=r"step_10.*sha256.*step_5.*sha256.*resume=force.*\[E508\]"):
        run(folder)
    said: list[str] = []
    with pytest.raises(Begins, match="0"):
        run(folder, said, starts_over=True)
    assert ["step_10" in line for line in said] == [True, False]
    with_checkpoints(folder, 5)
    with pytest.raises(Begins, match="5"):
        run(folder)


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    """The same command finds the newest checkpoint later; an older one would be taken now, or none."""
    folder, real = with_checkpoints(StageFolder(tmp_path / "sft"), 5, 10), store.check_on_disk

    def failing(path: Path, entry) -> None:
        if "step_10" in str(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        real(path, entry)

    monkeypatch.setattr(store, "check_on_disk", failing)
    with pytest.raises(ConfigError, match=r"step_10.* cannot be read \(Stale file handle\).*the same command"):
        run(folder)
    monkeypatch.undo()
    with pytest.raises(Begins, match="10"):
        run(folder)


def test_damaged_weights_of_a_finished_stage_are_made_again_from_its_last_checkpoint(tmp_path):
    folder, policy = with_checkpoints(StageFolder(tmp_path / "sft"), 12), small_policy(seed=9)
    put_whole(folder.weights, lambda place: save_weights(policy, place))
    found = run(folder, policy=small_policy(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), policy.parameters(), strict=True))
    flip_bit(folder.weights / "model.safetensors", 2000)
    said: list[str] = []
    with pytest.raises(Begins, match="12"):
        run(folder, said)
    assert "is not used" in said[0] and "model.safetensors" in said[0] and "sha256" in said[0]


def test_a_stage_that_an_earlier_version_has_finished_is_not_trained_again(tmp_path):
    """It wrote weights without sums; a folder without weights is none."""
    folder, policy = with_checkpoints(StageFolder(tmp_path / "sft"), 12), small_policy(seed=9)
    save_weights(policy, folder.weights)
    said: list[str] = []
    found = run(folder, said, policy=small_policy(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), policy.parameters(), strict=True))
    assert "no sums" in said[0] and "finished earlier" in said[1]
    (folder.weights / "model.safetensors").rename(folder.best.parent / "model.safetensors")
    with pytest.raises(Begins, match="12"):
        run(folder)
    save_weights(policy, folder.best)
    with pytest.raises(Begins, match="12"):
        run(folder, selects_best=True)


def test_damaged_best_weights_are_named_before_anything_is_trained(tmp_path):
    folder = with_checkpoints(StageFolder(tmp_path / "sft"), 4)
    put_whole(folder.best, lambda place: save_weights(small_policy(), place))
    flip_bit(folder.best / "model.safetensors", 2000)
    with pytest.raises(ConfigError, match=r"were best in stage sft cannot be used.*best/model\.safetensors.*\[E508\]"):
        run(folder, selects_best=True)


def test_a_crash_at_every_call_of_a_hand_over_leaves_the_old_weights_or_the_new(tmp_path):
    """Nothing of what was left stays when the stage is looked at again."""
    crashed, k, found = True, 0, []
    while crashed:
        k += 1
        folder = with_checkpoints(StageFolder(tmp_path / str(k)), 3)

        def writing(text: str, place: Path = folder.best) -> None:
            put_whole(place, lambda staging: (staging / "model.safetensors").write_text(text))

        writing("old")
        crashed = crash_at(k, lambda writing=writing: writing("new"))
        with pytest.raises(Begins, match="3"):
            run(folder, selects_best=True)
        assert broken(folder.best) is None
        assert [file.name for file in folder.path.iterdir() if file.name.startswith(".")] == []
        found.append((folder.best / "model.safetensors").read_text())
    assert k > 6 and set(found) == {"old", "new"} and found == sorted(found, reverse=True)


def test_what_a_tokenizer_writes_into_folders_is_handed_over_too(tmp_path):
    """It keeps several chat templates in a folder of their own."""

    def write(place: Path) -> None:
        (place / "templates" / "more").mkdir(parents=True)
        (place / "templates" / "more" / "tool.jinja").write_text("{{ x }}")
        (place / "model.safetensors").write_text("weights")

    for with_manifest in (True, False):
        put_whole(tmp_path / "model", write, with_manifest)
        assert (tmp_path / "model" / "templates" / "more" / "tool.jinja").read_text() == "{{ x }}"
        assert (broken(tmp_path / "model") is None) == with_manifest


def test_all_processes_begin_where_the_first_has_found_the_checkpoint(tmp_path):
    """A disk may show another process an older state: each would train on from a step of its own."""
    folder, children = with_checkpoints(StageFolder(tmp_path / "sft"), 5, 10), []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            status = 99
            try:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2
                )
                if rank == 1:
                    recipes.newest = lambda folder: (None, [])
                run(folder)
            except Begins as at:
                status = at.args[0]
            finally:
                os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [10, 10]
