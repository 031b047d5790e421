"""Every hand-written cheat earns nothing under the strict graders, and no judge fails on one."""

from typing import Any

import pytest

from d1lit.rewards.graders import countdown_grader, gsm8k_grader, math_grader, sudoku_grader
from d1lit.types import Reward
from tests import rewards_cheats, rewards_forms

STRICT: dict[str, Reward] = {
    "countdown": countdown_grader().strict,
    "gsm8k": gsm8k_grader().strict,
    "math": math_grader().strict,
    "sudoku": sudoku_grader().strict,
}
TABLES: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "countdown": rewards_cheats.COUNTDOWN,
    "gsm8k": rewards_cheats.GSM8K,
    "math": rewards_cheats.MATH,
    "sudoku": rewards_cheats.SUDOKU,
}


@pytest.mark.parametrize("task", sorted(TABLES))
def test_no_cheat_earns_anything(task: str) -> None:
    paid, failed, count = [], [], 0
    for row, answers in TABLES[task]:
        texts = [f"<reasoning>\nso\n</reasoning>\n<answer>\n{answer}\n</answer>" for answer in answers]
        for answer, verdict in zip(answers, STRICT[task](texts, [row] * len(texts)), strict=True):
            count += 1
            if verdict.value != 0.0:
                paid.append((row, answer, verdict))
            if verdict.outcome in ("timeout", "error"):
                failed.append((row, answer, verdict))
    print(f"{task}: {count} cheats, {len(failed)} ended in a judge's failure")
    assert not paid, "\n".join(map(str, paid))
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize(("task", "table"), [("gsm8k", rewards_forms.GSM8K), ("math", rewards_forms.MATH)])
def test_right_answers_in_other_forms_are_accepted(task: str, table: list[tuple[dict[str, Any], list[str]]]) -> None:
    refused, count = [], 0
    for row, answers in table:
        texts = [f"<answer>{answer}</answer>" for answer in answers]
        for answer, verdict in zip(answers, STRICT[task](texts, [row] * len(texts)), strict=True):
            count += 1
            if verdict.value != 1.0:
                refused.append((row, answer, verdict))
    print(f"{task}: {count} right answers")
    assert not refused, "\n".join(map(str, refused))


def test_answers_outside_their_place_earn_nothing() -> None:
    paid = [(task, text) for task, row, text in rewards_cheats.UNTAGGED if STRICT[task]([text], [row])[0].value != 0.0]
    assert not paid


def test_the_table_is_as_long_as_promised() -> None:
    count = sum(len(answers) for table in TABLES.values() for _, answers in table) + len(rewards_cheats.UNTAGGED)
    print(f"{count} cheats")
    assert count >= 200
    for table in TABLES.values():
        for row, answers in table:
            assert len(answers) == len(set(answers)), row
