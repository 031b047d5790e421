"""What a run says while it goes on: a bar on a terminal, lines in a log, and a time that turns out right."""

import io
import re
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from rich.console import Console

from d1lit.callbacks import progress
from d1lit.callbacks.progress import ConsoleProgress, RowsProgress
from d1lit.modules import DiffuGRPO
from d1lit.report import console as console_module

CYCLE = (11.0, 1.0, 1.0)
"""Seconds of three inner updates, the first with its rollout."""


def told(monkeypatch, console: Console, first: int = 0, total: int = 12) -> list[tuple[float, str]]:
    """A stage of whole cycles on a clock of its own: for each update the seconds until its end, and what was printed."""
    clock = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    trainer, module = MagicMock(spec=L.Trainer), MagicMock(spec=DiffuGRPO)
    trainer.global_step, trainer.is_global_zero = first, True
    trainer.callback_metrics = {"rollout/reward": torch.tensor(0.5)}
    module.num_inner_updates = 3
    callback = ConsoleProgress("grpo", total, console, seconds_between_lines=0.0)
    callback.on_train_start(trainer, module)
    durations = [CYCLE[n % 3] for n in range(total - first)]
    found, file = [], console.file
    assert isinstance(file, io.StringIO)
    for n, seconds in enumerate(durations):
        clock += seconds
        trainer.global_step += 1
        before = len(file.getvalue())
        callback.on_train_batch_end(trainer, module, None, None, n)
        found.append((sum(durations[n + 1 :]), file.getvalue()[before:]))
    callback.on_train_end(trainer, module)
    return found


@pytest.mark.parametrize("first", [0, 3])
def test_the_time_left_is_the_time_that_was_left(monkeypatch, first):
    lines = told(monkeypatch, Console(file=io.StringIO(), width=120), first)
    for left, line in lines[:2]:
        assert "left" not in line, "before the first cycle has ended nobody can know"
        assert left
    for left, line in lines[2:]:
        match = re.search(r"\((\d+) s left\)", line)
        assert match is not None, line
        assert float(match[1]) == left
    assert lines[0][1].startswith(f"grpo: {first + 1}/12 reward 0.5")


def test_a_log_and_no_color_get_plain_lines(monkeypatch):
    for options in ({}, {"force_terminal": True, "no_color": True}):
        lines = told(monkeypatch, Console(file=io.StringIO(), width=120, highlight=False, **options))
        assert all(text.count("\n") == 1 for _, text in lines)
        assert not any("\x1b" in text for _, text in lines)


def test_a_terminal_gets_a_bar(monkeypatch):
    file = io.StringIO()
    told(monkeypatch, Console(file=file, width=120, force_terminal=True, no_color=False))
    assert "12/12" in file.getvalue()
    assert "\x1b[" in file.getvalue()


def test_no_color_reaches_the_table(monkeypatch):
    entry = {
        "stage": "grpo", "task": "count", "completion_length": 16, "n": 4, "accuracy": 0.5, "interval": [0.2, 0.8], "d1_correct": 2.0, "d1_out_of": 4.0,
        "extra": {}, "effective_tokens": 3.0, "truncated_fraction": 0.0, "failed_fraction": 0.0,
    }  # fmt: skip
    results = {"recipe": "d1", "task": "count", "model": "tiny", "seed": 0, "evaluations": [entry]}
    monkeypatch.setenv("NO_COLOR", "1")
    shown = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(console_module, "console", shown)
    console_module.show_table(results)
    assert isinstance(shown.file, io.StringIO)
    assert "20.0 to 80.0" in shown.file.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown.file.getvalue())


def test_an_evaluation_says_how_far_it_is(monkeypatch):
    """Rows of an earlier attempt cost nothing, so they count for nothing in the time that is left."""
    clock, lines = 0.0, []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    step = RowsProgress("grpo-math500", lines.append, seconds_between_lines=10.0)
    for done in range(200, 501, 20):
        clock += 6.0
        step(done, 500)
    assert lines[0] == "grpo-math500: 220/500 rows evaluated (84 s left)"
    assert lines[1] == "grpo-math500: 260/500 rows evaluated (72 s left)"
    assert len(lines) == 7, "a line every ten seconds at most, and none for the last rows"
