"""Data files: what is accepted, and thirty-odd broken ones that are refused in one line with file and line."""

import gzip
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from d1lit.app.running import hub_commits
from d1lit.tasks import (
    CountdownSource,
    Gsm8kSource,
    Math500Source,
    Source,
    SudokuSource,
    Task,
    read_demonstrations,
    reading,
)
from d1lit.tasks.reading import read_rows
from d1lit.types import Verdict

SOURCES: dict[str, Source] = {
    "gsm8k": Gsm8kSource(max_number=12),
    "math500": Math500Source(max_number=12),
    "countdown": CountdownSource(count_numbers=3, max_number=20, max_target=100, operations="+-"),
    "sudoku": SudokuSource(num_empties=8, demonstration_empties=(4, 8), corpus_empties=(2, 8)),
}
GOOD: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"},
    "math500": {"question": "1+1?", "answer": "2"},
    "countdown": {"numbers": [1, 2, 3], "target": 6},
    "sudoku": {"puzzle": "0204341221434321", "solution": "1234341221434321"},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_task(name: str, train: str = "builtin", test: str = "builtin", **changes: Any) -> Task:
    settings: dict[str, Any] = {
        "name": name,
        "source": SOURCES[name],
        "train_data": train,
        "test_data": test,
        "columns": {},
        "num_builtin": {"train": 64, "test": 16},
        "val_rows": 0,
        "split": "by_question",
        "data_seed": 0,
        "prompt": f"{name}_tiny",
        "max_prompt_length": 64,
        "max_test_prompt_length": 64,
        "overlong": "error",
        "demonstration_data": "task",
        "demonstration_columns": {},
        "demonstration_prompt": "demonstrations_tiny",
        "short_traces": True,
        "grader": "strict",
        "baselines": {},
        "judges": lambda completions, examples: [Verdict(0.0) for _ in completions],
        "scales": {},
    }
    return Task(**(settings | changes))


