"""One grader of a task serves reward, validation and test, and `task.grader` says in all three whose verdict counts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d1lit.app import task_evaluator
from d1lit.app.build import plan_run
from d1lit.app.components import build
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import Plan
from d1lit.app.task_evaluator import TaskEvaluator
from d1lit.errors import ConfigError
from d1lit.evaluation import append_records, read_records, record
from d1lit.models import build_tiny_tokenizer
from d1lit.rewards import graders
from d1lit.rewards.code import sandbox_runs
from d1lit.rewards.countdown import CountdownAttempt, CountdownSolved
from d1lit.rewards.number_answers import NumberAnswer
from d1lit.rewards.parts import Counted, Grader, OnTask, RewardParts, correctness
from d1lit.rewards.sandbox import SandboxError
from d1lit.stopping import StopFlag
from d1lit.types import Verdict

CODE = {"prompt": "", "setup": "", "tests": ["assert f(1) == 2"], "entry_point": "f"}
RIGHT, WRONG = "```python\ndef f(x): return x + 1\n```", "```python\ndef f(x): return x\n```"
# Of each task: a row, an answer on which the two graders differ, the part that pays for it, and what it pays under each.
CASES: dict[str, tuple[dict[str, Any], str, str, float, float]] = {
    "gsm8k": ({"answer": "-18"}, "<answer>-18</answer>", "correctness", 1.0, 0.0),  # d1 reads no sign in a gold number
    "math500": ({"answer": "\\frac{1}{4}"}, "\\boxed{0.25}", "correctness", 1.0, 0.0),
    "countdown": ({"numbers": [2, 3, 1], "target": 9}, "\\boxed{2**3+1}", "attempt", 0.1, 1.0),
    "sudoku": (
        {"puzzle": "0" * 16, "solution": "1234341221434321"}, "<answer>1234341243212143</answer>", "solved", 1.0, 0.5,
    ),
    "code": (CODE, f"{RIGHT}\n<answer>\n{WRONG}\n</answer>", "passed", 0.0, 1.0),
}  # fmt: skip
EASY = ("gsm8k", "math500", "countdown", "sudoku")
TOLD_APART = ("strict", "d1")


def row_of(name: str) -> dict[str, Any]:
    return {"id": "r", "question": "", "answer": "", **CASES[name][0]}


def plan_of(*words: str) -> Plan:
    (config,) = compose_jobs("train", ["recipe=grpo", "evaluation.rows=3", *words]).configs
    return plan_run(config)


def reward_of(plan: Plan) -> RewardParts:
    module = plan.stages[-1].module
    assert isinstance(module, partial)
    return module.keywords["reward"]


def asked_by(part: Any) -> Any:
    """The grader's verdict that a part of a reward asks for."""
    return part.grader if isinstance(part, CountdownAttempt) else part


def needs_walls(name: str) -> None:
    try:
        _ = name == "code" and sandbox_runs(3.0, 512, False).sandbox.protection
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", CASES)
def test_the_reward_asks_the_very_grader_of_the_task(name: str) -> None:
    plan = plan_of(f"task={name}")
    verdict = asked_by(reward_of(plan).parts[CASES[name][2]])
    assert verdict is plan.task.counted
    assert verdict.grader is plan.task.judges


def test_a_run_makes_its_grader_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Grader] = []
    make = graders.gsm8k_grader
    monkeypatch.setattr(graders, "gsm8k_grader", lambda: made.append(make()) or made[-1])
    plan = plan_of("task=gsm8k", "task.data_seed=71")
    assert len(made) == 1 and asked_by(reward_of(plan).parts["correctness"]).grader is made[0]


@pytest.mark.parametrize("counts", TOLD_APART)
@pytest.mark.parametrize("name", CASES)
def test_the_verdict_that_counts_is_the_one_that_is_paid(name: str, counts: str) -> None:
    needs_walls(name)
    _, text, part, *paid = CASES[name]
    verdicts = reward_of(plan_of(f"task={name}", f"task.grader={counts}")).grade([text], [row_of(name)])
    assert verdicts[part][0].value == paid[TOLD_APART.index(counts)]
    assert all(0.0 <= column[0].value <= 1.0 and column[0].out_of == 1.0 for column in verdicts.values())


