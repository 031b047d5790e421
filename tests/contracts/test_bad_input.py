"""Configurations that cannot run: one line that names key, cause and cure, status 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from d1lit.app import running
from d1lit.app.cli import evaluate, train
from d1lit.app.composing import compose_jobs
from d1lit.checkpoint import lock_run
from d1lit.errors import ConfigError, catalogue
from d1lit.tasks import reading
from tests.test_checkpoint import HOLD
from tests.test_tasks_reading import CORRUPT

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"error: (?P<key>\S+): (?P<cause>.+)\. Try: (?P<cure>.+) \[(?P<code>E\d{3})\]")

# What is typed, the key that the answer names, and a word of cause or cure.
CASES: dict[str, tuple[str, str, str]] = {
    # unknown keys and choices
    "unknown key": ("nonsense=1", "nonsense", "no such key"),
    "misspelt key": ("sed=1", "sed", "seed"),
    "misspelt nested key": ("stages.grpo.module.group_siz=4", "stages.grpo.module.group_siz", "group_size"),
    "misspelt component key": ("sampler.temprature=1.0", "sampler.temprature", "sampler.temperature"),
    "unknown choice": ("estimator=one_stepp", "estimator", "one_step"),
    "unknown choice, nothing near": ("loss=xyzzy", "loss", "clipped"),
    "unknown task": ("task=gsm8", "task", "gsm8k"),
    "unknown recipe": ("recipe=sfft", "recipe", "sft"),
    "misspelt group": ("estimater=one_step", "estimater", "estimator"),
    "no value": ("seed", "seed", "KEY=VALUE"),
    "unknown option": ("--multirum", "--multirum", "--multirun"),
    "unknown argument of a component": ("+loss.epsilonn=0.2", "loss.epsilonn", "epsilon_low"),
    "unknown argument of the module": ("+stages.grpo.module.group=4", "stages.grpo.module.group", "group_size"),
    "unknown flag of the Trainer": ("+trainer.profilers=simple", "trainer.profilers", "profiler"),
    "a flag that the stage decides": ("+trainer.max_steps=3", "trainer.max_steps", "max_updates"),
    # names from other projects
    "num_generations": ("num_generations=6", "num_generations", "stages.grpo.module.group_size"),
    "num_iterations": ("num_iterations=12", "num_iterations", "stages.grpo.module.num_inner_updates"),
    "max_completion_length": ("max_completion_length=256", "max_completion_length", "sampler.completion_length"),
    "gen_length": ("gen_length=256", "gen_length", "sampler.completion_length"),
    "diffusion_steps": ("diffusion_steps=128", "diffusion_steps", "sampler.num_steps"),
    "p_mask_prompt": ("p_mask_prompt=0.15", "p_mask_prompt", "estimator.prompt_mask_prob"),
    "sync_ref_model": ("sync_ref_model=true", "sync_ref_model", "reference_sync_every"),
    "scale_rewards": ("scale_rewards=false", "scale_rewards", "advantage"),
    "loss_type": ("loss_type=grpo", "loss_type", "loss"),
    "learning_rate": ("learning_rate=1e-5", "learning_rate", "optimizer.lr"),
    "num_generations, nested": ("stages.grpo.num_generations=6", "stages.grpo.num_generations", "group_size"),
    # wrong types
    "text for a number": ("sampler.temperature=warm", "sampler.temperature", "a number"),
    "fraction for a whole number": ("stages.grpo.max_updates=2.5", "stages.grpo.max_updates", "a whole number"),
    "list for a number": ("sampler.num_steps=[1,2]", "sampler.num_steps", "a whole number"),
    "number for a truth": ("evaluation.base=1", "evaluation.base", "true"),
    "text for a truth": ("paper_compat=perhaps", "paper_compat", "one of false, true"),
    "text where null stood": ("evaluation.rows=many", "evaluation.rows", "whole number"),
    "number for a list": ("evaluation.lengths=64", "evaluation.lengths", "list"),
    "text for a block": ("stages.grpo.optimizer=muon", "stages.grpo.optimizer", "optimizer@stages.grpo.optimizer=CHOICE"),
    "text for the seed": ("seed=one", "seed", "whole number"),
    # impossible values
    "temperature below 0": ("sampler.temperature=-0.5", "sampler.temperature", "below 0"),
    "epsilon below 0": ("loss.epsilon_low=-0.1", "loss.epsilon_low", "[0, 1)"),
    "beta below 0": ("loss.beta=-1.0", "loss.beta", ">= 0"),
    "block length not dividing": ("sampler.block_length=7", "sampler.block_length", "divi"),
    "no steps": ("sampler.num_steps=0", "sampler.num_steps", "at least 1"),
    "group of one": ("stages.grpo.module.group_size=1", "stages.grpo.module.group_size", "2 or more"),
    "no inner updates": ("stages.grpo.module.num_inner_updates=0", "stages.grpo.module.num_inner_updates", "1 or more"),
    "reference synced every 0 updates": ("loss.beta=0.04 stages.grpo.module.reference_sync_every=0", "stages.grpo.module.reference_sync_every", "1 or more"),
    "no reference that could be synced": ("stages.grpo.module.reference_sync_every=64", "stages.grpo.module.reference_sync_every", "loss.beta"),
    "reference moved too far": ("loss.beta=0.04 stages.grpo.module.reference_sync_every=1 +stages.grpo.module.reference_sync_weight=2.0", "stages.grpo.module.reference_sync_weight", "[0, 1]"),
    "chunks of no view": ("stages.grpo.module.views_per_chunk=0", "stages.grpo.module.views_per_chunk", "null"),
    "batch not divisible": ("stages.grpo.batch_size=6 stages.grpo.micro_batch_size=4", "stages.grpo.batch_size", "multiple"),
    "learning rate below 0": ("stages.grpo.optimizer.lr=-1e-4", "stages.grpo.optimizer.lr", "0 or more"),
    "beta of Adam at 2": ("stages.grpo.optimizer.betas=[0.9,2.0]", "stages.grpo.optimizer", "beta"),
    "mask probability of 2": ("estimator.prompt_mask_prob=2.0", "estimator.prompt_mask_prob", "[0, 1]"),
    "no updates": ("stages.sft.max_updates=0", "stages.sft.max_updates", "1 or more"),
    "no row to evaluate": ("evaluation.rows=0", "evaluation.rows", "1 or more"),
    "length no multiple of the block": ("evaluation.lengths=[30]", "evaluation.lengths", "block length"),
    "prompts longer than allowed": ("task.max_test_prompt_length=3 task.max_prompt_length=3", "task.max_test_prompt_length", "18"),
    "split that is not there": ("evaluation.split=dev", "evaluation.split", "val"),
    "no validation rows": ("evaluation.split=val task.val_rows=0", "evaluation.split", "val_rows"),
    "best weights on no validation rows": ("recipe=sft stages.sft.select=best_val task.val_rows=0", "stages.sft.select", "val_rows"),
    "best weights without a look": ("recipe=sft stages.sft.select=best_val stages.sft.validate_every=null", "stages.sft.select", "validate_every"),
    "grader that is not there": ("task.grader=lenient", "task.grader", "strict"),
    "resume by another word": ("resume=always", "resume", "auto"),
    "dtype that is not there": ("model.dtype=float8", "model.dtype", "float32"),
    "precision that is not there": ("trainer.precision=fp16", "trainer.precision", "16-mixed"),
    "no device": ("trainer.devices=0", "trainer.devices", "trainer.devices=1"),
    "checkpoints every 0 steps": ("callbacks.save.every_n_steps=0", "callbacks.save.every_n_steps", "null"),
    "alarm without a bound": ("callbacks.alarms.alarms=[{_target_:d1lit.callbacks.Alarm,metric:train/kl}]", "callbacks.alarms.alarms", "bound"),
    "negative warm-up": ("stages.sft.lr_schedule.warmup_updates=-1", "stages.sft.lr_schedule.warmup_updates", "0 or more"),
    "lora that fits nothing": ("stages.grpo.lora={targets:paper,rank:0,alpha:1,dropout:0.0}", "stages.grpo.lora.rank", "1"),
    "lora on a matrix that is not there": ("stages.grpo.lora={targets:[w_proj],rank:2,alpha:4,dropout:0.0}", "stages.grpo.lora.targets", "q_proj"),
    "stage that is not there": ("recipe.stages=[sft,dpo]", "recipe.stages", "dpo"),
    # impossible pairs
    "sequence bound under a token clip": ("estimator=espo loss=clipped", "loss", "allow_unsound_pair"),
    "steps under a sequence loss": ("estimator=one_step loss=dmpo", "loss", "refused"),
    "StableDRL without its bound": ("estimator=elbo loss=stable_drl", "loss", "spg"),
    "complements without a mirror": ("recipe=sft schedule=cosine stages.sft.module.complementary=true", "stages.sft.module.complementary", "schedule=linear"),
    "preferences between many": ("loss=dpo stages.grpo.module.group_size=4", "stages.grpo.module.group_size", "takes 2"),
    "reward without a weight": ("~reward.weights.solved", "reward.weights", "solved"),
    # missing things
    "missing data file": ("task.train_data=/nowhere/rows.jsonl", "task.train_data", "/nowhere/rows.jsonl"),
    "missing prompt file": ("task.prompt=/nowhere/prompt.txt", "task.prompt", "/nowhere/prompt.txt"),
    "missing model folder": ("model.path=/nowhere/model", "model.path", "/nowhere/model"),
    "unreachable hub, model": ("model.path=nobody/nothing", "model.path", "nobody/nothing"),
    "unreachable hub, data": ("task.train_data=nobody/nothing", "task.train_data", "nobody/nothing"),
    "missing value": ("stages.grpo.optimizer.lr=???", "stages.grpo.optimizer.lr", "has no value"),
    "folder of YAMLs that is not there": ("--config-dir=/nowhere", "--config-dir", "/nowhere"),
    # _target_ and interpolation
    "target that is not there": ("loss._target_=d1lit.losses.clipped.ClipedPolicyLoss", "loss._target_", "ClippedPolicyLoss"),
    "target in no module": ("loss._target_=nowhere.Loss", "loss._target_", "nowhere"),
    "target of another kind": ("estimator=unigrpo estimator._target_=d1lit.schedules.LinearSchedule", "estimator._target_", "LogProbEstimator"),
    "schedule for an estimator": ("stages.grpo.module.estimator={_target_:d1lit.schedules.LinearSchedule}", "stages.grpo.module.estimator._target_", "LogProbEstimator"),
    "mask of another kind": ("stages.sft.module.mask={_target_:d1lit.schedules.LinearSchedule}", "stages.sft.module.mask._target_", "MaskRule"),
    "callback of another kind": ("+callbacks.mine={_target_:d1lit.schedules.LinearSchedule}", "callbacks.mine._target_", "Callback"),
    "logger of another kind": ("~logger.default_hp_metric logger._target_=d1lit.modules.optimizing.constant", "logger._target_", "Logger"),
    "optimizer of another kind": ("stages.grpo.optimizer._target_=torch.nn.Linear", "stages.grpo.optimizer.lr", "argument"),
    "cyclic interpolation": ("sampler.num_steps=${sampler.block_length} sampler.block_length=${sampler.num_steps}", "sampler", "num_steps"),
    "interpolation into nothing": ("sampler.num_steps=${nowhere.to.be.found}", "sampler.num_steps", "nowhere"),
    "unbalanced brackets": ("evaluation.lengths=[1,2", "evaluation.lengths", "quotes"),
    "several values without a sweep": ("seed=1,2", "seed", "-m"),
    "bad job of a sweep": ("-m seed=0,1 sampler.temperature=1.0,-1.0", "sampler.temperature", "below 0"),
    "bad key beside --cfg": ("--cfg job num_generations=3", "num_generations", "group_size"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_hub(tmp_path_factory):
    """No network, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("D1LIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        with contextlib.suppress(ImportError):
            import datasets.config
            import huggingface_hub.constants

            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def refusal(capsys, command, words: list[str]) -> re.Match[str]:
    """The one line of an error; status 2, no traceback."""
    assert command(words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if line.startswith("error:")]
    assert len(lines) == 1, out + err
    assert "Traceback" not in out + err
    assert err.rstrip().splitlines()[-1] == lines[0]
    match = LINE.fullmatch(lines[0])
    assert match is not None, lines[0]
    assert match["code"] in catalogue()
    return match


def words_of(typed: str) -> list[str]:
    return [word for word in typed.split(" ") if word]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if i % 3 else ()) for i, n in enumerate(CASES)]
)
def test_refused_in_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed, key, word = CASES[name]
    match = refusal(capsys, train, ["task=sudoku", "debug=fast", *words_of(typed)])
    print(match[0])
    assert match["key"] == key or (key == "sampler" and match["key"].startswith("sampler."))
    assert word in match["cause"] + " " + match["cure"]
    assert not list(tmp_path.iterdir())


