"""A judge that fails is seen, pays nothing, costs nothing, and ends a run that it mostly fails in."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from d1lit.advantages import group_mean
from d1lit.callbacks import SkipNonFinite
from d1lit.modules.experience import is_judged, neutral_totals, whole_rows
from d1lit.rewards.parts import RewardParts
from d1lit.types import Example, Outcome, RewardBatch, Verdict
from tests.end_to_end.small import EvenTokens, fit, make_module, small_policy

ROOT = Path(__file__).resolve().parents[1]


def test_a_completion_that_one_part_failed_to_judge_counts_as_not_judged() -> None:
    value = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]])
    valid = torch.tensor([[True, True], [False, True], [True, True], [True, False]])
    batch = RewardBatch(value, valid, torch.tensor([1.0, 0.5]))
    assert is_judged(batch).tolist() == [True, False, True, False]
    # Without it the second row would stand at 0.5 and the fourth at 3.0, below and above what nobody knows.
    assert group_mean(whole_rows(batch), 4).tolist() == [0.75, 0.0, -0.75, 0.0]
    assert neutral_totals(batch, 4).tolist() == [2.5, 1.75, 1.0, 1.75]
    unweighted = RewardBatch(value, valid, torch.tensor([1.0, 0.0]))
    assert is_judged(unweighted).tolist() == [True, False, True, True]
    assert group_mean(whole_rows(unweighted), 4).tolist() == [0.0, 0.0, -1.0, 1.0]
    none = RewardBatch(value, torch.zeros_like(valid), torch.ones(2))
    assert neutral_totals(none, 4).tolist() == [0.0] * 4 and group_mean(whole_rows(none), 4).tolist() == [0.0] * 4


class FailsOn:
    """Ends with an outcome of failure on chosen places of a rollout; 1 elsewhere."""

    def __init__(self, places: Sequence[int], outcome: Outcome) -> None:
        self.places = set(places)
        self.outcome: Outcome = outcome

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return [Verdict(0.0, self.outcome) if n in self.places else Verdict(1.0) for n in range(len(completions))]


class Logged(L.Callback):
    """The numbers and the advantages of the latest step."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.advantages: list[float] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.advantages = [a for e in pl_module.experience for a in e.advantages.tolist()]


def test_the_share_of_time_outs_is_logged_and_such_completions_teach_nothing() -> None:
    parts = RewardParts({"even": EvenTokens(), "slow": FailsOn([1, 5, 6], "timeout")}, {"even": 1.0, "slow": 2.0})
    logged = Logged()
    fit(make_module(small_policy(), reward=parts, num_updates=2), callbacks=[logged])
    numbers, advantages = logged.numbers, logged.advantages
    assert numbers["reward/timeout_fraction"] == pytest.approx(3 / 12)
    assert numbers["reward/error_fraction"] == numbers["reward/unparsed_fraction"] == 0.0
    assert numbers["rollout/failed_judge_fraction"] == pytest.approx(3 / 12)
    assert numbers["rollout/reward/slow"] == 1.0, "a failed judge's 0 went into the mean"
    assert 2.0 <= numbers["rollout/reward"] <= 3.0
    assert [advantages[n] for n in (1, 5, 6)] == [0.0] * 3
    assert sum(a != 0.0 for a in advantages) >= 6
    for group in range(4):
        assert sum(advantages[3 * group : 3 * group + 3]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("outcome", ["timeout", "error"])
def test_a_run_whose_judges_mostly_fail_stops_and_says_so(outcome: Outcome) -> None:
    """One part of five fails on 7 of 12 completions: most rewards are unknown, though most verdicts are fine."""
    others = {name: EvenTokens() for name in ("a", "b", "c", "d")}
    parts = RewardParts({**others, "broken": FailsOn(range(7), outcome)}, dict.fromkeys((*others, "broken"), 1.0))
    with pytest.raises(RuntimeError, match=r"the judges failed on 58% of a rollout's completions.*d1lit doctor"):
        fit(make_module(small_policy(), reward=parts))
    parts = RewardParts({**others, "broken": FailsOn(range(6), outcome)}, dict.fromkeys((*others, "broken"), 1.0))
    fit(make_module(small_policy(), reward=parts, num_updates=1))  # half: an alarm, not the end


class NoNumber:
    """Says that all is well, and once gives no number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return [Verdict(1.0 if n else self.value) for n in range(len(completions))]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39])
def test_one_value_that_is_no_number_costs_one_completion_and_not_six_updates(value: float) -> None:
    """With six inner updates it would be six steps in a row that are left out, and the end of the run."""
    parts = RewardParts({"even": EvenTokens(), "odd": NoNumber(value)}, {"even": 1.0, "odd": 1.0})
    logged, guard = Logged(), SkipNonFinite()
    fit(make_module(small_policy(), reward=parts, num_inner_updates=6, num_updates=6), callbacks=[logged, guard])
    assert guard.skipped == 0
    for name in ("reward/error_fraction", "rollout/failed_judge_fraction"):
        assert logged.numbers[name] == pytest.approx(1 / 12)
    assert logged.numbers["rollout/reward/odd"] == 1.0 and logged.advantages[0] == 0.0
    assert any(logged.advantages)


REWARD = """
_target_: d1lit.rewards.parts.RewardParts
_convert_: all
parts:
  correctness: {_target_: sleepy.NeverInTime}
  boxed: {_target_: d1lit.rewards.formats.BoxedInTags, both: 1.0, tags: 0.75, box: 0.5, neither: 0.25}
weights: {correctness: 2.0, boxed: 1.0}
"""
CODE = """
from d1lit.rewards.math_process import MathVerify

judge = MathVerify(seconds=0.01)

class NeverInTime:
    def __call__(self, completions, examples):
        return [judge("9^{9}", "9^{9^{9}}") for _ in completions]
"""


@pytest.mark.slow
def test_a_real_run_stops_when_its_judge_is_never_in_time(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "reward").mkdir(parents=True)
    (folder / "reward" / "sleepy.yaml").write_text(REWARD)
    (folder / "sleepy.py").write_text(CODE)
    words = ["recipe=grpo", "task=math500", "debug=fast", "reward=sleepy", f"hydra.searchpath=[file://{folder}]"]
    words += [f"run_dir={tmp_path / 'run'}", "evaluation.base=false", "trainer.accelerator=cpu"]
    environment = {**os.environ, "D1LIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words],
        capture_output=True, text=True, check=False, timeout=600, env=environment,
    )  # fmt: skip
    print(done.stderr[-2000:])
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if "the judges failed on" in line]
    assert "failed on 100% of a rollout's completions (here: time-out 100%, error 0%)" in said
    assert not (tmp_path / "run" / "results.json").exists()
