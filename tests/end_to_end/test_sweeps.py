"""A sweep over two worker processes survives a killed job, and its table says which."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from d1lit.app.sweeps import FOLDER, notes_of, num_devices, own_devices, run_job, show_sweep, visible_devices

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}"


def test_table_names_the_killed_the_refused_and_the_missing(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "sweep"
    monkeypatch.setenv(FOLDER, str(folder))
    script = (
        "import sys, os, signal; print('error: seed: bad', file=sys.stderr) if 'seed=2' in sys.argv else None;"
        "os.kill(os.getpid(), signal.SIGKILL) if 'seed=1' in sys.argv else sys.exit(2 if 'seed=2' in sys.argv else 0)"
    )
    jobs = [["seed=0"], ["seed=1"], ["seed=2"], ["seed=3"]]
    ended = [run_job([sys.executable, "-c", script], n, jobs[n], folder / jobs[n][0]) for n in range(3)]
    assert ended == [0, -9, 2]
    assert show_sweep(folder, jobs) == 1
    shown = capfd.readouterr().err
    assert [row[1:3] for row in table_rows(shown)][1] == ["seed=1", "failed: killed by signal 9"]
    for words in (
        "seed=0",
        "well",
        "killed by signal 9",
        "exit status 2",
        "not run to its end",
        "seed=2 failed: seed: bad",
    ):
        assert words in shown


def table_rows(shown: str) -> list[list[str]]:
    """The cells of the closing table, each put together again from the lines it was folded into."""
    rows: list[list[str]] = []
    for line in shown[shown.rindex("sweep in ") :].splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            rows.append(cells)
        elif cells:
            rows[-1] = [f"{one} {more}".strip() for one, more in zip(rows[-1], cells, strict=True)]
    return rows


def test_devices_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    with own_devices(tmp_path) as first, own_devices(tmp_path) as second:
        assert [first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]] == ["3", "5"]
    with own_devices(tmp_path, num_devices(["seed=1", "trainer.devices=2"])) as again:
        assert again["CUDA_VISIBLE_DEVICES"] == "3,5"
    with own_devices(tmp_path, 3) as everything:
        assert everything["CUDA_VISIBLE_DEVICES"] == "3,5,7"


def test_devices_that_nobody_named_are_those_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with own_devices(tmp_path) as first, own_devices(tmp_path) as second:
        assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"GPU-aa", "GPU-bb"}
    monkeypatch.setenv("PATH", "")
    with own_devices(tmp_path) as environment:
        assert "CUDA_VISIBLE_DEVICES" not in environment
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == [], "none is to be seen"


def test_submitit_queues_a_job_again_after_it_has_saved(tmp_path, monkeypatch):
    """submitit's handler ends the job at once; here it comes when the child has saved and ended."""
    saved = tmp_path / "saved"
    script = (
        "import signal, sys, time, pathlib; stop = [];"
        "signal.signal(signal.SIGUSR1, lambda *_: stop.append(1)); pathlib.Path(sys.argv[1]).touch()\n"
        "while not stop: time.sleep(0.01)\n"
        "time.sleep(0.3); pathlib.Path(sys.argv[2]).touch(); sys.exit(138)"
    )
    monkeypatch.setenv(FOLDER, str(tmp_path / "sweep"))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    there: list[bool] = []

    def as_submitit_does(signum, frame):
        there.append(saved.exists())
        sys.exit(-1)

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, as_submitit_does)
    try:
        threading.Thread(target=send).start()
        command = [sys.executable, "-c", script, str(tmp_path / "ready"), str(saved)]
        with pytest.raises(SystemExit):
            run_job(command, 0, [], tmp_path / "run")
        assert signal.getsignal(signal.SIGUSR1) is as_submitit_does
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert there == [True]
    assert not list(notes_of(tmp_path / "sweep").glob("job-*.json")), "it has not ended"


@pytest.mark.slow
def test_the_experiment_of_the_readme_sweeps_by_itself(tmp_path):
    """Two of its recipes in small, without a flag; its own analysis reads what it leaves."""
    small = [SMALL, "debug=fast", "logger=none", "report=false"]
    small += ["evaluation.pass_at_k.rows=2", "evaluation.pass_at_k.num_samples=2", "evaluation.pass_at_k.ks=[1,2]"]
    words = ["experiment=recipes", "recipe=sft,grpo", "seed=3", *small]
    environment = {**os.environ, "D1LIT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "outputs" / "recipes")
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "outputs"}  # Hydra's own files are beside the jobs
    folders = {
        file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("outputs/recipes/*/results.json")
    }
    assert folders.keys() == {"recipe=sft,seed=3", "recipe=grpo,seed=3"}
    for name, results in folders.items():
        assert name == f"recipe={results['recipe']},seed={results['seed']}"
        assert {probe["probe"] for probe in results["probes"]} == {"forced", "pass_at_k"}


@pytest.mark.slow
def test_six_jobs_over_two_workers_survive_one_killed(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = tmp_path / "sweep"
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command += ["recipe=sft", "task=sudoku", "debug=fast", "report=false", "logger=none", f"run_dir={folder}"]
    command += ["seed=1,2,3,4,5,6", "scale.sft.max_updates=30", SMALL]
    sweep = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline, owner = time.monotonic() + 900, None
    while owner is None and time.monotonic() < deadline:
        owner = next(iter(folder.glob("*/.lock.owner")), None)
        time.sleep(0.05)
    assert owner is not None
    os.kill(json.loads(owner.read_text())["pid"], signal.SIGKILL)
    _, shown = sweep.communicate(timeout=1800)
    assert sweep.returncode == 1
    records = [json.loads(file.read_text()) for file in notes_of(folder).glob("job-*.json")]
    assert sorted(record["status"] for record in records) == [-9, 0, 0, 0, 0, 0]
    (killed,) = [record for record in records if record["status"] == -9]
    assert killed["run_dir"] == str(owner.parent)
    (row,) = (row for row in table_rows(shown) if row[2] == "failed: killed by signal 9")
    assert row[1].replace(" ", "") == "".join(killed["overrides"]), "long words are folded too"
    assert row[5].replace(" ", "") == str(owner.parent)
    assert len(list(folder.glob("*/results.json"))) == 5
