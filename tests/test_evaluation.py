"""Evaluations: written as they go, killed and continued."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from d1lit.app.cli import evaluate
from d1lit.app.task_evaluator import deal_records, versions
from d1lit.data import EncodedRow
from d1lit.draws import CounterDraws
from d1lit.evaluation import (
    append_records,
    check_coverage,
    pass_at_1,
    read_records,
    records_by_index,
    summarise,
)
from d1lit.evaluation import evaluate as evaluate_rows
from d1lit.models import build_tiny_tokenizer, export_model
from d1lit.models.cache import KVCache
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.rewards.parts import Grader
from d1lit.sampling import DualCache
from tests.end_to_end.small import EvenTokens, decode, small_policy
from tests.test_sampling import sampler

ROOT = Path(__file__).resolve().parents[1]


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


def test_half_a_line_that_a_full_disk_took_is_taken_back(tmp_path: Path) -> None:
    """Else the next line would be glued to it, and no resumed run could read the file."""
    file = tmp_path / "samples.jsonl"
    append_records(file, [{"index": 0}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 30, before[1]))
    try:
        with pytest.raises(OSError, match=r"samples\.jsonl"):
            append_records(file, [{"index": 1}, {"index": 2, "completion": "x" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_records(file, [{"index": 3}])
    assert [record["index"] for record in read_records(file)] == [0, 3]


def test_rows_that_stand_twice_or_were_made_otherwise_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_records(file, [{"index": n, "protocol_sha256": "a"} for n in range(3)])
    assert sorted(records_by_index(file, "a")) == [0, 1, 2]
    with pytest.raises(ValueError, match="rows of another protocol"):
        records_by_index(file, "b")
    append_records(file, [{"index": 1, "protocol_sha256": "a"}])
    with pytest.raises(ValueError, match=r"row 1 stands twice in .*rows\.jsonl. Try: another output folder"):
        records_by_index(file, "a")


def test_files_of_several_processes_may_repeat_a_row_but_not_contradict_it(tmp_path: Path) -> None:
    file, part = tmp_path / "rows.jsonl", tmp_path / "rows.rank1.jsonl"
    append_records(file, [{"index": 0, "completion": "a"}])
    append_records(part, [{"index": 0, "completion": "a"}, {"index": 1, "completion": "b"}])  # killed before tidying up
    deal_records(file, 1)
    assert [row["completion"] for row in read_records(file)] == ["a", "b"] and not part.exists()
    append_records(part, [{"index": 1, "completion": "c"}])
    with pytest.raises(ValueError, match="two files disagree on row 1"):
        deal_records(file, 1)


def test_pass_at_1_by_hand() -> None:
    def entry(length: int, seed: int, accuracy: float) -> dict[str, Any]:
        return {"completion_length": length, "seed": seed, "accuracy": accuracy, "n": 10}

    (found,) = pass_at_1([entry(8, 0, 0.2), entry(16, 0, 0.5), entry(8, 1, 0.4)])
    assert (found["completion_length"], found["seeds"], found["mean"]) == (8, [0, 1], pytest.approx(0.3))
    # Wilson for 3 of 10 by hand; Student's t with one degree of freedom (12.706) times 0.1, cut at 0 and 1.
    assert found["interval"] == pytest.approx((0.10779, 0.60322), abs=1e-5)
    assert found["over_seeds"] == (0.0, 1.0)
    (same,) = pass_at_1([entry(8, 0, 0.0), entry(8, 1, 0.0)])
    assert same["interval"][1] > 0.2, "seeds that agree on nothing right do not make a certainty"


def graded(index: int, right: float, cells: float, **facts: Any) -> dict[str, Any]:
    verdicts = {"strict": {"value": 0.0, "outcome": "ok"}, "d1": {"value": right, "out_of": cells}}
    return {"index": index, **verdicts, "extra": {}, "length": 5, "truncated": False, **facts}


def test_the_interval_over_cells_is_as_wide_as_one_over_rows_where_a_row_is_all_or_nothing() -> None:
    records = [graded(n, 8.0 if n < 4 else 0.0, 8.0) for n in range(20)]
    summary = summarise(records, "d1")
    assert (summary.n, summary.correct, summary.effective_n) == (160, 32, pytest.approx(19.0))
    low, high = summary.interval
    assert 0.05 < low < 0.10 and 0.41 < high < 0.45  # Wilson for 4 of 20: 0.081 to 0.416; for 32 of 160: 0.146 to 0.269
    entry = {"completion_length": 8, "accuracy": 0.2, "n": 160, "effective_n": summary.effective_n}
    (found,) = pass_at_1([{**entry, "seed": 0}, {**entry, "seed": 1}])
    assert found["interval"] == pytest.approx(summary.interval)
    rows = summarise([graded(n, float(n < 4), 1.0) for n in range(20)], "d1")
    assert rows.interval == pytest.approx((0.08066, 0.41602), abs=1e-5) and rows.effective_n == 20


def test_what_stored_texts_do_not_say_is_null_and_no_zero() -> None:
    summary = summarise([graded(0, 1.0, 1.0, length=None, truncated=None), graded(1, 1.0, 1.0)], "strict")
    assert summary.effective_tokens is None and summary.truncated_fraction is None
    summary = summarise([graded(0, 1.0, 1.0, length=3), graded(1, 1.0, 1.0, truncated=True)], "strict")
    assert (summary.effective_tokens, summary.truncated_fraction) == (4.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [({}, 8, 8), ({"guidance": 0.5}, 16, 16), ({"cache": DualCache(KVCache)}, 3, 5), ({"num_steps": 4}, 4, 4)],
)
def test_passes_are_those_of_the_whole_canvas(changes: dict[str, Any], least: float, most: float) -> None:
    """Eight steps of sixteen tokens; a cache computes the block of eight in all steps but the first of each block."""
    rows = [EncodedRow([1, 2, 3, 4, 5], {"id": n, "question": "?", "answer": "!"}) for n in range(4)]
    grader, device = Grader(strict=EvenTokens(), d1=EvenTokens()), torch.device("cpu")
    drawer, draws = sampler(**changes), CounterDraws(0)
    found = evaluate_rows(small_policy(), drawer, rows, decode, grader, draws, batch_size=3, device=device)
    passes = summarise(found, "strict").passes
    assert passes is not None
    assert least <= passes <= most
    if "cache" in changes:
        assert passes == pytest.approx((2 * 21 + 6 * 8) / 21)


# ------------------------------------------------------------------------------------------------------------- a real one


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny models of random weights."""
    tokenizer = build_tiny_tokenizer()
    ids = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = tiny_config(len(tokenizer), *ids, width=32, num_layers=2, num_heads=2, mlp_width=64, rope_theta=100.0,
                         max_length=512, init_std=0.3)  # type: ignore[arg-type]  # fmt: skip
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for seed, folder in enumerate(folders):
        export_model(fresh_network(config, seed), folder)
        tokenizer.save_pretrained(folder)
    return folders


