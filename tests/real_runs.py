"""Run folders for tests: a real one, made once a session in seconds, and copies of it with results that are known."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


@cache
def real_run() -> Path:
    """A finished run of both stages on Sudoku with the tiny model; tests must not write into it."""
    home = Path(tempfile.mkdtemp(prefix="d1lit-real-run-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    environment = {**os.environ, "D1LIT_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    words = ["task=sudoku", "debug=fast", "evaluation.rows=12", f"run_dir={home / 'run'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(home / "run" / "results.json")
    return home / "run"


def copy_of(run: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(run, folder)
    return folder


def add_evaluation(run: Path, right: Sequence[bool], *, stage: str = "grpo", task: str = "count") -> None:
    """Another evaluation of a known run, before its last one if it is of an earlier stage: other rows, or another task."""
    results = json.loads((run / "results.json").read_text())
    entry, file = results["evaluations"][-1], f"evaluations/{stage}-{task}.jsonl"
    rows = [json.loads(line) for line in (run / entry["rows_file"]).read_text().splitlines()][: len(right)]
    for row, good in zip(rows, right, strict=True):
        row["strict"] = row["strict"] | {"value": float(good)}
        row["question"] = f"{task} {row['question']}"
    (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {"n": len(right), "correct": sum(right), "accuracy": sum(right) / len(right)}
    entries = [*results["evaluations"], entry | counts | {"stage": stage, "task": task, "rows_file": file}]
    entries.sort(key=lambda e: ["base", "sft", "grpo"].index(e["stage"]))
    (run / "results.json").write_text(json.dumps({**results, "evaluations": entries}))


def known_run(
    folder: Path,
    right: Sequence[bool],
    *,
    recipe: str = "d1",
    seed: int = 0,
    overrides: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
    completions: Sequence[str] | None = None,
    probes: Sequence[Mapping[str, object]] = (),
) -> Path:
    """A run folder as train.py writes it, whose final model got exactly the given rows right."""
    n = len(right)
    (folder / "evaluations").mkdir(parents=True)
    rows = [
        {
            "index": i, "id": f"row-{i}", "question": f"question {i}", "answer": str(i),
            "completion": completions[i] if completions else f"<answer>{i}</answer>",
            "strict": {"value": float(good), "outcome": "ok", "parsed": str(i), "out_of": 1.0},
            "d1": {"value": float(good), "outcome": "ok", "parsed": str(i), "out_of": 1.0},
            "extra": {}, "length": 7, "truncated": False, "example": {},
        }
        for i, good in enumerate(right)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "evaluations" / "final.jsonl").write_text(text)
    entry = {
        "stage": "grpo", "task": "count", "split": "test", "completion_length": 16, "seed": 0, "n": n,
        "correct": sum(right), "accuracy": sum(right) / n, "interval": [0.1, 0.9], "d1_correct": float(sum(right)),
        "d1_out_of": float(n), "effective_tokens": 7.0, "truncated_fraction": 0.0, "unparsed_fraction": 0.0,
        "failed_fraction": 0.0, "extra": {}, "rows_file": "evaluations/final.jsonl", "settings": {},
    }  # fmt: skip
    results = {
        "recipe": recipe, "task": "count", "model": "tiny", "seed": seed, "grader": "strict", "evaluations": [entry],
        "probes": list(probes), "cost": {"seconds": 10.0 + seed},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    config = {"recipe": {"name": recipe, "stages": ["grpo"]}, "seed": seed, "run_dir": str(folder), **(settings or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.json").write_text(json.dumps([*overrides, f"seed={seed}"]))
    return folder


def probed(share: float, stage: str = "grpo", task: str = "count") -> list[dict[str, object]]:
    """Probes as results.json has them: forced words and pass@1 at a share, pass@4 at twice that."""
    interval = [max(0.0, share - 0.1), share + 0.1]
    facts = {"stage": stage, "task": task, "n": 10, "accuracy": share, "interval": interval, "extra": {}}
    passed = {str(k): {"mean": share * (1 + k // 4), "interval": interval} for k in (1, 4)}
    forced = {**facts, "probe": "forced", "prefix": "<reasoning>x"}
    return [forced, {**facts, "n": 40, "probe": "pass_at_k", "pass_at_k": passed}]
