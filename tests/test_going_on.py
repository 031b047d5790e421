"""Whether a run that is started again is still the same one: its values, its base, its rows, its machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from d1lit.app import running, tiny_base
from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.pinning import inputs, weights_sha256
from d1lit.app.run_policy import kept_base
from d1lit.checkpoint import broken, seal
from d1lit.errors import ConfigError
from d1lit.models import build_tiny_tokenizer
from d1lit.stopping import StopFlag
from tests.test_checkpoint import HOLD, flip_bit

FAST = ["task=sudoku", "debug=fast"]


def composed(*words: str) -> DictConfig:
    (config,) = compose_jobs("train", [*FAST, *words]).configs
    return config


def begun(folder: Path, finished: Sequence[str] = ()) -> Path:
    """A run's folder, some of its stages finished."""
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(composed(), resolve=True))
    (folder / "overrides.json").write_text(json.dumps(FAST))
    for name in finished:
        (folder / "stages" / name / "model").mkdir(parents=True)
    return folder


def test_every_changed_key_is_listed(tmp_path):
    words = [f"loss.epsilon_{side}=0.{n}" for n, side in enumerate(("low", "high"), 3)]
    words += ["seed=7", "sampler.num_steps=20", "stages.grpo.optimizer.lr=0.5", "stages.sft.optimizer.lr=0.5"]
    with pytest.raises(ConfigError) as refused:
        running.refuse_changes(composed(*words), begun(tmp_path / "run"))
    keys = [word.split("=")[0] for word in words]
    assert all(f"{key}: " in refused.value.cause for key in keys), refused.value
    assert " more" not in refused.value.cause


@pytest.mark.parametrize("word", ["callbacks.skip=null", "callbacks.alarms.max_rollbacks=1", "callbacks.alarms=null"])
def test_callbacks_that_change_results_may_not_change(tmp_path, word):
    folder = begun(tmp_path / "run")
    running.refuse_changes(composed("callbacks.save=null", "callbacks.samples.rows=2"), folder)
    with pytest.raises(ConfigError, match=r"callbacks\.(skip|alarms)"):
        running.refuse_changes(composed(word), folder)


@pytest.mark.parametrize("word", ["seed=7", "stages.sft.max_updates=3", "task.max_prompt_length=150"])
def test_force_does_not_say_of_a_finished_stage_what_it_was_not_made_with(tmp_path, word):
    folder = begun(tmp_path / "run", finished=["sft"])
    with pytest.raises(ConfigError, match=f"stage sft of .* is finished.*{word.split('=')[0]}"):
        running.refuse_changes(composed(word, "resume=force"), folder)
    assert (folder / "config.yaml").exists()
    before = (folder / "config.yaml").read_text()
    assert running.refuse_changes(composed("stages.grpo.max_updates=3", "loss.beta=0.1", "resume=force"), folder)
    assert (folder / "config.yaml").read_text() == before, "the inputs may yet be refused"
    running.replace_values(folder, {"overrides.json": "[]", "config.yaml": "seed: 7"})
    assert [file.read_text() for file in folder.glob("config.until-*.yaml")] == [before]
    assert (folder / "config.yaml").read_text() == "seed: 7" and len(list(folder.iterdir())) == 5


