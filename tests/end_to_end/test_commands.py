"""The commands as a user types them: what they print, what they leave, and that their parts fit together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d1lit.app.cli import evaluate, train
from d1lit.app.composing import CONF
from d1lit.app.consolidating import consolidate
from d1lit.app.export import export
from d1lit.app.open_run import open_run
from d1lit.models import build_tiny_tokenizer, export_model, load_network
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.report.events import read_scalars
from tests.golden.reading import DATA, needs_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}"]
RECIPES = sorted(file.stem for file in (CONF / "recipe").glob("*.yaml"))
SLOW = [("pretrain", "countdown"), ("sft", "gsm8k"), ("grpo", "math500"), ("spg", "sudoku"), ("vrpo", "countdown")]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Base models of these tests stay among their files; no hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D1LIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def results_of(printed: str) -> dict[str, Any]:
    """What the file says that the last printed line names."""
    path = Path(printed.rstrip().splitlines()[-1])
    assert path.name == "results.json"
    return json.loads(path.read_text())


def test_help_answers_at_once():
    """A deadline of the commands, not a benchmark."""
    for program in ("train.py", "evaluate.py"):
        started = time.monotonic()
        done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True)
        assert time.monotonic() - started < 2.0
        assert "estimator" in done.stdout
        assert "one_step" in done.stdout
        assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a small d1 run on sudoku, started as a command of its own, and what that printed last."""
    folder = tmp_path_factory.mktemp("runs") / "d1"
    words = [*SMALL, "recipe=d1", "task=sudoku", "debug=fast", "evaluation.rows=6", f"run_dir={folder}"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def check_entry(entry: dict[str, Any]) -> None:
    """One line of `evaluations`: a count, its share, its interval, and all that the number depends on."""
    assert 0 <= entry["correct"] <= entry["n"]
    assert entry["accuracy"] == pytest.approx(entry["correct"] / entry["n"])
    low, high = entry["interval"]
    assert 0 <= low <= entry["accuracy"] <= high <= 1
    assert {"task", "stage", "split", "completion_length", "seed", "prompt_sha256", "settings"} <= entry.keys()
    assert {"sampler", "dtype", "device", "batch_size", "packages"} <= entry["settings"].keys()
    assert {"temperature", "num_steps", "block_length", "guidance"} <= entry["settings"]["sampler"].keys()


def test_results_of_a_run(run):
    folder, printed = run
    assert printed.splitlines()[-1] == str(folder / "results.json")
    results = results_of(printed)
    assert (results["recipe"], results["task"], results["seed"]) == ("d1", "sudoku", 0)
    assert [entry["stage"] for entry in results["evaluations"]] == ["base", "sft", "grpo"]
    for entry in results["evaluations"]:
        check_entry(entry)
        assert entry["n"] == 6
        rows = [json.loads(line) for line in (folder / entry["rows_file"]).read_text().splitlines()]
        assert len(rows) == 6
        assert sum(row["strict"]["value"] >= 1 for row in rows) == entry["correct"]
        assert all("d1" in row for row in rows)
    assert results["cost"]["forwards"] > 0
    for name in ("config.yaml", "environment.json", "samples.jsonl", "model/model.safetensors", "report.html"):
        assert (folder / name).exists(), name


def test_scalars_have_their_fixed_names(run):
    scalars = read_scalars(run[0] / "logs" / "grpo")
    names = {
        "train/loss", "train/clip_fraction", "rollout/reward", "rollout/length", "rollout/zero_std_fraction",
        "time/rollout_s", "time/update_s", "cost/forwards", "cost/mfu", "guard/skipped",
    }  # fmt: skip
    assert names <= scalars.keys(), names - scalars.keys()
    assert {name for name in scalars if name.startswith("rollout/reward/")}
    assert [step for step, _ in scalars["train/loss"]] == [0, 1]
    assert {"val/accuracy", "val/loss"} <= read_scalars(run[0] / "logs" / "sft").keys()


def test_the_bases_evaluation_is_shared_by_runs_from_the_same_base(run, tmp_path):
    """And by no others: other rows or a refusal to reuse have it made anew, to the same records."""

    def base_rows(name: str, *more: str) -> tuple[str, str]:
        folder = tmp_path / name
        words = [*SMALL, "recipe=sft", "task=sudoku", "debug=fast", "report=false", "logger=none", f"run_dir={folder}"]
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *words, *more], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        entry = json.loads((folder / "results.json").read_text())["evaluations"][0]
        assert entry["stage"] == "base"
        return (folder / entry["rows_file"]).read_text(), done.stderr

    (first,) = [e for e in json.loads((run[0] / "results.json").read_text())["evaluations"] if e["stage"] == "base"]
    taken, said = base_rows("taken", "evaluation.rows=6")
    assert "its evaluation is taken from" in said
    assert taken == (run[0] / first["rows_file"]).read_text()
    made, said = base_rows("made", "evaluation.rows=6", "evaluation.reuse_base=false")
    assert "is taken from" not in said
    assert made == taken
    fewer, said = base_rows("fewer", "evaluation.rows=4")
    assert "is taken from" not in said
    assert len(fewer.splitlines()) == 4


