"""The real data sets through the tasks as conf/task/*.yaml builds them: row counts, splits, prompts, worked answers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from d1lit.models.tokenizers import build_tiny_tokenizer
from d1lit.tasks import Task
from d1lit.tasks.sudoku import all_grids, num_solutions
from tests.golden.reading import DATA, needs_data

_FEW = {"num_builtin.train": 1000}
CONF = Path(__file__).resolve().parents[2] / "conf" / "task"
TRAIN = {
    "gsm8k": "gsm8k/train.jsonl",
    "math500": "math/train.jsonl",
    "countdown": "countdown/tasks3to4_train_uft.jsonl",
    "sudoku": None,
}
TEST = {
    "gsm8k": "gsm8k/test.jsonl",
    "math500": "math500/test.jsonl",
    "countdown": "countdown/cd3_test.jsonl",
    "sudoku": "sudoku4/test.jsonl",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def configured(name: str, scale: str = "tiny", **changes: Any) -> Task:
    config = OmegaConf.create({"task": OmegaConf.load(CONF / f"{name}.yaml"), "scale": {"name": scale}})
    for key, value in changes.items():
        OmegaConf.update(config, f"task.{key}", value)
    return instantiate(config.task)


@cache
def on_real_data(name: str, **changes: Any) -> Task:
    """A task on the real files; built once, for type checking every call of a read makes it slow under pytest."""
    train = TRAIN[name]
    places = {"test_data": str(DATA / TEST[name])} | ({"train_data": str(DATA / train)} if train else {})
    return configured(name, **(places | changes))


def head(file: str, count: int, folder: Path) -> str:
    """Path of a copy of the first rows of a real file."""
    lines = (DATA / file).read_text(encoding="utf-8").splitlines(keepends=True)
    path = folder / Path(file).name
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return str(path)


def num_lines(file: str) -> int:
    return sum(1 for line in (DATA / file).open(encoding="utf-8") if line.strip())


@pytest.mark.parametrize("name", sorted(TEST))
@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_every_configuration_builds(name: str, scale: str) -> None:
    task = configured(name, scale)
    assert task.name == name and task.template.user
    assert task.demonstration_template.user
    for key in ("completion_length", "num_steps", "block_length", "temperature", "num_inner_updates", "grpo_steps"):
        assert task.scales[scale][key] > 0
    values = task.scales[scale]
    assert values["completion_length"] % values["block_length"] == 0


@pytest.mark.parametrize("name", sorted(TEST))
def test_builtin_rows_and_traces_fit_the_tiny_presets(name: str) -> None:
    task, tokenizer = configured(name, **{"num_builtin.train": 300}), build_tiny_tokenizer()
    for split in ("train", "val", "test"):
        _, kept, dropped = task.encode(split, tokenizer)
        assert dropped == 0 and len(kept) == len(task.rows(split))
    room = task.scales["tiny"]["completion_length"]
    for row in (*task.corpus(300, 0), *task.demonstrations(300, 0)):
        assert len(tokenizer(row["completion"]).input_ids) + 1 <= room


@needs_data
@pytest.mark.parametrize("name", sorted(TEST))
def test_every_real_test_row_goes_through_the_tiny_prompt(name: str, tmp_path: Path) -> None:
    train = TRAIN[name]
    task = on_real_data(name, train_data=head(train, 500, tmp_path)) if train else on_real_data(name)
    assert not task.synthetic and task.display_name == name
    encoded, kept, dropped = task.encode("test", build_tiny_tokenizer())
    assert len(kept) == num_lines(TEST[name]) and dropped == 0
    assert len({row["id"] for row in kept}) == len(kept)
    print(f"{name}: longest test prompt {max(map(len, encoded))} of {task.max_test_prompt_length} tokens")


@needs_data
@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in sorted(TEST) if TRAIN[name]])
def test_real_train_rows_are_kept_dropped_or_left_out_but_never_lost(name: str) -> None:
    task, tokenizer = on_real_data(name), build_tiny_tokenizer()
    ids, train, dropped = task.encode("train", tokenizer)
    assert len(train) + dropped == task.overlap.train_rows and max(map(len, ids)) <= task.max_prompt_length
    val_ids, val, dropped_val = task.encode("val", tokenizer)
    assert len(val) == task.val_rows and dropped_val == 0
    print(
        f"{name}: {task.overlap.lines()}, train prompts dropped {dropped}, longest kept {max(map(len, ids))}", end=" "
    )
    print("longest validation prompt", max(map(len, val_ids)))
    source = task.source
    test_keys = {source.identity(row) for row in task.rows("test")}
    assert not test_keys & {source.identity(row) for row in (*task.rows("train"), *task.rows("val"))}


@needs_data
@pytest.mark.parametrize("name", [name for name in sorted(TEST) if TRAIN[name]])
def test_no_train_row_is_lost_without_being_counted(name: str) -> None:
    overlap = on_real_data(name).overlap
    counted = overlap.train_rows + overlap.val_rows + overlap.unused_val_rows + overlap.removed_rows
    counted += overlap.repeated_rows + overlap.unanswered_rows + overlap.other_rows
    assert counted == num_lines(TRAIN[name] or "")


@needs_data
def test_countdown_keeps_the_three_number_rows() -> None:
    task = on_real_data("countdown")
    assert all(len(row["numbers"]) == 3 for row in (*task.rows("train"), *task.rows("val")))
    assert task.overlap.other_rows == 5188  # the data's README: 5052 rows have three numbers, 5188 four
    assert len(task.rows("test")) == num_lines(TEST["countdown"])


@needs_data
@pytest.mark.nightly
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("name", ["gsm8k", "countdown"])
def test_every_worked_answer_of_the_real_train_rows_is_right(name: str, short: bool) -> None:
    task = on_real_data(name, short_traces=short)
    rows = task.demonstrations(None, 0)
    assert len(rows) == task.overlap.train_rows
    grades = task.judges.grade([row["completion"] for row in rows], rows)
    wrong = [row["id"] for row, grade in zip(rows, grades, strict=True) if grade.strict.value != 1.0]
    assert not wrong, f"{len(wrong)} of {len(rows)}: {wrong[:5]}"


@needs_data
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("name", ["gsm8k", "countdown"])
def test_worked_answers_of_real_train_rows_are_right(name: str, short: bool, tmp_path: Path) -> None:
    train, test = head(TRAIN[name] or "", 400, tmp_path), head(TEST[name], 20, tmp_path / "..")
    task = on_real_data(name, short_traces=short, train_data=train, test_data=test)
    rows = task.demonstrations(None, 0)
    assert len(rows) == task.overlap.train_rows > 50
    grades = task.judges.grade([row["completion"] for row in rows], rows)
    assert {grade.strict.value for grade in grades} == {1.0}


@needs_data
def test_math_solutions_become_demonstrations_and_rows_without_one_are_not_made_up(tmp_path: Path) -> None:
    solved, unsolved = head("math/test_minus_math500.jsonl", 300, tmp_path), head(TRAIN["math500"] or "", 300, tmp_path)
    rows = on_real_data("math500", train_data=solved, short_traces=False).demonstrations(20, 0)
    assert all(row["completion"].startswith("<reasoning>" + row["solution"]) for row in rows)
    assert all(row["completion"].endswith(f"<answer>\\boxed{{{row['answer']}}}</answer>") for row in rows)
    with pytest.raises(ValueError, match=r"no row of .*train\.jsonl has a worked solution\. Try: task\.short_traces"):
        on_real_data("math500", train_data=unsolved, short_traces=False).demonstrations(20, 0)
    short = on_real_data("math500", train_data=unsolved).demonstrations(20, 0)
    assert short[0]["completion"].startswith("<answer>\\boxed{")


@needs_data
def test_sudoku_keeps_test_puzzles_out_and_counts_the_grids_it_shares() -> None:
    task = on_real_data("sudoku")
    test = task.rows("test")
    assert task.overlap.test_solutions == 229 == len({row["solution"] for row in test})
    train = (*task.rows("train"), *task.rows("val"))
    shared = {row["solution"] for row in train} & {row["solution"] for row in test}
    assert task.overlap.shared_solutions == len(shared) > 200
    assert any(f"{len(shared)} of 229" in line for line in task.overlap.lines())
    puzzles = {row["puzzle"] for row in test}
    for row in (*train, *task.corpus(300, 0), *task.demonstrations(300, 0)):
        assert row["puzzle"] not in puzzles
    assert sum(num_solutions(row["puzzle"]) > 1 for row in test) == 124  # the data's README


@needs_data
def test_sudoku_split_by_solution_leaves_the_unused_grids() -> None:
    task = on_real_data("sudoku", split="by_solution")
    used = {row["solution"] for row in task.rows("test")}
    train = {row["solution"] for row in (*task.rows("train"), *task.rows("val"))}
    assert not train & used and len(set(all_grids()) - used) == 59 and train <= set(all_grids()) - used
    for row in (*task.corpus(500, 0), *task.demonstrations(500, 0)):
        assert row["solution"] not in used


@needs_data
def test_countdown_builtin_stays_out_of_the_real_test_rows() -> None:
    task = configured("countdown", "paper", train_data="builtin", test_data=str(DATA / TEST["countdown"]), **_FEW)
    key: Callable[[Any], str] = task.source.identity
    test = {key(row) for row in task.rows("test")}
    rows = (*task.rows("train"), *task.rows("val"), *task.corpus(1000, 0))
    assert not test & {key(row) for row in rows}
    assert all(max(row["numbers"]) <= 100 and 1 <= row["target"] <= 100 for row in rows)


@needs_data
def test_s1k_style_traces_become_demonstrations() -> None:
    file = DATA / "s1" / "sample_reasoning_traces.jsonl"
    task = configured("gsm8k", demonstration_data=str(file))
    rows = task.demonstrations(None, 0)
    assert len(rows) == num_lines("s1/sample_reasoning_traces.jsonl")
    for row in rows:
        assert row["completion"].startswith("<reasoning>") and row["completion"].endswith("</answer>")
        assert "</reasoning>\n<answer>" in row["completion"]
