"""A mixture of tasks: its shares, whose prompt and judge a row gets, and what is logged of each task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from d1lit.app.build import plan_run
from d1lit.app.components import build
from d1lit.app.composing import compose_jobs
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.models import build_tiny_tokenizer
from d1lit.modules.accounting import UpdateMetrics
from d1lit.modules.experience import is_judged, reward_batch
from d1lit.report.events import read_scalars
from d1lit.rewards.parts import OnTask, RewardParts, mixed_reward
from d1lit.tasks import MixedTask
from d1lit.types import RewardBatch, Verdict
from tests.end_to_end.small import EOS, small_policy
from tests.end_to_end.small import sampler as small_sampler
from tests.test_sampling import prompts

ROOT = Path(__file__).resolve().parents[1]
FEW = ["task.members.countdown.num_builtin.train=200", "task.members.sudoku.num_builtin.train=400"]
TWO = ["task=unified", *FEW, "task.shares={countdown: 1, sudoku: 3, gsm8k: 0, math500: 0}"]


@cache
def config() -> DictConfig:
    (composed,) = compose_jobs("train", [*TWO, "recipe=d1"]).configs
    return composed


@cache
def task() -> MixedTask:
    return build(config(), "task", MixedTask)


def test_an_epoch_holds_the_stated_shares_and_every_row() -> None:
    rows = task().rows("train")
    counts = Counter(row["task"] for row in rows)
    own = {name: len(member.rows("train")) for name, member in task().tasks.items()}
    assert set(counts) == {"countdown", "sudoku"}
    assert counts["sudoku"] == pytest.approx(3 * counts["countdown"], abs=2)
    assert all(counts[name] >= own[name] for name in own)  # no row is left out; the smaller task's come again
    assert len({row["id"] for row in rows}) == sum(own.values())
    assert {row["task"] for row in task().rows("test")} == {"countdown", "sudoku"}
    assert len(task().rows("test")) == sum(len(member.rows("test")) for member in task().tasks.values())


def test_counts_are_split_into_whole_numbers_that_add_up() -> None:
    for count in (1, 2, 7, 100, 1001):
        portions = task().portions(count)
        assert sum(number for _, number in portions if number is not None) == count
        for member, number in portions:
            assert number is not None
            share = {"countdown": 0.25, "sudoku": 0.75}[member.name]
            assert abs(number - share * count) < 1
    assert [number for _, number in task().portions(None)] == [None, None]


def test_rows_have_their_own_tasks_prompt_and_judges() -> None:
    tokenizer = build_tiny_tokenizer()
    ids, rows, dropped = task().encode("val", tokenizer)
    assert dropped == 0
    place = 0
    for name, member in task().tasks.items():
        own, examples, _ = member.encode("val", tokenizer)
        here = slice(place, place + len(own))
        assert ids[here] == own
        assert [{k: v for k, v in row.items() if k != "task"} for row in rows[here]] == [dict(e) for e in examples]
        assert all(row["task"] == name for row in rows[here])
        place += len(own)
    picked = [rows[0], rows[-1], rows[1]]
    texts = [f"<answer>{row['answer']}</answer>" for row in picked]
    grades = task().judges.grade(texts, picked)
    for row, text, grade in zip(picked, texts, grades, strict=True):
        (alone,) = task().tasks[row["task"]].judges.grade([text], [row])
        assert grade == alone
    encoded = plan_run(config()).stages[0].data.rows(task(), tokenizer, 0).rows
    assert Counter("numbers" in row.example for row in encoded) == {True: 250, False: 750}


class Length:
    """The length of the text."""

    def __call__(self, completions, examples):
        return [Verdict(float(len(text))) for text in completions]


def test_a_part_of_one_task_is_skipped_on_the_others() -> None:
    own = RewardParts({"length": Length()}, {"length": 2.0})
    reward = mixed_reward({"a": own, "b": own})
    assert reward.names == ("a/length", "b/length") and reward.weights == {"a/length": 2.0, "b/length": 2.0}
    examples = [{"task": "a"}, {"task": "b"}, {"task": "a"}, {"task": "a"}]
    verdicts = reward.grade(["x", "xx", "xxx", ""], examples)
    assert [v.outcome for v in verdicts["a/length"]] == ["ok", "skipped", "ok", "ok"]
    batch = reward_batch(verdicts, reward.weights, torch.device("cpu"), 0)
    assert batch.total.tolist() == [2.0, 4.0, 6.0, 0.0]
    assert bool(is_judged(batch).all()) and batch.asked is not None
    assert batch.asked.tolist() == [[True, False], [False, True], [True, False], [True, False]]
    assert OnTask("c", Length())(["x"], [{"task": "a"}])[0].outcome == "skipped"


def test_a_task_that_was_not_met_keeps_its_last_number() -> None:
    metrics, policy = UpdateMetrics(), small_policy()
    rollout = small_sampler()(policy, prompts(2, 3), 2, CounterDraws(0))

    def update(values: list[float], asked: list[bool]) -> dict[str, float]:
        known = torch.tensor([asked] * 4)
        value = torch.tensor([values] * 4) * known
        rewards = RewardBatch(value, torch.ones_like(known), torch.ones(2), 0, known)
        metrics.add_rollout(rollout, rewards, torch.zeros(4), ["a/x", "b/x"], 2, EOS)
        return metrics.finish()

    assert update([1.0, 5.0], [True, True])["rollout/reward/b/x"] == 5.0
    later = update([3.0, 0.0], [True, False])
    assert later["rollout/reward/a/x"] == 3.0 and later["rollout/reward/b/x"] == 5.0


@pytest.mark.parametrize(
    ("shares", "cause"),
    [
        ({"sugoku": 1}, "'sugoku' is not in both"),
        ({"countdown": 0, "sudoku": 0, "gsm8k": 0, "math500": 0}, "are no shares"),
        ({"sudoku": -1}, "are no shares"),
    ],
)
def test_impossible_shares_are_refused(shares: dict[str, float], cause: str) -> None:
    composed = config().copy()
    OmegaConf.update(composed, "task.shares", shares, force_add=True)
    with pytest.raises(ConfigError, match=rf"task.shares: .*{cause}.*Try: "):
        build(composed, "task", MixedTask)


@pytest.mark.slow
def test_a_small_unified_run(tmp_path: Path) -> None:
    """Both stages on all four tasks: each is evaluated by itself, and its reward parts are logged by name."""
    words = ["model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}", "recipe=d1", "task=unified", "debug=fast"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words, "scale.grpo.batch_size=8", f"run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "D1LIT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    stages = Counter((entry["stage"], entry["task"]) for entry in results["evaluations"])
    names = ["countdown", "sudoku", "gsm8k-synthetic", "math500-synthetic"]
    assert stages == {(stage, name): 1 for stage in ("base", "sft", "grpo") for name in names}
    assert all(entry["n"] == 4 for entry in results["evaluations"])
    assert any(key.startswith("sudoku/") for key in results["baselines"])
    scalars = read_scalars(tmp_path / "run" / "logs" / "grpo")
    logged = {name.split("/")[2] for name in scalars if name.startswith("rollout/reward/")}
    assert logged <= {"countdown", "sudoku", "gsm8k", "math500"} and len(logged) >= 2
