"""The coding task: its rows, how a program is read out of a completion, and what the grader says of it."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d1lit.data import EncodedRow
from d1lit.rewards.code import (
    FencedInTags,
    StoppedAtLimit,
    TestsPassed,
    TestsShare,
    code_grader,
    first_python_block,
    program_of,
    sandbox_runs,
)
from d1lit.rewards.sandbox import SandboxError
from d1lit.tasks import CodeSource, Task
from d1lit.tasks.code_problems import PROBLEMS
from d1lit.tasks.source import METHOD_CHARACTER
from tests.test_tasks_reading import lines_of, make_task

SOURCE = CodeSource(max_number=99, shown_tests=1)
RUNS = sandbox_runs(2.0, 256, False, 2)


@pytest.fixture(autouse=True, scope="module")
def _needs_walls() -> None:
    try:
        _ = RUNS.sandbox.protection
    except SandboxError as error:
        pytest.skip(str(error))


def code_task(**changes: Any) -> Task:
    sizes = {"num_builtin": {"train": 120, "test": 40}, "val_rows": 16, "max_test_prompt_length": 1792}
    columns = {
        "question": ["prompt", "text", "question"],
        "tests": ["test", "test_list", "tests"],
        "setup": ["test_setup_code", "setup"],
        "answer": ["canonical_solution", "code", "answer"],
        "entry_point": "entry_point",
        "id": ["id", "task_id"],
    }
    own = {"name": "code", "source": SOURCE, "columns": columns, "prompt": "code_tiny", "max_prompt_length": 1000}
    return replace(make_task("math500"), **(own | sizes | changes))


def answered(program: str) -> str:
    return f"<reasoning>\nr\n</reasoning>\n<answer>\n```python\n{program}\n```\n</answer>"


# ------------------------------------------------------------------------------------------------------------- reading

PROGRAM = "def f(x):\n    return x"
READ: dict[str, tuple[str, str | None]] = {
    "fenced in tags": (answered(PROGRAM), PROGRAM),
    "bare in tags": (f"<answer>\n{PROGRAM}\n</answer>", PROGRAM),
    "a body keeps its indentation": ("<answer>    return x</answer>", "    return x"),
    "fence without a language": (f"<answer>\n```\n{PROGRAM}\n```\n</answer>", PROGRAM),
    "fence on one line": ("<answer>```x = 1```</answer>", "x = 1"),
    "the last fence of the answer": (f"<answer>```python\nx = 1\n```\n```python\n{PROGRAM}\n```</answer>", PROGRAM),
    "the last answer": (f"{answered('x = 1')}{answered(PROGRAM)}", PROGRAM),
    "no tags": (f"text\n```python\n{PROGRAM}\n```\nmore", PROGRAM),
    "cut off inside the fence": (f"<answer>\n```python\n{PROGRAM}", PROGRAM),
    "after the end": (f"{answered(PROGRAM)}<|endoftext|>{answered('x = 1')}", PROGRAM),
    "reasoning does not count": ("<reasoning>```python\nx\n```</reasoning><answer></answer>", None),
    "bare text": (PROGRAM, None),
    "nothing": ("", None),
    "white space": ("<answer>\n \n</answer>", None),
    "too long": (answered("x = 1\n" * 4_000), None),
}


@pytest.mark.parametrize("name", sorted(READ))
def test_the_program_is_read_from_the_answer(name: str) -> None:
    text, program = READ[name]
    assert program_of(text) == program


def test_d1_reads_the_first_python_block_wherever_it_stands() -> None:
    assert first_python_block(f"```python\nx = 1\n```{answered(PROGRAM)}").strip() == "x = 1"  # type: ignore[union-attr]
    assert first_python_block(f"<answer>{PROGRAM}</answer>") is None


def test_fences_and_tags_without_end_are_read_in_linear_time() -> None:
    started = time.process_time()
    for text in ("```" * 400_000, "```python" * 200_000, "<answer>```" * 100_000, "<answer>" + "```x\n" * 200_000):
        assert first_python_block(text) is None
        assert program_of(text) in (None, "python"), "what stands between the first two fences that match"
        assert FencedInTags()([text], [{}])[0].value == 0
    assert time.process_time() - started < 10, "a square of these lengths takes hours"


# ---------------------------------------------------------------------------------------------------------------- rows


def test_there_are_sixteen_problems_and_every_reference_passes_where_its_stub_does_not() -> None:
    rows = SOURCE.generate("test", 40, 0, lambda example: False)
    assert len(PROBLEMS) == 16
    references = [answered(row["answer"]) for row in rows]
    assert [v.value for v in TestsPassed(RUNS)(references, rows)] == [1.0] * 40
    assert not any(v.value for v in TestsPassed(RUNS)([answered("pass")] * 40, rows))
    assert not any(v.value for v in TestsPassed(RUNS)([answered("    return 1")] * 40, rows))
    assert all(v.outcome == "ok" for v in TestsShare(RUNS)([answered("    return 1")] * 40, rows))


def test_splits_are_apart_and_traces_are_right_or_careless() -> None:
    task = code_task()
    rows = {split: task.rows(split) for split in ("train", "val", "test")}
    assert [len(rows[split]) for split in ("val", "test")] == [16, 40]
    questions = [{row["question"] for row in split} for split in rows.values()]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    assert task.display_name == "code-synthetic"
    traces = task.corpus(60, 3)
    assert not {row["question"] for row in traces} & (questions[1] | questions[2])
    verdicts = TestsPassed(RUNS)([row["completion"] for row in traces], traces)
    right = {manner: [] for manner in ("direct", "careless", "careful")}
    for row, verdict in zip(traces, verdicts, strict=True):
        right[row["manner"]].append(verdict.value)
        assert len(row["completion"]) < 120
        start = "<answer>" if row["manner"] == "direct" else "<reasoning>" + METHOD_CHARACTER[row["manner"]]
        assert row["completion"].startswith(start)
    assert set(right["careful"]) == {1.0} and not any(right["careless"]) and not any(right["direct"])


HUMAN_EVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Sum.\n    """\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(numbers)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to add one.",
    "code": "import math\ndef helper(x):\n  return x\ndef add_one(x):\n  return helper(x) + 1",
    "test_list": ["assert add_one(1) == 2", "assert math.isclose(add_one(0.5), 1.5)"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}