EXPERIMENTS: dict[str, tuple[str, set[str], set[int]]] = {
    "by itself": ("experiment=recipes", {"sft", "grpo", "d1", "grpo_shuffled", "sft_more"}, {11, 12, 13, 14}),
    "over seeds of the user's": ("experiment=recipes recipe=d1 seed=1,2", {"d1"}, {1, 2}),
    "with the flag": ("-m experiment=recipes recipe=d1,sft seed=3", {"d1", "sft"}, {3}),
    "a single run of it": ("experiment=recipes recipe=d1 seed=5", {"d1"}, {5}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "by itself" else ()) for n in EXPERIMENTS]
)
def test_an_experiment_sweeps_by_itself(name):
    """What is typed takes the place of its values, and no flag is needed."""
    typed, recipes, seeds = EXPERIMENTS[name]
    jobs = compose_jobs("train", words_of(typed))
    assert jobs.is_multirun
    found = [(config.recipe.name, config.seed) for config in jobs.configs]
    assert len(found) == len(recipes) * len(seeds)
    assert set(found) == {(recipe, seed) for recipe in recipes for seed in seeds}


# ---------------------------------------------------------------------------------------------------------- data files

ROW = '{"puzzle": "0130000110030214", "solution": "4132234114233214"}'
FILES = {
    "empty": ("", "is empty"),
    "no JSON": (f"{ROW}\nnot json\n", "rows.jsonl:2"),
    "no object": (f"{ROW}\n[1, 2]\n", "rows.jsonl:2"),
    "missing column": (f'{ROW}\n{{"puzzle": "0130000110030214"}}\n', "rows.jsonl:2"),
    "not a puzzle": (f'{ROW}\n{{"puzzle": "abc", "solution": "def"}}\n', "rows.jsonl:2"),
    "blank lines only": ("\n\n", "no rows"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("key", ["task.train_data", "task.test_data"])
def test_bad_data_is_refused_by_file_and_line(name, key, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, cause = FILES[name]
    (tmp_path / "rows.jsonl").write_text(text)
    match = refusal(capsys, train, ["task=sudoku", "debug=fast", f"{key}=rows.jsonl"])
    assert match["key"] == key
    assert cause in match["cause"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.nightly if n % 12 else pytest.mark.slow) for n, c in enumerate(CORRUPT)],
)
def test_every_corrupt_file_is_refused_by_the_command(case, capsys, tmp_path, monkeypatch):
    """The files of tests/test_tasks_reading.py as a user meets them: status 2, one line, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 65_536)
    task, file, content, line, cause = CORRUPT[case]
    (tmp_path / file).write_bytes(content)
    columns = [] if case != "same_id_twice" else ["+task.columns.id=id"]
    renamed = {"countdown": ["task.columns.numbers=numbers", "task.columns.target=target"],
               "math500": ["task.columns.question=question"]}.get(task, [])  # fmt: skip
    match = refusal(capsys, train, [f"task={task}", "debug=fast", f"task.test_data={file}", *columns, *renamed])
    assert match["key"] == "task.test_data"
    assert cause in match["cause"] + " " + match["cure"]
    assert file + (f":{line}" if line else "") in match["cause"]
    assert [left.name for left in tmp_path.iterdir()] == [file]


# -------------------------------------------------------------------------------------------------------- run folders

FAST = ["task=sudoku", "debug=fast"]


def stored_run(folder: Path, *words: str) -> Path:
    """The folder of a run that was started with these words, as far as the next start looks at it."""
    (config,) = compose_jobs("train", [*FAST, *words]).configs
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    (folder / "overrides.json").write_text(json.dumps([*FAST, *words]))
    return folder


@pytest.mark.slow
def test_run_dir_is_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    for place in ("taken", "taken/below"):
        match = refusal(capsys, train, [*FAST, f"run_dir={tmp_path}/{place}"])
        assert match["key"] == "run_dir"
        assert str(tmp_path) in match["cause"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write, not even root")
def test_run_dir_is_not_writable(capsys):
    match = refusal(capsys, train, [*FAST, "run_dir=/proc/self/run"])
    assert match["key"] == "run_dir"
    assert "/proc/self/run" in match["cause"]


@pytest.mark.slow
def test_resume_never_on_an_existing_run(capsys, tmp_path):
    folder = stored_run(tmp_path / "run")
    match = refusal(capsys, train, [*FAST, f"run_dir={folder}", "resume=never"])
    assert match["key"] == "run_dir"
    assert "holds a run already" in match["cause"]


@pytest.mark.slow
def test_a_changed_configuration_is_refused_and_its_keys_listed(capsys, tmp_path):
    folder = stored_run(tmp_path / "run")
    before = sorted(file.name for file in folder.iterdir())
    match = refusal(capsys, train, [*FAST, f"run_dir={folder}", "seed=7", "stages.grpo.optimizer.lr=0.5"])
    assert match["key"] == "resume"
    assert "seed: 0 -> 7" in match["cause"]
    assert "stages.grpo.optimizer.lr: 0.0001 -> 0.5" in match["cause"]
    assert "resume=force" in match["cure"]
    assert sorted(file.name for file in folder.iterdir() if not file.name.startswith(".lock")) == before


@pytest.mark.slow
def test_what_may_change_and_what_force_does(tmp_path):
    def refuse(folder: Path, *words: str) -> bool:
        (config,) = compose_jobs("train", [*FAST, *words]).configs
        return running.refuse_changes(config, folder)

    folder = stored_run(tmp_path / "run")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    may = ("evaluation.temperature=0.5", "logger=csv", "callbacks.save.every_n_steps=3", "run_dir=elsewhere")
    assert not refuse(folder, *may)
    with pytest.raises(ConfigError, match=r"sampler\.num_steps: 10 -> 20"):
        refuse(folder, "sampler.num_steps=20")
    assert refuse(folder, "sampler.num_steps=20", "resume=force")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before, "only once the inputs have passed"


@pytest.mark.slow
def test_a_folder_in_use_names_its_user(capsys, tmp_path):
    folder = stored_run(tmp_path / "run")
    with lock_run(folder):
        match = refusal(capsys, train, [*FAST, f"run_dir={folder}"])
    assert match["key"] == "run_dir"
    assert f"process {os.getpid()}" in match["cause"]


def test_of_two_runs_started_at_once_the_refused_one_leaves_the_other_its_folder(capsys, tmp_path, monkeypatch):
    """Both found no run there; the other has the lock first, and what it has written stays."""
    folder, real, others = tmp_path / "run", running.lock_run, []

    def too_late(place: Path) -> contextlib.AbstractContextManager[None]:
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        others.append(other)
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        (folder / "config.yaml").write_text("seed: 3")
        return real(place)

    monkeypatch.setattr(running, "lock_run", too_late)
    match = refusal(capsys, train, [*FAST, f"run_dir={folder}"])
    assert f"in use by process {others[0].pid}" in match["cause"]
    assert (folder / "config.yaml").read_text() == "seed: 3"
    others[0].communicate()
    assert others[0].returncode == 0


# ----------------------------------------------------------------------------------------------------------- evaluate


EVALUATIONS: dict[str, tuple[str, str, str]] = {
    "no such run": ("run=nowhere", "run", "nowhere"),
    "no weights": ("task=sudoku", "model.path", "run=FOLDER"),
    "no such file": ("rescore=nowhere.jsonl task=sudoku", "rescore", "nowhere.jsonl"),
    "no JSON": ("rescore=bad.jsonl task=sudoku", "rescore", "bad.jsonl:2"),
    "no rows": ("rescore=empty.jsonl task=sudoku", "rescore", "empty"),
    "no object": ("rescore=list.jsonl task=sudoku", "rescore", "list.jsonl:1"),
    "rows of another task": ("rescore=other.jsonl task=sudoku", "rescore", "not those of sudoku"),
    "length no multiple of the block": ("task=sudoku lengths=[30]", "evaluation.lengths", "block"),
    "lengths no list": ("task=sudoku lengths=64", "evaluation.lengths", "list"),
    "seeds no list": ("task=sudoku seeds=3", "seeds", "list"),
    "unknown key": ("rum=outputs/x", "rum", "run"),
    "hub that cannot be reached": ("task=sudoku model.path=nobody/nothing", "model.path", "nobody/nothing"),
    "run with strange words": ("run=strange", "run", "overrides.json"),
    "run with a foreign component": ("run=hostile", "callbacks.mine._target_", "comes from elsewhere"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if i % 2 else ()) for i, n in enumerate(EVALUATIONS)]
)
def test_evaluation_refused_in_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(
        json.dumps({"completion": "x", "example": {"puzzle": "0", "solution": "1"}}) + "\nno"
    )
    (tmp_path / "other.jsonl").write_text(json.dumps({"completion": "x", "example": {"numbers": [1, 2], "target": 3}}))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.jsonl").write_text("[]\n")
    for run, words in (
        ("strange", {"not": "words"}),
        ("hostile", ["task=sudoku", "+callbacks.mine={_target_:os.getcwd}"]),
    ):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text("")
        (tmp_path / run / "overrides.json").write_text(json.dumps(words) if run == "hostile" else "{")
    before = sorted(tmp_path.rglob("*"))
    typed, key, word = EVALUATIONS[name]
    match = refusal(capsys, evaluate, words_of(typed))
    assert match["key"] == key
    assert word in match["cause"] + " " + match["cure"]
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------ real processes


@pytest.mark.parametrize(
    ("program", "words", "key"),
    [
        ("train.py", ["nonsense=1"], "nonsense"),
        ("train.py", ["stages.grpo.optimizer.lr=-1"], "stages.grpo.optimizer.lr"),
        ("evaluate.py", ["run=nowhere"], "run"),
    ],
)
def test_as_a_command(program, words, key, tmp_path):
    """Status 2, one line on the error stream, nothing on the other; and no folder."""
    done = subprocess.run(
        [sys.executable, ROOT / program, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    match = LINE.fullmatch(line)
    assert match is not None
    assert match["key"] == key
    assert not list(tmp_path.iterdir())