def test_stages_without_a_configuration_are_refused(tmp_path):
    (tmp_path / "run" / "stages" / "sft" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        running.refuse_changes(composed(), tmp_path / "run")
    running.refuse_changes(composed("resume=force"), tmp_path / "run")


def base_and_rows(folder: Path) -> tuple[Path, Path]:
    """Weights of a base, and 40 rows of countdown."""
    base, rows = folder / "base", folder / "rows.jsonl"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(bytes(64))
    rows.write_text("".join(json.dumps({"numbers": [n, 2, 3], "target": n + 1}) + "\n" for n in range(10, 50)))
    return base, rows


def inputs_of(base: Path, rows: Path) -> dict[str, str]:
    words = [f"task.train_data={rows}", "task.columns.numbers=numbers", "task.columns.target=target", "task.val_rows=4"]
    (config,) = compose_jobs("train", ["task=countdown", "debug=fast", "recipe=grpo", *words]).configs
    return inputs(plan_run(config), base, build_tiny_tokenizer())


def test_an_edited_base_or_row_is_refused_and_named(tmp_path):
    """The configuration names the same folder and the same file as before."""
    base, rows = base_and_rows(tmp_path)
    (tmp_path / "run" / "stages" / "sft" / "model").mkdir(parents=True)

    def start(*words: str) -> None:
        running.refuse_other_inputs(tmp_path / "run", composed(*words), inputs_of(base, rows))

    start()
    start()
    flip_bit(base / "model.safetensors", 9)
    with pytest.raises(ConfigError, match=r"the base's weights: .*\[E503\]"):
        start()
    with pytest.raises(ConfigError, match=r"stage sft of .* is finished"):
        start("resume=force")
    flip_bit(base / "model.safetensors", 9)
    first, second, *rest = rows.read_text().splitlines(True)
    rows.write_text("".join([second, first, *rest]))
    plan_run.__globals__["_task"].cache_clear()
    with pytest.raises(ConfigError, match="rows of grpo: ") as refused:
        start()
    assert "the base's" not in refused.value.cause
    start("resume=force")  # the finished stage has not seen these rows
    start()


def test_another_environment_is_told_in_one_line(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(running, "say", said.append)
    record = running.environment()
    (tmp_path / "environment.json").write_text(json.dumps({**record, "command": ["train.py", "again"]}))
    running.tell_other_environment(tmp_path)
    assert said == []
    (tmp_path / "environment.json").write_text(json.dumps({**record, "threads": 99, "python": "3.9"}))
    running.tell_other_environment(tmp_path)
    assert len(said) == 1 and "threads: 99 -> " in said[0] and "python: '3.9' -> " in said[0]


@pytest.mark.parametrize("text", ["", '{"threads": ', "[1]"])
def test_a_damaged_note_of_an_earlier_start_is_unknown_and_no_obstacle(tmp_path, monkeypatch, text):
    said: list[str] = []
    monkeypatch.setattr(running, "say", said.append)
    for name in ("environment.json", "inputs.json"):
        (tmp_path / name).write_text(text)
    running.tell_other_environment(tmp_path)
    running.refuse_other_inputs(tmp_path, composed(), {"the base's weights": "abc"})
    assert ["is damaged" in line for line in said] == [True, True]
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"the base's weights": "abc"}


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert running.environment()["commit"] is None


def test_values_of_a_start_that_is_refused_for_its_inputs_stand_nowhere(tmp_path, monkeypatch):
    """`resume=force` with a value that no finished stage had, and a base that one was made from."""
    folder = begun(tmp_path / "run", finished=["sft"])
    before = {file.name: file.read_text() for file in folder.glob("*.*") if file.is_file()}
    (folder / "inputs.json").write_text(json.dumps({"the base's weights": "another"}))

    def base_policy(plan: Any, folder: Path, flag: StopFlag, check: Any) -> Any:
        check(tmp_path, build_tiny_tokenizer())

    monkeypatch.setattr(running, "base_policy", base_policy)
    words = ["loss.beta=0.1", "resume=force", f"run_dir={folder}"]
    with pytest.raises(ConfigError, match=r"stage sft of .* is finished.*the base's weights"):
        running.run_training(composed(*words), words)
    assert {name: (folder / name).read_text() for name in before} == before
    assert not list(folder.glob("*.until-*"))


# ----------------------------------------------------------------------------------------------------------- the base


TOKENIZER = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer_config.json").write_text("{}"))


class Made:
    """Stands for the pretraining: what is kept is one file."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.times = home, 0
        monkeypatch.setattr(tiny_base, "base_home", lambda plan: home)
        monkeypatch.setattr(tiny_base, "make_base", self)

    def __call__(self, *args: Any) -> None:
        self.times += 1
        weights = self.home.parent / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        (weights / "model.safetensors").write_bytes(bytes(64))
        (weights / "made").write_text(str(self.times))
        tiny_base.keep_base(weights, TOKENIZER, self.home)


def test_a_kept_base_that_is_damaged_is_made_again(tmp_path, monkeypatch):
    home = tmp_path / "cache" / "abc"
    made = Made(home, monkeypatch)
    for times in (1, 1, 2):
        if times == 2:
            flip_bit(home / "model.safetensors", 9)
        tiny_base.make_shared_base(SimpleNamespace(), StopFlag())  # type: ignore[arg-type]
        assert made.times == times and broken(home) is None


def test_a_base_that_another_run_is_making_is_waited_for(tmp_path, monkeypatch):
    """Two runs of several processes, started together on one base."""
    home = tmp_path / "cache" / "abc"
    made, said = Made(home, monkeypatch), []
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.with_name("abc.work"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"

    def other_is_done(seconds: float) -> None:
        home.mkdir()
        (home / "model.safetensors").write_bytes(bytes(32))
        seal(home)
        holder.communicate()

    monkeypatch.setattr(tiny_base.time, "sleep", other_is_done)
    monkeypatch.setattr(tiny_base, "say", said.append)
    tiny_base.make_shared_base(SimpleNamespace(), StopFlag())  # type: ignore[arg-type]
    assert made.times == 0 and len(said) == 1 and f"process {holder.pid}" in said[0]


def start(
    run: Path, settings: str, monkeypatch: pytest.MonkeyPatch, check: Any = lambda place, tokenizer: None
) -> Path:
    """A start of a run; where it has its base from."""
    monkeypatch.setattr(tiny_base, "settings_hash", lambda plan: settings)
    plan = SimpleNamespace(base="pretraining", make_policy=lambda place: (place, TOKENIZER))
    return tiny_base.base_policy(plan, run, StopFlag(), check)[0]  # type: ignore[arg-type,return-value]


def test_a_run_keeps_its_base_where_the_cache_is_emptied_or_other_code_makes_another(tmp_path, monkeypatch):
    home, own = tmp_path / "cache" / "abc", kept_base(tmp_path / "run")
    made = Made(home, monkeypatch)
    assert start(tmp_path / "run", "a", monkeypatch) == home
    kept = weights_sha256(home)
    shutil.rmtree(home)
    assert start(tmp_path / "run", "a", monkeypatch) == own and made.times == 1 and weights_sha256(own) == kept
    flip_bit(own / "model.safetensors", 9)
    assert start(tmp_path / "run", "a", monkeypatch) == home and made.times == 2 and broken(own) is None
    (own / "tokenizer_config.json").unlink()  # as the pretraining leaves it before it is kept
    assert start(tmp_path / "run", "a", monkeypatch) == home and made.times == 2 and broken(own) is None


def test_a_base_of_other_settings_is_not_taken_for_the_one_that_is_asked_for(tmp_path, monkeypatch):
    """As `resume=force` may ask; nor is what its pretraining has left gone on from."""
    home, own = tmp_path / "cache" / "abc", kept_base(tmp_path / "run")
    made = Made(home, monkeypatch)
    start(tmp_path / "run", "a", monkeypatch)
    shutil.rmtree(home)
    with monkeypatch.context() as patch:
        shared: list[Any] = []
        patch.setattr(tiny_base, "make_shared_base", lambda *words: (shared.append(words), made()))
        assert start(tmp_path / "run", "b", monkeypatch) == home and len(shared) == 1
    assert made.times == 2 and (own / "made").read_text() == "2"
    shutil.rmtree(home)
    assert start(tmp_path / "run", "b", monkeypatch) == own


def test_a_base_that_one_machine_does_not_see_is_refused_by_all(tmp_path, monkeypatch):
    """The first process has made it and sees it; it alone may speak."""
    Made(tmp_path / "cache" / "abc", monkeypatch)
    monkeypatch.setattr(tiny_base, "all_gather_objects", lambda mine: [mine, ("node7", False), ("node7", False)])
    with pytest.raises(ConfigError, match=r"is not seen on node7\..*\[E601\]"):
        start(tmp_path / "run", "a", monkeypatch)


def test_a_base_that_cannot_be_kept_ends_the_run_and_leaves_nothing(tmp_path, monkeypatch):
    home, weights = tmp_path / "cache" / "abc", tmp_path / "weights"
    weights.mkdir()

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        tiny_base.keep_base(weights, SimpleNamespace(save_pretrained=full), home)
    assert list(home.parent.iterdir()) == []
    tiny_base.keep_base(weights, TOKENIZER, home)
    tiny_base.keep_base(weights, TOKENIZER, home)  # another process was faster
    assert list(home.parent.iterdir()) == [home] and broken(home) is None


def test_a_refused_run_leaves_no_base_behind(tmp_path, monkeypatch):
    Made(tmp_path / "cache" / "abc", monkeypatch)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ConfigError), running.removed_if_refused(run):
        start(run, "a", monkeypatch)
        raise ConfigError("key", "cause", "cure", "E503")
    assert not run.exists() and (tmp_path / "cache" / "abc").exists()


def test_only_what_the_hub_has_put_there_goes_by_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    found = {}
    for name in (f"models--a--b/snapshots/{commit}", f"mine/snapshots/{commit}", "models--a--b/snapshots/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(bytes(64))
        found[name] = weights_sha256(tmp_path / name)
    assert [value.startswith("commit ") for value in found.values()] == [True, False, False]
    flip_bit(tmp_path / name / "model.safetensors", 9)
    os.utime(tmp_path / name / "model.safetensors", ns=(1, 1))  # clocks of file systems are coarse
    assert weights_sha256(tmp_path / name) != found[name]
