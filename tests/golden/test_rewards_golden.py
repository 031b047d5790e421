"""d1's rewards and evaluation parsers against the recorded values of the official code, every row of every file."""

import json
import math
from typing import Any

import pytest

from d1lit.rewards import d1_countdown, d1_gsm8k, d1_math, d1_sudoku
from d1lit.types import Reward
from tests.golden.reading import GOLDEN, d1_entries, needs_golden

pytestmark = needs_golden

REWARDS: dict[str, Reward] = {
    "correctness_reward_func": d1_gsm8k.D1Gsm8kCorrectness(),
    "int_reward_func": d1_gsm8k.D1Gsm8kInteger(),
    "strict_format_reward_func": d1_gsm8k.D1StrictFormat(),
    "soft_format_reward_func": d1_gsm8k.D1SoftFormat(),
    "xmlcount_reward_func": d1_gsm8k.D1TagCount(),
    "correctness_reward_func_math": d1_math.D1MathCorrectness(),
    "boxed_and_answer_tags_format_reward": d1_math.D1MathFormat(),
    "countdown_reward_func": d1_countdown.D1CountdownReward(),
    "sudoku_reward_func": d1_sudoku.D1SudokuReward(),
}
NOT_A_REWARD = {"reward_len"}  # the official code only logs it
EVALUATIONS: dict[str, Reward] = {
    "gsm8k": d1_gsm8k.D1Gsm8kEvaluation(),
    "math": d1_math.D1MathEvaluation(),
    "countdown": d1_countdown.D1CountdownEvaluation(),
    "sudoku": d1_sudoku.D1SudokuEvaluation(),
}
TASKS = sorted(EVALUATIONS)


def read(name: str) -> list[dict[str, Any]]:
    """All lines of one file of the reward set; as many as its manifest lists."""
    entries = d1_entries(name)
    lines = [
        json.loads(line)
        for e in entries
        for f in e["files"]
        for line in (GOLDEN / "d1" / f).read_text().split("\n")
        if line
    ]
    wanted = sum(e.get("rows", 1) for e in entries)
    assert len(lines) >= wanted, f"{name}: {len(lines)} rows, the manifest lists {wanted}"
    return lines


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """The recorded row in the project's schema; MATH's training row carries the whole solution."""
    return {**row["row"], "solution": row["row"].get("solution", row["row"].get("answer"))}


def evaluation_row(row: dict[str, Any]) -> dict[str, Any]:
    """The recorded row as the evaluation sees it: the bare gold answer."""
    truth = row["row"]["eval_ground_truth"]
    if row["task"] == "gsm8k":
        return {"answer": row["row"]["answer"]}
    return {**row["row"], "answer": truth}


@pytest.mark.parametrize("task", TASKS)
def test_every_training_reward_equals_the_official_one(task: str) -> None:
    largest, compared = 0.0, 0
    for row in read(f"I_rewards_{task}"):
        for name, wanted in row["rewards"].items():
            if name in NOT_A_REWARD:
                continue
            (got,) = REWARDS[name]([row["completion"]], [training_row(row)])
            assert not isinstance(wanted, dict), f"{row['id']}: the official {name} raised {wanted}"
            assert math.isclose(got.value, wanted, abs_tol=1e-12), (row["id"], row["kind"], name, got, wanted)
            assert got.outcome in ("ok", "unparsed"), (row["id"], got)
            largest, compared = max(largest, abs(got.value - wanted)), compared + 1
    print(f"{task}: {compared} values, largest difference {largest:.1e}")
    assert compared >= 216


@pytest.mark.parametrize("task", TASKS)
def test_every_evaluation_verdict_equals_the_official_one(task: str) -> None:
    compared = 0
    for row in read(f"I_rewards_{task}"):
        (got,) = EVALUATIONS[task]([row["completion"]], [evaluation_row(row)])
        wanted = row["parser"]
        assert (got.value, got.out_of) == (wanted["correct"], wanted["out_of"]), (row["id"], row["kind"], got, wanted)
        if task == "gsm8k":
            # 'nan' and 'inf' are recorded as strings
            assert (got.parsed is None) == (wanted["extracted"] is None), (row["id"], got, wanted)
            if got.parsed is not None:
                assert got.parsed == str(float(wanted["extracted"])), (row["id"], got, wanted)
        else:
            assert (got.parsed or "") == (wanted["extracted"] or ""), (row["id"], row["kind"], got, wanted)
        compared += 1
    print(f"{task}: {compared} verdicts equal")


def test_the_math_normaliser_equals_the_official_one() -> None:
    def normal(text: str) -> object:
        try:
            return d1_math.normal_form(text)
        except (ValueError, IndexError, AssertionError) as error:
            return {"error": type(error).__name__}

    rows = read("I_math_equivalence")
    for row in rows:
        assert normal(row["a"]) == row["normal_a"], row
        assert normal(row["b"]) == row["normal_b"], row
        assert d1_math.equal_strings(row["a"], row["b"]) == row["equal_train"] == row["equal_eval"], row
    print(f"{len(rows)} pairs equal")


def test_the_gsm8k_truth_is_read_as_officially() -> None:
    rows = read("I_gsm8k_truth")
    for row in rows:
        assert d1_gsm8k.training_truth(row["answer_text"]) == row["train_answer"], row
        assert d1_gsm8k.evaluation_truth(row["answer_text"]) == row["eval_ground_truth"], row
    print(f"{len(rows)} truths equal")
