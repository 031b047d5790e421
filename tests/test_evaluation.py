"""Evaluations: compared pairwise, written as they go, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d1lit.draws import CounterDraws
from d1lit.evaluation import append_records, check_coverage, compare_records, read_records
from d1lit.models import build_tiny_tokenizer, export_model
from d1lit.models.presets import fresh_network, tiny_config

ROOT = Path(__file__).resolve().parents[1]


def rows(values: list[float], out_of: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    verdicts = [{"value": value, "out_of": out_of, "outcome": "ok"} for value in values]
    return [
        {"index": n, "id": f"r{n}", "question": "q", "answer": "a", "strict": v, "d1": v, **changes}
        for n, v in enumerate(verdicts)
    ]


def test_paired_comparison_by_hand() -> None:
    first, second = rows([1, 1, 0, 0, 1, 0, 0, 0]), rows([1, 0, 1, 1, 1, 1, 1, 1])
    found = compare_records(first, second[::-1], CounterDraws(0))
    assert (found.n, found.only_first, found.only_second) == (8, 1, 5)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # two-sided binomial tail of 1 in 6
    assert found.difference.value == pytest.approx(0.5)
    assert found.difference.low < 0.5 < found.difference.high
    back = compare_records(second, first, CounterDraws(0))
    assert (back.only_first, back.p_value, back.difference.value) == (5, found.p_value, -found.difference.value)
    same = compare_records(first, first, CounterDraws(0))
    assert (same.p_value, same.difference.low, same.difference.high) == (1.0, 0.0, 0.0)


def test_graders_that_count_cells_are_compared_by_share() -> None:
    found = compare_records(rows([4, 8], 8.0), rows([8, 8], 8.0), CounterDraws(0), grader="d1")
    assert found.difference.value == pytest.approx(0.25)
    assert (found.only_first, found.only_second) == (0, 1)


@pytest.mark.parametrize(
    "second", [rows([1.0]), rows([1.0, 0.0], question="another"), [*rows([1.0])] * 2, rows([1.0, 1.0, 1.0])]
)
def test_records_of_other_rows_are_refused(second: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="not of the same rows"):
        compare_records(rows([1.0, 0.0]), second, CounterDraws(0))


def test_any_text_survives_the_file_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    texts = ["a\u2028b\x85c\x0bd", "\ud800", "\x00", "é", "two\nlines\r\n", ""]
    file = tmp_path / "rows.jsonl"
    append_records(file, [{"index": n, "completion": text} for n, text in enumerate(texts)])
    assert [record["completion"] for record in read_records(file)] == texts
    with file.open("a") as handle:
        handle.write('{"index": 6, "comp')
    assert len(read_records(file)) == len(texts)
    append_records(file, [{"index": 6, "completion": "whole"}])
    assert [record["index"] for record in read_records(file)] == list(range(7))
    with pytest.raises(ValueError, match=r"rows \[7\] are missing"):
        check_coverage(read_records(file), 8)
    append_records(file, [{"index": 3, "completion": "again"}])
    with pytest.raises(ValueError, match=r"rows \[3\] stand twice"):
        check_coverage(read_records(file), 7)


# ------------------------------------------------------------------------------------------------------------- a real one


def start(model: Path, output: Path) -> subprocess.Popen[bytes]:
    words = [
        "task=countdown",
        f"model.path={model}",
        f"output={output}",
        "evaluation.rows=24",
        "evaluation.batch_size=2",
    ]
    words += ["sampler.completion_length=64", "sampler.block_length=16", "sampler.num_steps=64"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "evaluate.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows_file(output: Path) -> Path | None:
    return next(iter(sorted((output / "evaluations").glob("*.jsonl"))), None)


@pytest.mark.slow
def test_an_evaluation_killed_twice_ends_with_the_same_rows_and_repeats_none(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    ids = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = tiny_config(len(tokenizer), *ids, width=64, num_layers=3, num_heads=4, mlp_width=128, rope_theta=100.0,
                         max_length=512, init_std=0.3)  # type: ignore[arg-type]  # fmt: skip
    export_model(fresh_network(config, 0), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    whole = start(tmp_path / "model", tmp_path / "whole")
    text, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, text.decode()

    kept: list[str] = []
    for _ in range(2):
        process = start(tmp_path / "model", tmp_path / "broken")
        until = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < until:
            file = rows_file(tmp_path / "broken")
            if file is not None and file.read_text().count("\n") >= len(kept) + 4:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        file = rows_file(tmp_path / "broken")
        assert file is not None
        now = file.read_text().split("\n")[:-1]
        assert now[: len(kept)] == kept
        kept = now
    print(f"rows written before the second kill: {len(kept)} of 24")
    last = start(tmp_path / "model", tmp_path / "broken")
    text, _ = last.communicate(timeout=600)
    assert last.returncode == 0, text.decode()

    mine, wanted = (rows_file(tmp_path / name) for name in ("broken", "whole"))
    assert mine is not None and wanted is not None and mine.name == wanted.name
    lines = mine.read_text().split("\n")[:-1]
    assert lines[: len(kept)] == kept and len(lines) == 24
    records = [
        sorted(map(json.loads, file.read_text().split("\n")[:-1]), key=lambda r: r["index"]) for file in (mine, wanted)
    ]
    assert records[0] == records[1]
    results = [
        json.loads((tmp_path / name / "results.json").read_text())["evaluations"] for name in ("broken", "whole")
    ]
    assert results[0] == results[1]
