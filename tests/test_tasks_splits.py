"""Generated rows, splits that never touch, demonstrations and corpora."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from d1lit.rewards.graders import countdown_grader, gsm8k_grader, math_grader, sudoku_grader
from d1lit.rewards.parts import Grader
from d1lit.tasks.source import METHOD_CHARACTER, SHARES
from d1lit.tasks.sudoku import all_grids, careless_fill, is_valid_grid, num_solutions, one_round
from tests.test_tasks_reading import SOURCES, lines_of, make_task

NAMES = tuple(SOURCES)
GRADERS: dict[str, Callable[[], Grader]] = {
    "gsm8k": gsm8k_grader,
    "math500": math_grader,
    "countdown": countdown_grader,
    "sudoku": sudoku_grader,
}
SIZES = {"num_builtin": {"train": 400, "test": 60}, "val_rows": 40}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", NAMES)
def test_builtin_splits_are_apart_and_the_same_every_time(name: str) -> None:
    task, again = make_task(name, **SIZES), make_task(name, **SIZES)
    source = SOURCES[name]
    rows = {split: task.rows(split) for split in ("train", "val", "test")}
    assert rows == {split: again.rows(split) for split in ("train", "val", "test")}
    assert [len(rows[split]) for split in ("val", "test")] == [40, 60]
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        for key in (source.identity, source.group):
            assert not {key(row) for row in rows[first]} & {key(row) for row in rows[second]}
    ids = [row["id"] for split in rows.values() for row in split]
    assert len(set(ids)) == len(ids)
    overlap = task.overlap
    assert overlap.train_rows + overlap.val_rows + overlap.unused_val_rows == 400 and overlap.test_rows == 60
    assert overlap.shared_solutions == 0 and overlap.removed_rows == 0
    assert make_task(name, data_seed=1, **SIZES).rows("test") != rows["test"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_move_when_more_are_asked_for(name: str) -> None:
    few = make_task(name, num_builtin={"train": 100, "test": 20}).rows("train")
    many = make_task(name, num_builtin={"train": 200, "test": 20}).rows("train")
    assert many[:100] == few


@pytest.mark.slow
def test_builtin_rows_are_the_same_elsewhere_and_leave_the_global_generators_alone() -> None:
    """In a process of its own: type checking under pytest draws from the global generator itself."""
    code = (
        "import hashlib, json, random; from tests.test_tasks_splits import all_builtin_rows;"
        "before = random.getstate(); rows = all_builtin_rows(); assert random.getstate() == before;"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    random.seed(6)
    assert result.stdout.strip() == hashlib.sha256(json.dumps(all_builtin_rows()).encode()).hexdigest()


def all_builtin_rows() -> list[Any]:
    tasks = [make_task(name, val_rows=8) for name in NAMES]
    return [[task.rows("train"), task.rows("val"), task.rows("test"), task.corpus(50, 1)] for task in tasks]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("purpose", ["corpus", "demonstrations"])
def test_careful_traces_are_right_and_shares_are_as_documented(name: str, purpose: str) -> None:
    task = make_task(name, **SIZES)
    rows = task.corpus(400, 3) if purpose == "corpus" else task.demonstrations(400, 3)
    assert rows == (task.corpus(400, 3) if purpose == "corpus" else task.demonstrations(400, 3))
    assert rows != (task.corpus(400, 4) if purpose == "corpus" else task.demonstrations(400, 4))
    shares = SHARES["corpus" if purpose == "corpus" else "demonstrations"]
    counts = Counter(row["manner"] for row in rows)
    assert set(counts) == set(shares)
    for manner, share in shares.items():  # four standard errors of a binomial count
        assert abs(counts[manner] - 400 * share) < 4 * (400 * share * (1 - share)) ** 0.5

    grades = GRADERS[name]().grade([row["completion"] for row in rows], rows)
    right = {m: [g.strict.value for g, r in zip(grades, rows, strict=True) if r["manner"] == m] for m in counts}
    assert set(right["careful"]) == {1.0}
    assert sum(right["careless"]) / counts["careless"] < 0.35
    for row in rows:
        if row["manner"] == "direct":
            assert row["completion"].startswith("<answer>")
        else:
            assert row["completion"].startswith("<reasoning>" + METHOD_CHARACTER[row["manner"]])


@pytest.mark.parametrize("name", NAMES)
def test_traces_never_show_test_or_validation(name: str) -> None:
    task, source = make_task(name, **SIZES), SOURCES[name]
    held_out = {source.group(row) for split in ("val", "test") for row in task.rows(split)}
    for row in (*task.corpus(200, 0), *task.demonstrations(200, 0)):
        assert source.group(row) not in held_out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("short", [True, False])
def test_worked_answers_of_data_rows_are_right(name: str, short: bool, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = make_task(name, **SIZES).rows("train")[:50]
    raw = [row | {"answer": row["solution"]} if name == "gsm8k" else row for row in rows]
    path.write_bytes(lines_of(*raw))
    columns = {field: field for field in (*SOURCES[name].required, *SOURCES[name].optional)}
    task = make_task(name, train=str(path), columns=columns, short_traces=short)
    found = task.demonstrations(None, 0)
    assert len(found) == 50 and {row["id"] for row in found} == {row["id"] for row in rows}
    assert {g.strict.value for g in GRADERS[name]().grade([r["completion"] for r in found], found)} == {1.0}
    assert len(task.demonstrations(7, 0)) == 7 and task.demonstrations(7, 0) != task.demonstrations(7, 1)


def test_train_rows_found_in_test_are_taken_out_and_counted(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    questions = [{"question": f"What is {n}+1?", "answer": f"#### {n + 1}"} for n in range(20)]
    shared = [{"question": "What  is 3+1? ", "answer": "#### 4"}, {"question": "What is 25+1?", "answer": "#### 26"}]
    train.write_bytes(lines_of(*questions, questions[5], {"question": "x", "answer": ""}))
    test.write_bytes(lines_of(*shared, shared[1]))
    task = make_task("gsm8k", str(train), str(test), val_rows=4)
    assert task.overlap.record() == {
        "train_rows": 15,
        "val_rows": 4,
        "test_rows": 3,
        "other_rows": 0,
        "unanswered_rows": 1,
        "repeated_rows": 1,
        "removed_rows": 1,
        "unused_val_rows": 0,
        "shared_solutions": 0,
        "test_solutions": 2,
    }
    assert "left out of train, found in test: 1 rows" in task.overlap.lines()
    ids = [row["id"] for row in task.rows("test")]
    assert len(set(ids)) == 3 and ids[2] == f"{ids[1]}#2"
    assert not task.synthetic and task.display_name == "gsm8k"
    # the cut depends on what the rows say, not on their order
    train.write_bytes(lines_of(*questions[::-1]))
    again = make_task("gsm8k", str(train), str(test), val_rows=4)
    assert {row["id"] for row in again.rows("val")} == {row["id"] for row in task.rows("val")}


def test_demonstrations_from_data_leave_out_test_questions(tmp_path: Path) -> None:
    test, demonstrations = tmp_path / "test.jsonl", tmp_path / "sft.jsonl"
    test.write_bytes(lines_of({"question": "What is 3+1?", "answer": "#### 4"}))
    demonstrations.write_bytes(
        lines_of({"question": "What is\n3+1?", "completion": "4"}, {"question": "Other?", "completion": "5"})
    )
    task = make_task("gsm8k", test=str(test), demonstration_data=str(demonstrations))
    assert [row["question"] for row in task.demonstrations(None, 0)] == ["Other?"]
    assert task.demonstration_template.name == "demonstrations_tiny" and task.template.name == "gsm8k_tiny"


@pytest.mark.parametrize("split", ["by_question", "by_solution"])
def test_sudoku_with_an_outside_test_file(split: str, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    outside = SOURCES["sudoku"].generate("train", 300, 9, lambda example: False)
    path.write_bytes(lines_of(*outside))
    columns = {field: field for field in ("puzzle", "solution")}
    task = make_task("sudoku", test=str(path), columns=columns, split=split, **SIZES)
    train = (*task.rows("train"), *task.rows("val"), *task.corpus(200, 0))
    assert not {row["puzzle"] for row in train} & {row["puzzle"] for row in outside}
    grids = {row["solution"] for row in outside}
    shared = {row["solution"] for row in (*task.rows("train"), *task.rows("val"))} & grids
    assert task.overlap.shared_solutions == len(shared) and task.overlap.test_solutions == len(grids)
    assert (len(shared) == 0) == (split == "by_solution")
    assert any("task.split=by_solution" in line for line in task.overlap.lines()) == (split == "by_question")
    val_grids = {row["solution"] for row in task.rows("val")}
    assert not val_grids & {row["solution"] for row in task.rows("train")} and len(val_grids) > 4


def test_synthetic_stand_ins_are_called_so() -> None:
    names = {name: make_task(name).display_name for name in NAMES}
    assert names == {
        "gsm8k": "gsm8k-synthetic",
        "math500": "math500-synthetic",
        "countdown": "countdown",
        "sudoku": "sudoku",
    }


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"split": "by_row"}, r"task\.split: 'by_row'"),
        ({"overlong": "cut"}, r"task\.overlong: 'cut'"),
        ({"val_rows": -1}, r"task\.val_rows: -1"),
        ({"max_prompt_length": 0}, r"task\.max_prompt_length: 0"),
        ({"num_builtin": {"train": 0, "test": 1}}, r"task\.num_builtin\.train: 0"),
        ({"num_builtin": {"train": 10**6, "test": 1}}, r"task\.num_builtin\.train: 1000000 different math500"),
        ({"val_rows": 64}, r"task\.train_data: .* smaller task\.val_rows"),
        ({"prompt": "math501"}, r"task\.prompt: no template or file 'math501'"),
    ],
)
def test_impossible_settings_are_one_line(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as failure:
        task = make_task("math500", **changes)
        task.rows("train")
        assert task.template
    assert "Try: " in str(failure.value) and "\n" not in str(failure.value)


def test_there_are_288_grids_and_the_authors_fill_them_as_described() -> None:
    grids = all_grids()
    assert len(grids) == len(set(grids)) == 288 and all(map(is_valid_grid, grids))
    assert not is_valid_grid("1234123412341234") and not is_valid_grid("123434122143432")
    assert num_solutions("0" * 16) == 288 and num_solutions(grids[0]) == 1
    assert careless_fill("0" * 16) == "1234" * 4
    puzzle = "1230" + "0000" * 3
    # the last cell of row one is 4 (its row); nothing else follows from the givens alone
    assert one_round(puzzle) == "1234" + "0000" * 3
    for row in SOURCES["sudoku"].generate("test", 30, 0, lambda example: False):
        assert row["puzzle"].count("0") == 8 and num_solutions(row["puzzle"]) == 1
        after = one_round(row["puzzle"])
        assert all(digit in ("0", right) for digit, right in zip(after, row["solution"], strict=True))


def test_generated_countdown_steps_end_at_the_target() -> None:
    for row in SOURCES["countdown"].generate("train", 200, 0, lambda example: False):
        assert row["steps"].split(";")[-1].split("=")[1] == str(row["target"]) and 1 <= row["target"] <= 100
        assert len(row["numbers"]) == 3 and all(1 <= number <= 20 for number in row["numbers"])


def test_rows_are_plain_json() -> None:
    for name in NAMES:
        for row in make_task(name).rows("test"):
            assert json.loads(json.dumps(row)) == row
            assert {"id", "question", "answer"} <= set(row) and isinstance(row["answer"], str)
