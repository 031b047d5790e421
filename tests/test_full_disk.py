"""F4 beside checkpoints: a full disk costs what is only there to be looked at, and is told before the first step."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers.logger import DummyLogger

from d1lit.callbacks import SampleTable, SaveCheckpoints, samples
from d1lit.checkpoint import FolderCheckpointIO, folder, list_checkpoints
from d1lit.errors import from_system
from d1lit.modules import StageData
from tests.end_to_end import small


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullLogger(DummyLogger):
    """Cannot write what it holds."""

    def save(self) -> None:
        full()


def train(callbacks: Sequence[L.Callback], num_updates: int = 4) -> list[str]:
    """A stage of diffu-GRPO; what it warns of."""
    module = small.make_module(small.small_policy(), num_updates=num_updates)

    def prompts(plan: Any) -> small.PromptCycles:
        return small.PromptCycles(small.prompt_rows(), plan, module.num_inner_updates, num_updates, small.EOS, 1)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=num_updates,
        callbacks=list(callbacks),
        plugins=[FolderCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=StageData(prompts, 4, 4))
    assert trainer.global_step == num_updates
    return [str(warning.message) for warning in caught]


def test_a_log_that_cannot_be_written_is_no_reason_for_no_checkpoint(tmp_path: Path) -> None:
    save = SaveCheckpoints(tmp_path, 2, None)
    asked: list[Path] = []
    trainer = SimpleNamespace(
        loggers=[FullLogger()], global_step=3, max_steps=9, save_checkpoint=asked.append, strategy=None
    )
    save._step, save._loops = 3, {}
    with pytest.warns(UserWarning, match="the log up to step 3 is not written: .*No space left"):
        assert save.save_now(trainer) == tmp_path / "step_3"  # type: ignore[arg-type]
    assert asked == [tmp_path / "step_3"]


def test_samples_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "append_records", full)
    said = train(
        [SampleTable("grpo", tmp_path / "samples.jsonl", None, 1, 2), SaveCheckpoints(tmp_path / "c", 2, None)]
    )
    assert len([line for line in said if "samples of update" in line and "No space left" in line]) == 2


def test_too_little_room_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by a line at each save of a run that has no checkpoint after days."""
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError) as caught:
        train([SaveCheckpoints(tmp_path, 2, None)])
    error = from_system(caught.value)
    assert error is not None and error.code == "E506" and "free some space" in str(error) and str(tmp_path) in error.key
    usage.free = 10**9
    train([SaveCheckpoints(tmp_path, 2, None)])
    assert len(list_checkpoints(tmp_path)) == 2