def test_a_finished_run_is_not_run_again(run, capsys):
    folder, printed = run
    before = {file: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
    words = [*SMALL, "recipe=d1", "task=sudoku", "debug=fast", "evaluation.rows=6", f"run_dir={folder}"]
    assert train(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == printed.splitlines()[-1]
    assert "finished earlier" in err
    assert {file: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))} == before


@pytest.mark.parametrize(
    ("recipe", "task"),
    [
        pytest.param(recipe, task, marks=() if (recipe, task) in SLOW else pytest.mark.nightly)
        for recipe in RECIPES
        for task in ("countdown", "gsm8k", "math500", "sudoku")
        if (recipe, task) in SLOW or task in ("countdown", "sudoku")
    ],
)
def test_every_recipe_runs(recipe, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train([*SMALL, f"recipe={recipe}", f"task={task}", "debug=fast", "report=false"]) == 0
    results = results_of(capsys.readouterr().out)
    assert results["recipe"] == recipe
    assert results["task"] == task + ("-synthetic" if task in ("gsm8k", "math500") else "")
    for entry in results["evaluations"]:
        check_entry(entry)
    (folder,) = (tmp_path / "outputs").iterdir()
    assert task in folder.name


@pytest.mark.slow
def test_a_sweep_gives_every_job_its_folder_and_names_the_failed(tmp_path):
    """One of the four finds its folder taken by a run with other values; the others run."""
    words = [*SMALL, "task=sudoku", "debug=fast", "evaluation.base=false", "report=false", f"run_dir={tmp_path}/runs"]
    taken = tmp_path / "runs" / "recipe=grpo,seed=2"
    taken.mkdir(parents=True)
    (taken / "config.yaml").write_text("seed: 5\n")
    command = [sys.executable, ROOT / "train.py", "-m", "recipe=sft,grpo", "seed=1,2", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: the job")]
    assert "recipe=grpo seed=2" in line
    assert line.endswith("[E503]")
    folders = {folder.name for folder in (tmp_path / "runs").iterdir()}
    assert folders == {f"recipe={recipe},seed={seed}" for recipe in ("sft", "grpo") for seed in (1, 2)}
    for folder in (tmp_path / "runs").iterdir():
        if folder == taken:
            assert [file.name for file in folder.iterdir() if not file.name.startswith(".")] == ["config.yaml"]
            continue
        results = json.loads((folder / "results.json").read_text())
        assert folder.name == f"recipe={results['recipe']},seed={results['seed']}"


# ---------------------------------------------------------------------------------------------------------- evaluating


def test_evaluate_a_run(run, tmp_path, monkeypatch, capsys):
    """Its own numbers again, then two lengths, then another task."""
    monkeypatch.chdir(tmp_path)
    folder, printed = run
    assert evaluate([f"run={folder}"]) == 0
    (again,) = results_of(capsys.readouterr().out)["evaluations"]
    last = results_of(printed)["evaluations"][-1]
    assert {key: again[key] for key in ("n", "correct", "accuracy", "interval", "protocol_sha256")} == {
        key: last[key] for key in ("n", "correct", "accuracy", "interval", "protocol_sha256")
    }
    assert evaluate([f"run={folder}", "lengths=[20,60]", "output=lengths"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "lengths/results.json"
    entries = results_of(out)["evaluations"]
    assert [entry["completion_length"] for entry in entries] == [20, 60]
    assert [entry["settings"]["sampler"]["num_steps"] for entry in entries] == [5, 15]  # equal tokens a step
    assert evaluate([f"run={folder}", "task=countdown", "evaluation.rows=3", "output=other"]) == 0
    (entry,) = results_of(capsys.readouterr().out)["evaluations"]
    assert (entry["task"], entry["n"]) == ("countdown", 3)
    check_entry(entry)
    job = tmp_path / "recipe=d1,seed=1"  # what a sweep calls the folder of a job
    job.symlink_to(folder)
    for word in (f"run={job}", f"run='{job}'"):
        assert evaluate([word, "evaluation.rows=2", "output=again"]) == 0
        (entry,) = results_of(capsys.readouterr().out)["evaluations"]
        assert entry["n"] == 2


PUBLISHED = {
    # What d1's Table 1 counts for the base model at 128 tokens; Sudoku counts cells.
    "math500": (130, 500),
    "countdown": (53, 256),
    "sudoku": (240, 2048),
    "gsm8k": (783, 1130),
}


@needs_data
@pytest.mark.parametrize("task", [pytest.param("math500", marks=pytest.mark.slow), "countdown", "sudoku", "gsm8k"])
def test_published_generations_give_the_published_figures(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = DATA / "d1_baselines" / f"{task}_128.jsonl"
    assert evaluate([f"rescore={file}", f"task={task}", "task.grader=d1", "output=out"]) == 0
    (entry,) = results_of(capsys.readouterr().out)["evaluations"]
    assert (entry["d1_correct"], entry["d1_out_of"]) == PUBLISHED[task]
    assert (entry["correct"], entry["n"]) == PUBLISHED[task], "counted as the paper counts"
    assert entry["effective_tokens"] is None and entry["truncated_fraction"] is None, "nobody measured them"
    low, high = entry["interval"]
    assert entry["effective_n"] <= entry["n"] and (high - low > 0.034 or task != "sudoku"), "cells are not trials"


def test_own_generations_are_graded_again(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, printed = run
    last = results_of(printed)["evaluations"][-1]
    assert evaluate([f"rescore={folder / last['rows_file']}", "task=sudoku"]) == 0
    (entry,) = results_of(capsys.readouterr().out)["evaluations"]
    for key in ("n", "correct", "d1_correct", "extra", "effective_tokens", "truncated_fraction"):
        assert entry[key] == last[key]


# ------------------------------------------------------------------------------------------------------- the 8B's path


@pytest.fixture(scope="module")
def llada_folder(tmp_path_factory) -> Path:
    """A small random model in LLaDA's own layout, with tokenizer and chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("llada"), build_tiny_tokenizer()
    ids = [int(tokenizer.convert_tokens_to_ids(str(t))) for t in (tokenizer.mask_token, tokenizer.eos_token)]
    config = tiny_config(len(tokenizer), ids[0], ids[1], ids[1], 32, 2, 4, 48, 1e4, 4096, init_std=0.1)
    config.family = "llada"
    export_model(fresh_network(config, 0, torch.bfloat16), folder, layout="official")
    tokenizer.save_pretrained(folder)
    assert "model.transformer.blocks.0.q_proj.weight" in (folder / "model.safetensors").read_bytes()[:20000].decode(
        "latin1"
    )
    return folder


def test_the_8b_path_on_a_small_folder(llada_folder, tmp_path, monkeypatch, capsys):
    """LoRA, its merge, the right-padded layout and the paper's scale: everything of the 8B run but its size."""
    monkeypatch.chdir(tmp_path)
    model = ["model=llada_8b", f"model.path={llada_folder}"]
    task = [
        "task=sudoku",
        "task.num_builtin.train=64",
        "task.num_builtin.test=4",
        "task.val_rows=4",
        "task.max_prompt_length=2048",
        "task.max_test_prompt_length=2048",
    ]
    canvas = ["sampler.completion_length=16", "sampler.block_length=8", "sampler.num_steps=4"]
    canvas += ["scale.evaluation.lengths=null"]
    small = [
        "scale.sft.layout.max_length=2048",
        "scale.sft.max_updates=2",
        "scale.sft.batch_size=2",
        "scale.grpo.max_updates=2",
        "scale.grpo.batch_size=2",
        "scale.grpo.group_size=2",
        "stages.grpo.module.num_inner_updates=2",
        "stages.sft.validate_every=null",
        "stages.grpo.validate_every=null",
        "report=false",
    ]
    # Only training asks for the paper's demonstrations, which stand on the hub.
    assert train(["recipe=d1", *model, *task, "task.demonstration_data=task", *canvas, *small, "run_dir=run"]) == 0
    results = results_of(capsys.readouterr().out)
    assert [entry["stage"] for entry in results["evaluations"]] == ["base", "sft", "grpo"]
    assert all(entry["settings"]["dtype"] == "bfloat16" for entry in results["evaluations"])
    targets = {stage: targets_of(tmp_path / "run" / "stages" / stage / "model") for stage in ("sft", "grpo")}
    assert targets == {"sft": {"q_proj", "k_proj", "v_proj"}, "grpo": {"q_proj", "k_proj", "v_proj", "up_proj"}}

    final = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight" in final, "LLaDA's own names"
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}

    assert evaluate(["run=run"]) == 0
    (entry,) = results_of(capsys.readouterr().out)["evaluations"]
    for key in ("n", "correct", "effective_tokens", "protocol_sha256"):
        assert entry[key] == results["evaluations"][-1][key]

    # A model folder with an adapter on it, here SFT's, at two lengths; the folder may as well be a name on the hub.
    asked = []
    monkeypatch.setattr(
        "d1lit.models.loading.snapshot_download", lambda path, **_: asked.append(path) or str(llada_folder)
    )
    for place in (f"{llada_folder}", "somebody/llada"):
        adapter = ["model=llada_8b", f"model.path={place}", "adapter=run/stages/sft/model", "lengths=[16,24]"]
        assert evaluate([*adapter, *task, *canvas]) == 0
        entries = results_of(capsys.readouterr().out)["evaluations"]
        assert [entry["completion_length"] for entry in entries] == [16, 24]
        for key in ("n", "correct", "effective_tokens", "protocol_sha256"):
            assert entries[0][key] == results["evaluations"][1][key]
    assert set(asked) == {"somebody/llada"}

    # Merged and written in LLaDA's own layout, it is a model folder that can be evaluated in the place of the first.
    export(tmp_path / "run", tmp_path / "whole", layout="official")
    whole, base = load_network(str(tmp_path / "whole")), load_network(str(llada_folder))
    moved = {name for name, p in whole.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert {name.split(".")[-2] for name in moved} <= {"q_proj", "k_proj", "v_proj", "up_proj"}
    assert evaluate(["model=llada_8b", "model.path=whole", *task, *canvas]) == 0
    (entry,) = results_of(capsys.readouterr().out)["evaluations"]
    assert entry["n"] == 4


def test_a_reference_that_moves_beside_an_adapter(tmp_path, monkeypatch, capsys):
    """It is kept, synchronised and let go: the stage hands over its one adapter."""
    monkeypatch.chdir(tmp_path)
    lora = "stages.grpo.lora={targets:all_linear,rank:2,alpha:4,dropout:0.0}"
    moving = ["loss.beta=0.04", "stages.grpo.module.reference_sync_every=2", "stages.grpo.max_updates=5", lora]
    fast = ["recipe=grpo", "task=sudoku", "debug=fast", "report=false", "evaluation.base=false", "run_dir=run"]
    assert train([*SMALL, *fast, *moving]) == 0
    check_entry(results_of(capsys.readouterr().out)["evaluations"][-1])
    assert not [file for file in (tmp_path / "run" / "model").rglob("*") if "reference" in file.name]
    assert targets_of(tmp_path / "run" / "model")


def test_adapters_on_the_built_in_base_stay_with_it(tmp_path, monkeypatch, capsys):
    """Evaluated later, exported and consolidated, the run is what it was, though the cache of bases has been emptied."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    lora = "{targets:all_linear,rank:2,alpha:4,dropout:0.0}"
    words = ["recipe=d1", "task=sudoku", "debug=fast", "report=false", "evaluation.base=false", "run_dir=run"]
    # A base that has learned something, so that another one answers otherwise.
    words += [f"stages.sft.lora={lora}", f"stages.grpo.lora={lora}", "scale.sft.lr=0.01"]
    assert train([*SMALL, *words]) == 0
    (own,) = [entry for entry in results_of(capsys.readouterr().out)["evaluations"] if entry["stage"] == "grpo"]
    shutil.rmtree(tmp_path / "cache")

    run = open_run(tmp_path / "run")
    (base,) = [load_file(file) for file in (tmp_path / "run" / "stages" / "base" / "model").glob("*.safetensors")]
    name = next(name for name in base if name.endswith("embed_tokens.weight"))
    assert torch.equal(dict(run.policy.network.named_parameters())["model.embed_tokens.weight"].detach(), base[name])
    assert evaluate(["run=run", "output=again", "evaluation.rows=4"]) == 0
    assert len(answers(tmp_path / "again")) == own["n"]
    assert answers(tmp_path / "again") == answers(tmp_path / "run", f"{own['stage']}*")

    export(tmp_path / "run", tmp_path / "whole")
    consolidate(tmp_path / "run", tmp_path / "gathered")
    whole, gathered = (load_file(tmp_path / place / "model.safetensors") for place in ("whole", "gathered"))
    assert whole.keys() == gathered.keys()
    assert all(torch.equal(whole[key], gathered[key]) for key in whole)
    shutil.rmtree(tmp_path / "run" / "stages" / "base")
    assert evaluate(["run=run", "output=lost", "evaluation.rows=4"]) == 2
    assert "built-in base" in capsys.readouterr().err


def answers(folder: Path, pattern: str = "*") -> list[tuple[str, str]]:
    """Row and completion of an evaluation, in order."""
    (file,) = (folder / "evaluations").glob(f"{pattern}.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["id"], row["completion"]) for row in rows]


def targets_of(adapter: Path) -> set[str]:
    """Last names of the modules an adapter's folder was trained for."""
    return set(json.loads((adapter / "adapter_config.json").read_text())["target_modules"])