def evaluated(model: Path, output: Path, *words: str) -> dict[str, Any]:
    small = ["evaluation.rows=4", "evaluation.batch_size=3", "evaluation.temperature=1.0", "task.num_builtin.train=300"]
    assert evaluate(["task=countdown", f"model.path={model}", f"output={output}", *small, *words]) == 0
    return json.loads((output / "results.json").read_text())


def test_lengths_seeds_and_pass_at_k_in_one_call(models: list[Path], tmp_path: Path) -> None:
    wanted = "evaluation.pass_at_k={num_samples:3,ks:[1,3],temperature:1.0,rows:2}"
    results = evaluated(models[0], tmp_path / "out", "seeds=[0,7]", "lengths=[20,40]", wanted)
    entries = results["evaluations"]
    assert [(e["seed"], e["completion_length"], e["n"]) for e in entries] == [
        *((0, 20, 4), (0, 40, 4), (7, 20, 4), (7, 40, 4))
    ]
    assert len({e["protocol_sha256"] for e in entries}) == len({e["rows_file"] for e in entries}) == 4
    for entry in entries:
        rows = read_records(tmp_path / "out" / entry["rows_file"])
        assert sorted(r["index"] for r in rows) == [0, 1, 2, 3]
        assert {r["protocol_sha256"] for r in rows} == {entry["protocol_sha256"]}
        assert {"math-verify", "torch", "d1lit"} <= entry["settings"]["packages"].keys()
        assert 0.0 == entry["timeout_fraction"] == entry["failed_fraction"]
    first, other = (read_records(tmp_path / "out" / entries[n]["rows_file"]) for n in (0, 2))
    assert [r["completion"] for r in first] != [r["completion"] for r in other], "the seed changed nothing"
    assert [(p["completion_length"], p["seeds"]) for p in results["pass_at_1"]] == [(20, [0, 7]), (40, [0, 7])]
    (probe,) = results["probes"]
    assert probe["probe"] == "pass_at_k" and set(probe["pass_at_k"]) == {"1", "3"} and probe["n"] == 6


def test_rows_of_other_weights_are_never_gone_on_with(models: list[Path], tmp_path: Path) -> None:
    mine, others = (evaluated(model, tmp_path / "out", "lengths=[20]")["evaluations"][0] for model in models)
    assert mine["protocol_sha256"] == others["protocol_sha256"] and mine["rows_file"] != others["rows_file"]
    assert [entry["weights"]["path"] for entry in (mine, others)] == [str(model) for model in models]
    assert mine["weights"]["files_sha256"] != others["weights"]["files_sha256"]
    assert mine["weights"].keys() == {"path", "revision", "run", "adapter", "files_sha256"}
    texts = [[r["completion"] for r in read_records(tmp_path / "out" / e["rows_file"])] for e in (mine, others)]
    assert len(texts[0]) == len(texts[1]) == 4 and texts[0] != texts[1]


@pytest.mark.parametrize(
    ("word", "key"), [("seeds=[1,1]", "seeds"), ("seeds=[]", "seeds"), ("lengths=[20,20]", "lengths")]
)
def test_a_seed_or_length_named_twice_is_refused(models: list[Path], word: str, key: str, capsys: Any) -> None:
    assert evaluate(["task=countdown", f"model.path={models[0]}", word]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {key}: ")


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


def test_a_package_that_is_not_installed_has_no_version():
    found = versions("torch", "no-such-package")
    assert found == {"torch": torch.__version__, "no-such-package": "not installed"}