@pytest.mark.parametrize("counts", TOLD_APART)
@pytest.mark.parametrize("name", EASY)
def test_validation_and_test_count_what_the_reward_pays_and_keep_both_verdicts(
    name: str, counts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text, part, *_ = CASES[name]
    plan = plan_of(f"task={name}", f"task.grader={counts}")
    reward, seen = reward_of(plan), []

    def one_answer(policy, sampler, rows, decode, grader, draws, *, file=None, **_):
        seen.append(grader)
        (grade,) = grader.grade([text], [row_of(name)])
        found = [record(n, row_of(name), text, grade, 1, False) for n in range(len(rows))]
        if file is not None:
            append_records(file, found)
        return found

    monkeypatch.setattr(task_evaluator, "evaluate", one_answer)
    evaluator = TaskEvaluator(plan, build_tiny_tokenizer(), tmp_path, StopFlag())
    policy: Any = SimpleNamespace(eos_token_id=0)
    validation, (test,) = evaluator.validation(policy), evaluator.at_seed(policy, "grpo", 0)
    assert len(seen) == 2 and all(grader is plan.task.judges for grader in seen)
    value = asked_by(reward.parts[part])([text], [row_of(name)])[0].value
    assert validation["accuracy"] == test["accuracy"] == value
    assert test["grader"] == counts
    for row in read_records(tmp_path / test["rows_file"]):
        assert row["strict"]["value"] / row["strict"]["out_of"] != row["d1"]["value"] / row["d1"]["out_of"]


def test_rows_of_a_mixture_are_judged_by_their_own_tasks_grader() -> None:
    texts = [CASES[name][1] for name in EASY]
    rows = [{**row_of(name), "task": name} for name in EASY]
    mixed = {
        "task.grader=strict": ["strict"] * 4,
        "task.grader=d1": ["d1"] * 4,
        "task.members.gsm8k.grader=d1": ["d1", "strict", "strict", "strict"],
    }
    for word, counts in mixed.items():
        plan = plan_of("task=unified", word)
        assert [plan.task.members[name].grader for name in EASY] == counts
        reward = reward_of(plan)
        verdicts = reward.grade(texts, rows)
        grades = plan.task.judges.grade(texts, rows)
        for n, name in enumerate(EASY):
            member, (_, _, part, *paid) = plan.task.members[name], CASES[name]
            assert plan.task.judges.members[name] is member and member.counted.grader is member.judges
            assert verdicts[f"{name}/{part}"][n].value == paid[TOLD_APART.index(counts[n])], (word, name)
            assert grades[n] == member.judges.grade([texts[n]], [rows[n]])[0]
            others = [verdict.outcome for m, verdict in enumerate(verdicts[f"{name}/{part}"]) if m != n]
            assert others == ["skipped"] * 3


def test_d1s_training_rewards_are_their_own_whatever_counts() -> None:
    for name in EASY:
        parts = [reward_of(plan_of(f"task={name}", f"reward=d1_{name}", f"task.grader={c}")).parts for c in TOLD_APART]
        assert parts[0] == parts[1]
        assert all(type(part).__module__ == f"d1lit.rewards.{module_of(name)}" for part in parts[0].values())


def module_of(name: str) -> str:
    return "d1_math" if name == "math500" else f"d1_{name}"


# ------------------------------------------------------------------------------------------------- rewards of users' own


def shout(completions, examples, mark: str) -> list[Verdict]:
    return [Verdict(float(mark in text)) for text in completions]


def test_a_reward_that_asks_for_no_grader_stays_as_it_is() -> None:
    parts = {"number": NumberAnswer(), "shout": partial(shout, mark="!")}
    judged = RewardParts(parts, dict.fromkeys(parts, 1.0)).judged_by(Counted(graders.gsm8k_grader(), "d1"))
    assert judged.parts == parts
    assert [v.value for v in judged.grade(["18!"], [{"answer": "18"}])["shout"]] == [1.0]


def test_waiting_parts_get_the_grader_and_those_that_name_their_own_keep_it() -> None:
    grader, own = Counted(graders.countdown_grader(), "d1"), CountdownSolved()
    waiting: dict[str, Any] = {
        "right": partial(correctness),
        "attempt": partial(CountdownAttempt, attempt=0.1),
        "own": partial(CountdownAttempt, attempt=0.1, grader=own),
        "replaced": partial(NumberAnswer),
        "mixed": OnTask("countdown", partial(correctness)),
    }
    judged = RewardParts(waiting, dict.fromkeys(waiting, 1.0)).judged_by(grader).parts
    assert judged["right"] is grader and judged["attempt"].grader is grader and judged["own"].grader is own
    assert judged["replaced"] == NumberAnswer() and judged["mixed"].reward is grader
    with pytest.raises(ValueError, match=r"reward\.parts\.attempt: .*'attempt'.* Try: "):
        RewardParts({"attempt": partial(CountdownAttempt)}, {"attempt": 1.0}).judged_by(grader)


def test_a_part_can_name_another_judge_on_the_command_line() -> None:
    word = "reward.parts.correctness._target_=d1lit.rewards.number_answers.NumberAnswer"
    assert reward_of(plan_of("task=gsm8k", "task.grader=d1", word)).parts["correctness"] == NumberAnswer()
    with pytest.raises(ConfigError, match=r"reward\.parts\.attempt: .*'attempt'"):
        plan_of("task=countdown", "~reward.parts.attempt.attempt")


def test_shares_of_cells_are_paid_between_zero_and_one() -> None:
    def cells(completions, examples):
        return [Verdict(value, out_of=most) for value, most in ((3.0, 12.0), (12.0, 12.0), (0.0, 0.0))]

    paid = Counted(replace(graders.sudoku_grader(), d1=cells), "d1")([""] * 3, [{}] * 3)
    assert [(verdict.value, verdict.out_of) for verdict in paid] == [(0.25, 1.0), (1.0, 1.0), (0.0, 1.0)]


def test_countdown_pays_no_attempt_where_no_answer_is_given() -> None:
    attempt = CountdownAttempt(Counted(graders.countdown_grader(), "d1"), 0.1)
    row = row_of("countdown")
    texts = ["2 and 3 and 1", "<answer>2+3+1</answer>", "\\boxed{2**3+1}"]
    assert [verdict.value for verdict in attempt(texts, [row] * 3)] == [0.0, 0.1, 1.0]


def test_an_unplanned_reward_is_completed_by_its_task() -> None:
    (config,) = compose_jobs("train", ["task=gsm8k"]).configs
    task, reward = build(config, "task"), build(config, "reward", RewardParts)
    assert reward.judged_by(task.counted).parts["correctness"] is task.counted
