"""The real data sets end to end, in small: a tiny d1 run of every task on real rows, its results read back.

docs/evaluation.md has the full form: the presets as they are, on all test rows.
"""

from __future__ import annotations

import json

import datasets
import pytest

from d1lit.app.cli import train
from tests.golden.reading import DATA, needs_data

pytestmark = [pytest.mark.slow, needs_data]

FILES = {
    "countdown": {"train": "countdown/tasks3to4_train_uft.jsonl", "test": "countdown/cd3_test.jsonl"},
    "math500": {"train": "math/train.jsonl", "test": "math500/test.jsonl"},
    "gsm8k": {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
    "sudoku": {"test": "sudoku4/test.jsonl"},
}
SMALL = ["model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}", "debug=fast", "evaluation.rows=24"]


@pytest.mark.parametrize("task", FILES)
def test_a_small_run_on_real_rows(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    places = [f"task.{split}_data={DATA / file}" for split, file in FILES[task].items()]
    assert train(["recipe=d1", f"task={task}", *places, *SMALL, "run_dir=run", "report=false"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "run/results.json"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == task  # no "-synthetic": the rows are the data set's own
    assert [entry["stage"] for entry in results["evaluations"]] == ["base", "sft", "grpo"]
    lines = (DATA / FILES[task]["test"]).read_text(encoding="utf-8").splitlines()
    assert results["data"]["test_rows"] == len(lines)
    assert f"{len(lines)} test" in err
    dropped = results["data"]["dropped_rows"]
    if task in ("math500", "gsm8k"):  # whose longest problems have more bytes than the tiny presets' prompts
        assert dropped["grpo"] > 0
        assert f"grpo: {dropped['grpo']} of" in err
    else:
        assert dropped["grpo"] == 0
    for entry in results["evaluations"]:
        rows = [json.loads(line) for line in (tmp_path / "run" / entry["rows_file"]).read_text().splitlines()]
        assert sorted(row["index"] for row in rows) == list(range(24))
        assert all(row["strict"]["outcome"] in ("ok", "unparsed") for row in rows)
        assert entry["failed_fraction"] == 0.0
