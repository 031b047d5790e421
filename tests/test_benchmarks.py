"""Every benchmark runs in a tiny shape and says the same as its baseline; no speed is asserted here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a benchmark with --quick; gives what it printed and the JSON it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()

    def run(name: str) -> tuple[str, dict[str, Any]]:
        importlib.import_module(name).main(["--quick", "--out", str(tmp_path)])
        printed = capsys.readouterr().out
        return printed, json.loads((tmp_path / f"{name}.json").read_text())

    yield run
    torch.set_num_threads(threads)


def is_table(printed: str, content: dict[str, Any]) -> bool:
    """Every table was printed, and has a heading, a rule and at least one line of as many cells."""
    for text in content["tables"]:
        lines = [line for line in text.splitlines() if line.startswith("|")]
        if text not in printed or len(lines) < 3 or len({line.count(" | ") for line in [lines[0], *lines[2:]]}) != 1:
            return False
    return bool(content["tables"])


def test_rollout(run) -> None:
    printed, content = run("rollout")
    assert is_table(printed, content) and content["quick"] and content["machine"]["matmul_gflops"] > 0
    exact = [record for record in content["records"] if not record["cached"]]
    assert {record["temperature"] for record in exact} == {0.0, 0.9}
    for record in exact:
        assert record["equal_tokens"] in (None, record["tokens"])
        assert record["flops_factor"] > 1 and record["measured"]["ours"]["peak_mb"] > 0
    assert len(exact) < len(content["records"])


def test_scoring(run) -> None:
    printed, content = run("scoring")
    assert is_table(printed, content)
    assert all(max(record["largest_difference"].values()) < 1e-5 for record in content["records"])


def test_update(run) -> None:
    printed, content = run("update")
    assert is_table(printed, content)
    assert all(max(record["gradient_difference"].values()) < 1e-5 for record in content["records"])


def test_packed(run) -> None:
    printed, content = run("packed")
    assert is_table(printed, content)
    assert all(record["gradient_difference"] < 1e-5 for record in content["records"])


def test_step(run) -> None:
    printed, content = run("step")
    assert is_table(printed, content)
    for record in content["records"]:
        assert set(record["parts"]) == {"textbook", "exact, row", "exact, group", "dual cache, group"}
        for parts in record["parts"].values():
            assert set(parts) == {"rollout", "reward", "scoring", "update"}


@pytest.mark.slow
def test_graders(run) -> None:
    printed, content = run("graders")
    assert is_table(printed, content)
    records = {(record["reward"], record["texts"]): record for record in content["records"]}
    assert len(records) == 36 and all(record["ours"] > 0 and record["ours_by_clock"] > 0 for record in records.values())
    for name in ("number", "math, by spelling", "math, by algebra", "countdown", "sudoku"):
        assert records[name, "ordinary"]["ours_paid"] > 0 < records[name, "ordinary"]["naive"]
    assert not any(record["ours_paid"] for (name, kind), record in records.items() if kind == "repeated marks"
                   and name in ("number", "countdown", "sudoku"))  # fmt: skip


@pytest.mark.slow
def test_growth(run, tmp_path: Path) -> None:
    printed, content = run("growth")
    assert is_table(printed, content) and len(content["records"]) == 6
    assert (tmp_path / "growth.svg").read_text().count("<polyline") == 6 * 6


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["trained", "gradient_noise"])
def test_benchmarks_of_a_trained_model(tmp_path: Path, name: str) -> None:
    """In a process of its own: it composes a run, whose YAML lists stand for tuples."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--out", str(tmp_path)],
        env={**os.environ, "D1LIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert is_table(done.stdout, content) and len(content["records"][0]["lines"]) >= 4


def test_peak_memory_is_what_was_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measuring = importlib.import_module("measuring")

    def work() -> None:
        first = torch.ones(2**20)  # 4 MB
        second = first + 1  # 8 MB held
        del first
        third = second * 2  # 8 MB held
        del second, third
        torch.ones(2**19)

    assert measuring.peak_bytes(work, "cpu") == pytest.approx(2 * 4 * 2**20, rel=1e-3)


@pytest.mark.parametrize(
    "only",
    [["machine", "rollout"], pytest.param(None, marks=pytest.mark.nightly)],
    ids=["rollouts", "everything"],
)
def test_gpu(only: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The sections that a GPU is measured by, in a tiny shape on the processor; none of them may fail."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out = tmp_path / "gpu.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--out", str(out)]
    importlib.import_module("gpu").main(arguments if only is None else [*arguments, "--only", *only])
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "Error" not in printed and not [name for name in content if name.endswith("failed")]
    assert all(text in printed for text in content["tables"])
    rollout = content["rollout B 2 T 0.9"]
    assert len(rollout) == 8 and all(one["seconds"] > 0 for one in rollout.values())
    assert rollout["exact"]["arithmetic"] > 1
    if only is None:
        assert all(check["ok"] for check in content["checks"].values())
        assert {"update", "scoring", "agreement", "step", "memory"} <= set(content)
        assert max(content["agreement"].values()) < 1e-5, "fp32 here"


def test_gpu_notes_what_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")

    def fails(session: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    monkeypatch.setitem(gpu.SECTIONS, "checks", fails)
    arguments = ["--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    gpu.main([*arguments, "--only", "checks", "machine"])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["checks failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert content["machine"]["peak_tflops"] > 0
    gpu.main([*arguments, "--seconds", "-1", "--only", "machine", "rollout"])
    assert "rollout: not run, the time is up" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_program_in_a_small_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What a GPU is given to do, on a processor: processes of `train.py` on a folder in LLaDA's layout."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = importlib.import_module("gpu_program")
    quick = ["scale.grpo.max_updates=2", "sampler.completion_length=32", "scale.sft.layout.max_length=1024"]
    runs = {"SFT, merge, GRPO": (*program.RUNS["SFT, merge, GRPO"], *quick), "wrong": ("recipe=nothing",)}
    monkeypatch.setattr(program, "RUNS", runs)
    out = tmp_path / "program.json"
    program.main(["--shape", "tiny", "--device", "cpu", "--out", str(out), "--estimates"])
    content, printed = json.loads(out.read_text()), capsys.readouterr().out
    run = content["SFT, merge, GRPO"]
    assert set(run["stages"]) == {"sft", "grpo"} and content["tables"][0] in printed
    assert {"rollout", "replay", "scoring", "update"} <= set(run["stages"]["grpo"]["sections"])
    assert any("memory of each device" in line for line in run["dry_run"])
    assert content["wrong"]["status"] == 2 and "recipe: no choice" in content["wrong"]["error"]
