"""Sweeps on other machines: presets compose, what docs/scaling.md says holds, and a search maximises accuracy."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra

from d1lit.app import cli
from d1lit.app.composing import CONF, compose_jobs
from d1lit.app.sweeps import FOLDER, notes_of, reached, show_sweep

PAGE = CONF.parent / "docs" / "scaling.md"


def hydra_of(*words: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(words), return_hydra_config=True).hydra


def test_slurm_preset_queues_again_and_leaves_time_to_save():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = hydra_of(
        "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1"
    ).launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.max_num_timeout > 0 and launcher.signal_delay_s >= 120
    assert launcher.additional_parameters.requeue is True
    assert (launcher.partition, launcher.gpus_per_node) == ("gpu", 1)
    slurm = pytest.importorskip("submitit.slurm.slurm")
    flags = slurm._make_sbatch_string(
        command="true", folder="logs", signal_delay_s=300, time=1440, additional_parameters={"requeue": True}
    )
    assert "#SBATCH --requeue\n" in flags and re.search(r"#SBATCH --signal=USR\d@300", flags)


def test_joblib_composes():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert hydra_of("hydra/launcher=joblib", "hydra.launcher.n_jobs=2").launcher.n_jobs == 2


def test_search_maximises_and_checks_one_candidate_of_every_range():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["hydra/sweeper=search", "hydra.sweeper.n_trials=4"]
    sweeper = hydra_of(*words).sweeper
    assert (str(sweeper.direction).split(".")[-1], sweeper.n_trials) == ("maximize", 4)
    tried = ["scale.grpo.lr=interval(1e-5,1e-3)", "scale.grpo.group_size=choice(4,8)", "seed=range(3,9)", "task=sudoku"]
    jobs = compose_jobs("train", ["-m", *words, *tried])
    assert jobs.is_search and jobs.is_multirun
    (config,) = jobs.configs
    assert (config.scale.grpo.lr, config.scale.grpo.group_size, config.seed) == (1e-5, 4, 3)


def test_what_a_search_sees_is_the_accuracy_of_the_last_evaluation(tmp_path, monkeypatch, capfd):
    assert reached(tmp_path) is None
    folder = tmp_path / "sweep"
    monkeypatch.setenv(FOLDER, str(folder))
    for number, accuracy in enumerate((0.25, 0.5)):
        run = folder / f"seed={number}"
        run.mkdir(parents=True)
        (run / "results.json").write_text(json.dumps({"evaluations": [{"accuracy": 0.0}, {"accuracy": accuracy}]}))
        record = {"overrides": [f"seed={number}"], "run_dir": str(run), "status": 0, "seconds": 1.0}
        (notes_of(folder) / f"job-{number}.json").write_text(json.dumps(record))
        assert reached(run) == accuracy
    assert show_sweep(folder, None) == 0
    assert "50.0" in capfd.readouterr().err


def page_commands() -> list[str]:
    """Every command of the page, those inside tables and scripts too."""
    text = PAGE.read_text(encoding="utf-8")
    found = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+# .*$", "", line) for line in found if "train.py" in line or line.startswith("d1lit")]


@pytest.mark.slow
@pytest.mark.parametrize("command", page_commands())
def test_every_command_of_the_page_composes(command):
    words = shlex.split(command)
    if words[0] == "d1lit":
        from d1lit.app.commands import COMMANDS

        assert words[1] in COMMANDS
        return
    start = next(n for n, word in enumerate(words) if word.endswith("train.py"))
    before = " ".join(words[:start])
    assert re.fullmatch(
        r"(\w+=\S+ )*(srun( --[\w-]+=\S+)* |torchrun( --[\w-]+=\S+)* |)(python)?",
        before + (" " if before.startswith("torchrun") else ""),
    ), before
    jobs = compose_jobs("train", words[start + 1 :])
    assert jobs.configs


def test_the_page_walks_through_each_way():
    commands = "\n".join(page_commands())
    for way in (
        "srun --kill-on-bad-exit=1 python train.py",
        "torchrun --nproc-per-node",
        "hydra/launcher=slurm",
        "hydra/launcher=joblib",
        "hydra/sweeper=search",
        "trainer.devices=8",
        "d1lit consolidate",
    ):
        assert way in commands, way


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "seed=1,2"),
        ("seed=1,2", "--multirun"),
        ("task=sudoku", "-m", "seed=1,2"),
        ("-m", "--config-dir", "mine", "seed=1,2"),
        ("experiment=recipes",),
    ],
)
def test_hydra_can_read_what_a_sweep_hands_to_it(words, tmp_path, monkeypatch):
    handed: list[str] = []
    monkeypatch.setattr(cli, "_hydra", handed.extend)
    monkeypatch.setenv(FOLDER, "")
    jobs = SimpleNamespace(configs=[SimpleNamespace(run_dir=str(tmp_path / "sweep"))], is_search=True)
    assert cli._sweep(words, jobs) == 0
    read = get_args_parser().parse_args(handed)
    assert read.multirun
    place, *rest = read.overrides
    assert place.startswith("hydra.sweep.dir=")
    assert rest == [word for word in words if "=" in word]


@pytest.mark.nightly
def test_a_search_of_three_trials_runs(tmp_path):
    import subprocess
    import sys

    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    root = CONF.parent
    words = ["-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=3", "scale.sft.lr=interval(1e-4,1e-3)", "recipe=sft"]
    words += ["task=sudoku", "debug=fast", "report=false", "logger=none", f"run_dir={tmp_path / 'search'}"]
    done = subprocess.run(
        [sys.executable, str(root / "train.py"), *words], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(file.read_text()) for file in notes_of(tmp_path / "search").glob("job-*.json")]
    assert [record["status"] for record in records] == [0, 0, 0]
    rates = {word for record in records for word in record["overrides"] if word.startswith("scale.sft.lr=")}
    assert len(rates) == 3
    assert len({Path(record["run_dir"]) for record in records}) == 3