def lines_of(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def zipped(name: str, body: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, body)
    return buffer.getvalue()


def tarred(name: str, body: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(body)
        archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


Q = GOOD["gsm8k"]
_FULL = "1234341221434321"
# task, file name, content, line that must be named (None: the whole file is at fault), part of the cause
CORRUPT: dict[str, tuple[str, str, bytes, int | None, str]] = {
    "bad_json": ("gsm8k", "a.jsonl", lines_of(Q, b"{question: 1}"), 2, "not JSON"),
    "cut_off": ("gsm8k", "a.jsonl", lines_of(Q, Q) + b'{"question": "wh', 3, "not JSON"),
    "two_objects": ("gsm8k", "a.jsonl", lines_of(Q, b"{} {}"), 2, "not JSON"),
    "empty": ("gsm8k", "a.jsonl", b"", None, "is empty"),
    "only_blank_lines": ("gsm8k", "a.jsonl", b"\n \r\n\n", None, "no rows"),
    "only_bom": ("gsm8k", "a.jsonl", b"\xef\xbb\xbf", None, "no rows"),
    "latin_1": ("gsm8k", "a.jsonl", lines_of(Q) + '{"question": "café"}\n'.encode("latin-1"), 2, "not UTF-8"),
    "utf_16": ("gsm8k", "a.jsonl", lines_of(Q).decode().encode("utf-16"), 1, "UTF-16"),
    "nul_byte": ("gsm8k", "a.jsonl", lines_of(Q, b'{"question": "a\x00b"}'), 2, "not JSON"),
    "lone_surrogate": ("gsm8k", "a.jsonl", lines_of(Q, b'{"question": "\\ud800", "answer": "1"}'), 2, "surrogate"),
    "huge_line": ("gsm8k", "a.jsonl", lines_of(Q, {"question": "x" * 70_000, "answer": "1"}), 2, "longer than"),
    "deep_nesting": ("gsm8k", "a.jsonl", lines_of(Q, b"[" * 60_000), 2, "nested"),
    "huge_integer": ("gsm8k", "a.jsonl", lines_of(Q, b'{"question": ' + b"9" * 5000 + b"}"), 2, "Exceeds the limit"),
    "nan": ("gsm8k", "a.jsonl", lines_of(Q, b'{"question": NaN}'), 2, "NaN"),
    "infinity": ("gsm8k", "a.jsonl", lines_of(Q, b'{"question": -Infinity}'), 2, "Infinity"),
    "column_twice": ("gsm8k", "a.jsonl", lines_of(Q, b'{"question": "a", "question": "b"}'), 2, "stands twice"),
    "list_row": ("gsm8k", "a.jsonl", lines_of(Q, [1, 2]), 2, "must be an object"),
    "missing_column": ("gsm8k", "a.jsonl", lines_of(Q, {"question": "q", "gold": 1}), 2, "no column 'answer'"),
    "null_column": ("gsm8k", "a.jsonl", lines_of(Q, {"question": "q", "answer": None}), 2, "no column 'answer'"),
    "empty_question": ("gsm8k", "a.jsonl", lines_of(Q, {"question": " ", "answer": "1"}), 2, "question is empty"),
    "empty_answer": ("math500", "a.jsonl", lines_of(GOOD["math500"], {"question": "q", "answer": ""}), 2, "empty"),
    "nothing_after_hashes": ("gsm8k", "a.jsonl", lines_of(Q, {"question": "q", "answer": "1\n####"}), 2, "'####'"),
    "number_as_answer": ("gsm8k", "a.jsonl", lines_of(Q, {"question": "q", "answer": 2}), 2, "answer is int"),
    "same_id_twice": (
        "gsm8k",
        "a.jsonl",
        lines_of(Q | {"id": 1}, {"id": 1, "question": "q", "answer": "1"}),
        2,
        "line 1",
    ),
    "countdown_words": ("countdown", "a.jsonl", lines_of({"numbers": "one, two, six", "target": 3}), 1, "whole number"),
    "countdown_fraction": ("countdown", "a.jsonl", lines_of({"numbers": [1, 2, 3], "target": 1.5}), 1, "1.5"),
    "countdown_overflow": ("countdown", "a.jsonl", lines_of(b'{"numbers": [1, 2, 3], "target": 1e999}'), 1, "inf"),
    "countdown_boolean": ("countdown", "a.jsonl", lines_of({"numbers": [1, True, 3], "target": 6}), 1, "True"),
    "countdown_no_list": ("countdown", "a.jsonl", lines_of({"numbers": 7, "target": 6}), 1, "not a list"),
    "countdown_all_four": ("countdown", "a.jsonl", lines_of({"numbers": [1, 2, 3, 4], "target": 6}), None, "none of"),
    "sudoku_short": ("sudoku", "a.jsonl", lines_of({"puzzle": "0204", "solution": "1234"}), 1, "16 digits"),
    "sudoku_number": ("sudoku", "a.jsonl", lines_of({"puzzle": 204341221434321, "solution": "1"}), 1, "quote it"),
    "sudoku_broken": ("sudoku", "a.jsonl", lines_of({"puzzle": "0" * 16, "solution": "1" * 16}), 1, "breaks the rules"),
    "sudoku_givens": (
        "sudoku",
        "a.jsonl",
        lines_of(GOOD["sudoku"], {"puzzle": "2000000000000000", "solution": "1234341221434321"}),
        2,
        "alters the givens",
    ),
    "sudoku_full": (
        "sudoku",
        "a.jsonl",
        lines_of(dict.fromkeys(("puzzle", "solution"), _FULL)),
        1,
        "empty",
    ),
    "csv_ragged": ("gsm8k", "a.csv", b"question,answer\n1+1?,2\n1,2,3\n", 3, "3 cells under 2"),
    "csv_quotes": ("gsm8k", "a.csv", b'question,answer\n"1+1?"x,2\n', 2, "not CSV"),
    "json_object": ("gsm8k", "a.json", json.dumps(Q).encode(), 1, "a list of rows"),
    "json_broken": ("gsm8k", "a.json", b"[\n" + lines_of(Q) + b",]", 3, "not JSON"),
    "json_scalar_row": ("gsm8k", "a.json", json.dumps([Q, 3]).encode(), 2, "must be an object"),
    "gzip_bomb": ("gsm8k", "a.jsonl", gzip.compress(b"0" * 10**7), None, "archive"),
    "gzip_by_name": ("gsm8k", "a.jsonl.gz", lines_of(Q), None, "archive"),
    "zip_renamed": ("gsm8k", "a.json", zipped("../../x.jsonl", lines_of(Q)), None, "archive"),
    "tar_climbing": ("gsm8k", "a.tar", tarred("../../x.jsonl", lines_of(Q)), None, "archive"),
    "parquet_garbage": ("gsm8k", "a.parquet", b"PAR1" + b"\x00" * 64, None, "parquet"),
    "parquet_no_rows": ("gsm8k", "a.parquet", parquet({"question": [], "answer": []}), None, "no rows"),
    "parquet_column": ("gsm8k", "a.parquet", parquet({"question": ["a", "b"]}), 1, "no column 'answer'"),
    "unknown_suffix": ("gsm8k", "a.txt", lines_of(Q), None, "ends in none of"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_file_is_one_line_with_file_and_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 65_536)
    name, file, content, line, cause = CORRUPT[case]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(ValueError) as failure:
        make_task(name, test=str(path), columns={"id": "id"}).rows("train")
    message = str(failure.value)
    assert "\n" not in message and len(message) < 700
    assert message.startswith("task.test_data: ") and "Try: " in message and cause in message
    assert (f"{path}:{line}: " if line else str(path)) in message
    assert not (tmp_path.parent / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("location", "cause"),
    [
        ("/nowhere/a.jsonl", "no file"),
        ("rows.jsonl", "no file"),
        ("gsm8k", "neither a file nor a hub id"),
        ("a/b/c d", "neither a file nor a hub id"),
        ("", "not a regular file"),
        ("somebody/something", "cannot reach the hub for 'somebody/something'. Try: a local file"),
        ("somebody/something:main:train", "cannot reach the hub"),
    ],
)
def test_location_that_leads_nowhere(location: str, cause: str) -> None:
    with pytest.raises(ValueError, match=r"^task\.train_data: ") as failure:
        make_task("gsm8k", train=location).rows("train")
    assert cause in str(failure.value) and "Try: " in str(failure.value) and "\n" not in str(failure.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeBuilder:
    """What `datasets` makes of a hub id, without the hub."""

    def __init__(self, rows: list[dict[str, Any]], download: int | None, prepared: int, asked: list[Any]) -> None:
        self.hash, self.rows, self.prepared, self.asked = COMMIT, rows, prepared, asked
        self.info = SimpleNamespace(download_size=download, dataset_size=None)

    def download_and_prepare(self) -> None:
        self.asked.append("fetched")
        self.info.dataset_size = self.prepared

    def as_dataset(self, split: str) -> datasets.Dataset:
        self.asked.append(split)
        return datasets.Dataset.from_list(self.rows)


def from_hub(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], download: int | None = 100, prepared: int = 100
) -> list[Any]:
    """Let every hub id lead to these rows; what is asked of `datasets` from now on."""
    asked: list[Any] = []

    def load_dataset_builder(*names: Any, **more: Any) -> FakeBuilder:
        asked.append((*names, more))
        return FakeBuilder(rows, download, prepared, asked)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return asked


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}", f"@{COMMIT[:8]}", "@v1.0", "@refs/pr/3"])
def test_hub_data_is_pinned_and_its_commit_known(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = from_hub(monkeypatch, [GOOD["gsm8k"]])
    task = make_task("gsm8k", train=f"somebody/something{revision}:main")
    assert len(task.rows("train")) == 1
    assert asked == [("somebody/something", "main", {"revision": revision[1:] or None}), "fetched", "train"]
    assert task.commits == {"task.train_data": COMMIT}
    assert hub_commits(SimpleNamespace(task=task)) == {"task.train_data": COMMIT}  # type: ignore[arg-type]


def test_hub_data_of_another_commit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection `datasets` takes what its cache holds, whatever was asked for."""
    asked = from_hub(monkeypatch, [GOOD["gsm8k"]])
    with pytest.raises(ValueError, match=f"the cache holds commit {COMMIT} of it"):
        make_task("gsm8k", train="somebody/something@fedcba9").rows("train")
    assert "fetched" not in asked


@pytest.mark.parametrize(("download", "prepared", "fetched"), [(2**50, 100, False), (None, 2**50, True)])
def test_hub_data_that_is_too_large_is_refused(
    download: int | None, prepared: int, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = from_hub(monkeypatch, [GOOD["gsm8k"]], download, prepared)
    with pytest.raises(ValueError, match=rf"^task\.train_data: .*{2**50} bytes, more than"):
        make_task("gsm8k", train="somebody/something").rows("train")
    assert ("fetched" in asked) is fetched and "train" not in asked


def test_a_row_of_a_table_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 100)
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+1?" * 100, "answer": "2"}]
    from_hub(monkeypatch, rows)
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet({name: [row[name] for row in rows] for name in rows[0]}))
    for location in ("somebody/something", str(file)):
        with pytest.raises(
            ValueError, match=rf"^task\.train_data: {re.escape(location)}:2: the row is longer than 100"
        ):
            make_task("gsm8k", train=location).rows("train")


def test_folder_and_pipe_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for location in (tmp_path, pipe):
        with pytest.raises(ValueError, match="not a regular file"):
            read_rows(str(location), "task.train_data", {}, (), "train")


def write_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return lines_of(*rows)


ROWS = [{"question": f"{i}+1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}", "day": "2020-01-01"} for i in range(5)]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.jsonl", write_jsonl(ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + write_jsonl(ROWS)),
        ("crlf.jsonl", write_jsonl(ROWS).replace(b"\n", b"\r\n")),
        ("blank.jsonl", b"\n" + write_jsonl(ROWS).replace(b"\n", b"\n\n")),
        ("no_end.jsonl", write_jsonl(ROWS).rstrip(b"\n")),
        ("mixed.jsonl", write_jsonl([row | {"other": [1, "a", None][i % 3]} for i, row in enumerate(ROWS)])),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.parquet", parquet({name: [row[name] for row in ROWS] for name in ROWS[0]})),
        ("a.csv", b"question,answer\n" + b"".join(f'{r["question"]},"{r["answer"]}"\n'.encode() for r in ROWS)),
    ],
)
def test_every_accepted_form_gives_the_same_rows(file: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    rows = make_task("gsm8k", test=str(path)).rows("test")
    assert [(row["question"], row["answer"]) for row in rows] == [(f"{i}+1?", str(i + 1)) for i in range(5)]
    assert [row["id"] for row in rows] == [row["id"] for row in make_task("gsm8k", test=str(path)).rows("test")]


def test_text_that_looks_like_a_date_or_a_number_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of({"question": "2020-01-01", "answer": "0012"}, {"question": "1e5", "answer": "7"}))
    rows = read_rows(str(path), "task.train_data", {}, ("question", "answer"), "train")
    assert [dict(row.values) for row in rows] == [
        {"question": "2020-01-01", "answer": "0012"},
        {"question": "1e5", "answer": "7"},
    ]


def test_columns_by_other_names_and_in_order_of_preference(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Puzzle,Solution\n0204341221434321,1234341221434321\n")
    columns = {"puzzle": ["puzzle", "Puzzle"], "solution": ["solution", "Solution"]}
    (row,) = make_task("sudoku", test=str(path), columns=columns).rows("test")
    assert row["puzzle"] == "0204341221434321"
    with pytest.raises(ValueError, match=r"task\.columns: no field 'puzle'"):
        make_task("sudoku", columns={"puzle": "Puzzle"})


def test_checked_rows_are_cached_by_content_and_survive_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(write_jsonl(ROWS))

    def read() -> list[Any]:
        return [dict(row.values) for row in read_rows(str(path), "k", {}, ("question",), "train")]

    first = read()
    tables = list((tmp_path / "cache").rglob("*.arrow"))
    stamp = tables[0].stat().st_mtime_ns
    assert read() == first and [t.stat().st_mtime_ns for t in tables] == [stamp]
    path.write_bytes(write_jsonl(ROWS[:2]))
    assert len(read()) == 2
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/no_such_folder"))
    path.write_bytes(write_jsonl(ROWS[:3]))
    assert len(read()) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "thinking_trajectories": ["t", "u"], "attempt": "a"},
        {"question": "q", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "a"},
        {"question": "q", "thinking": "t", "attempt": "a", "answer": "0"},
        {"prompt": "q", "completion": "<reasoning>t</reasoning>\n<answer>a</answer>"},
    ],
)
def test_demonstrations_of_every_known_form(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(row))
    (found,), commit = read_demonstrations(str(path), "task.demonstration_data", {})
    assert commit is None
    assert found["question"] == "q" and found["completion"] == "<reasoning>t</reasoning>\n<answer>a</answer>"


@pytest.mark.parametrize(
    "row", [{"question": "q"}, {"question": "q", "thinking_trajectories": [], "attempt": "a"}, {"completion": "c"}]
)
def test_demonstration_without_its_parts_is_refused_with_its_line(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of({"question": "q", "completion": "c"}, row))
    with pytest.raises(ValueError, match=r"^task\.demonstration_data: .*a\.jsonl:2: .*Try: "):
        read_demonstrations(str(path), "task.demonstration_data", {})


def test_demonstration_columns_are_named_in_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of({"ask": "q", "say": "c"}))
    columns = {"question": "ask", "completion": "say"}
    task = make_task("gsm8k", demonstration_data=str(path), demonstration_columns=columns)
    assert [row["completion"] for row in task.demonstrations(None, 0)] == ["c"]


def test_fuzzed_bytes_never_raise_anything_but_one_line(tmp_path: Path) -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    read: dict[str, Callable[[str, str], Any]] = dict.fromkeys((".jsonl", ".json", ".csv"), reading.checked_rows)

    @settings(max_examples=150, deadline=None)
    @given(
        suffix=st.sampled_from(sorted(read)),
        content=st.binary(max_size=200) | st.text('{}[]",:\n0eE.\\u', max_size=60).map(str.encode),
    )
    def check(suffix: str, content: bytes) -> None:
        path = tmp_path / f"fuzz{suffix}"
        path.write_bytes(content)
        try:
            for record in read[suffix](str(path), "k"):
                assert isinstance(json.loads(record["row"]), dict)
        except ValueError as failure:
            assert str(failure).startswith("k: ") and "Try: " in str(failure) and "\n" not in str(failure)

    check()