def test_rows_in_the_forms_of_humaneval_and_mbpp_are_read_and_judged(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines_of(HUMAN_EVAL, MBPP))
    human, mbpp = code_task(test_data=str(file)).rows("test")
    assert (human["id"], mbpp["id"]) == ("HumanEval/x", "7")
    assert human["prompt"] == human["question"] == HUMAN_EVAL["prompt"]
    assert (mbpp["prompt"], mbpp["entry_point"]) == ("", "add_one")
    assert "add_one(1)" in mbpp["question"] and "0.5" not in mbpp["question"], "one test is shown, the other kept"
    grader = code_grader(2.0, 256)
    texts = [answered(HUMAN_EVAL["canonical_solution"]), answered(MBPP["code"])]
    grades = grader.grade(texts, [human, mbpp])
    assert [grade.strict.value for grade in grades] == [1.0, 1.0]
    assert [grade.d1.value for grade in grades] == [1.0, 1.0]
    half = grader.grade([answered("def add_one(x): return 2")], [mbpp])[0]
    assert (half.strict.value, half.extra["tests_passed"], half.extra["stopped"]) == (0.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test_list": []}, "tests is no text"),
        ({"test_list": [1]}, "tests is no text"),
        ({"code": "x = 1"}, "no entry_point"),
        ({"text": " "}, "question is empty"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_with_their_line(tmp_path: Path, change: dict, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines_of(MBPP, MBPP | {"task_id": 8} | change))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{words}"):
        code_task(test_data=str(file)).rows("test")


# ------------------------------------------------------------------------------------------------------------- verdicts

ROW = {"prompt": "", "setup": "", "tests": ["assert f(1) == 2", "assert f(2) == 3"], "entry_point": "f", "id": "r"}


def test_a_program_that_never_ends_is_wrong_not_unjudged_and_is_measured() -> None:
    texts = [answered("def f(x):\n    while True: pass"), answered("def f(x): return x + 1"), "no program"]
    passed = TestsPassed(RUNS)(texts, [ROW] * 3)
    assert [(v.value, v.outcome) for v in passed] == [(0.0, "ok"), (1.0, "ok"), (0.0, "unparsed")]
    assert [v.value for v in StoppedAtLimit(RUNS)(texts, [ROW] * 3)] == [1.0, 0.0, 0.0]


def test_a_row_whose_tests_cannot_run_is_an_error_and_never_a_wrong_answer() -> None:
    broken = ROW | {"tests": ["assert g(1) == 2"]}
    (verdict,) = TestsPassed(RUNS)([answered("def f(x): return x + 1")], [broken])
    assert (verdict.value, verdict.outcome) == (0.0, "error")


def test_a_program_is_run_once_however_many_parts_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    run_all = RUNS.sandbox.run_all
    monkeypatch.setattr(RUNS.sandbox, "run_all", lambda jobs: asked.append(len(jobs)) or run_all(jobs))
    texts = [answered(f"def f(x): return x + {n % 2}  # once") for n in range(8)]
    for part in (TestsPassed(RUNS), TestsShare(RUNS), StoppedAtLimit(RUNS)):
        assert len(part(texts, [ROW] * 8)) == 8
    assert asked == [2, 0, 0]
    assert sandbox_runs(2.0, 256, False, 2) is RUNS


def test_form_counts_only_one_closed_fence_in_closed_tags() -> None:
    texts = [answered("x"), f"<answer>{PROGRAM}</answer>", "```python\nx\n```", "<answer>```x", answered("```\n```")]
    assert [v.value for v in FencedInTags()(texts, [ROW] * 5)] == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_prompts_fit_and_name_the_function(tmp_path: Path) -> None:
    from d1lit.models.tokenizers import build_tiny_tokenizer
    from d1lit.modules.stage_data import prompt_rows

    rows: list[EncodedRow] = prompt_rows(code_task(), "test", build_tiny_tokenizer())
    assert len(rows) == 40
    assert all(row.example["entry_point"] in row.example["question"] for row in rows)
