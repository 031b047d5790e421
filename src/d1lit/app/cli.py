"""The command line: compose, check everything that can be checked without a model, then run.

Nothing heavy is imported at the top: `--help` has to answer at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d1lit.app.commands import COMMANDS
from d1lit.app.refusing import no_such_command, refused
from d1lit.security import redact, redact_text
from d1lit.stopping import StopFlag, requeued

if TYPE_CHECKING:
    from d1lit.app.composing import Jobs

ROOT = Path(__file__).resolve().parents[3]

TRAIN_HELP = """\
Train a masked diffusion language model: SFT, diffu-GRPO, or both.

  python train.py                                         the tiny built-in model on synthetic MATH problems
  python train.py recipe=d1 task=sudoku seed=1            another task, another seed
  python train.py recipe=d1 task=gsm8k model=llada_8b     the paper's run (GPUs)
  python train.py -m recipe=sft,grpo,d1 seed=1,2,3        a sweep: every combination
  python train.py run_dir=outputs/mine                    your own folder; run it again to resume

Any value of conf/ can be given as KEY=VALUE (stages.grpo.max_updates=20, loss.beta=0.04, sampler.temperature=0.9).

Choices of each group (GROUP=CHOICE):
{groups}

  --cfg job            print the composed configuration          --resolve            ... with interpolations resolved
  -m, --multirun       sweep over comma-separated values         --config-dir DIR     add a folder with your own YAMLs
  dry_run=true         print what would be done
"""

EVALUATE_HELP = """\
Evaluate a run, a model folder or a hub id with the sampler and graders of training.

  python evaluate.py run=outputs/RUN                          the final model of a run on its own task
  python evaluate.py run=outputs/RUN task=sudoku              ... on another task
  python evaluate.py model=llada_8b model.path=FOLDER task=gsm8k lengths=[128,256,512]
  python evaluate.py rescore=FILE task=gsm8k task.grader=d1   grade stored generations again

Choices of each group (GROUP=CHOICE):
{groups}
"""

_HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p", "--shell-completion", "-sc")
_MULTIRUN = ("-m", "--multirun")
_ITSELF = (sys.executable, "-P", "-c", "from d1lit.app.cli import main; main()")


def main() -> None:
    """The console script `d1lit`."""
    commands: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
        "train": (train, "train a model: SFT, diffu-GRPO, or both (train.py)"),
        "evaluate": (evaluate, "evaluate a run or a model (evaluate.py)"),
        **COMMANDS,
    }
    words = sys.argv[1:]
    if not words or words[0] not in commands:
        if words and words not in (["--help"], ["-h"], ["help"]):
            sys.exit(refused(no_such_command(words[0], list(commands))))
        lines = [f"  {name:<11} {text}" for name, (_, text) in commands.items()]
        print("\n".join(["usage: d1lit COMMAND ...", *lines, "d1lit COMMAND --help says more."]))
        sys.exit(0)
    sys.exit(commands[words[0]][0](words[1:]))


def train(words: Sequence[str]) -> int:
    """`train.py`: exit status 0, 2 for a configuration that cannot run, 1 for a run that failed."""
    if _asks_help(words):
        print(TRAIN_HELP.format(groups=_groups()))
        return 0
    from d1lit.app.composing import compose_jobs
    from d1lit.app.config_checks import check_places, check_values

    _see_user_code(words)
    try:
        if any(word.split("=")[0] in _HYDRA_FLAGS for word in words):
            compose_jobs("train", [word for word in words if "=" in word and not word.startswith("-")])
            return _hydra(words)
        with requeued(), StopFlag().preparing() as flag:  # SLURM may ask a job to stop that has hardly begun
            jobs = compose_jobs("train", words)
            for config in jobs.configs:
                check_values(config)  # before the heavy imports: most mistakes are answered at once
                check_places(config)
            from d1lit.app.build import plan_run, processes_to_start
            from d1lit.app.running import run_training
            from d1lit.processes import launch

            plan, checked = None, set()
            for config in jobs.configs:
                flag.raise_if_stopped()
                plan = plan_run(config, checked=checked)  # the jobs of a sweep make theirs again, each in its process
            flag.raise_if_stopped()
        if jobs.is_multirun:
            return _sweep(words, jobs)
        (config,) = jobs.configs
        if processes_to_start(config) > 1 and not config.dry_run:
            return launch([*_ITSELF, "train", *words], processes_to_start(config))
        return run_training(config, jobs.overrides[0], plan)
    except Exception as error:
        return refused(error)


def evaluate(words: Sequence[str]) -> int:
    """`evaluate.py`: exit status 0, 2 for a configuration that cannot run, 1 for a run that failed."""
    if _asks_help(words):
        print(EVALUATE_HELP.format(groups=_groups()))
        return 0
    from d1lit.app.composing import compose_jobs
    from d1lit.app.config_checks import check_values
    from d1lit.app.foreign import check_foreign, stored_words

    _see_user_code(words)
    try:
        run, words = _named_run(words)
        said_by_run = [] if run is None else stored_words(run, words)
        jobs = compose_jobs("evaluate", [*said_by_run, *words])
        for config in jobs.configs:
            check_values(config)
            if run is not None:
                check_foreign(config, words, _own_packages(words))
        from d1lit.app.build import processes_to_start
        from d1lit.app.evaluate_command import run_evaluation
        from d1lit.processes import launch

        if processes_to_start(jobs.configs[0]) > 1:
            return launch([*_ITSELF, "evaluate", *words], processes_to_start(jobs.configs[0]))
        for config in jobs.configs:
            run_evaluation(config)
    except Exception as error:
        return refused(error)
    return 0


def _named_run(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that `run=` names, and the words with its path quoted: a sweep's jobs have folders like `a=1,b=2`."""
    from d1lit.app.sweeps import quoted

    run, result = None, list(words)
    for place, word in enumerate(words):
        if word.startswith("run="):
            typed = word.removeprefix("run=")
            is_quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\""
            run = Path(typed[1:-1] if is_quoted else typed)
            result[place] = f"run={quoted(run)}"
    return run, result


def _sweep(words: Sequence[str], jobs: Jobs) -> int:
    """All jobs, then a table of how each ended; 1 if any failed."""
    from d1lit.app.sweeps import FOLDER, notes_of, quoted, show_sweep

    run_dir = jobs.configs[0].run_dir
    folder = Path(run_dir or Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-sweep-{os.getpid()}").resolve()
    os.environ[FOLDER] = str(folder)
    place = (
        f"hydra.sweep.dir={quoted(notes_of(folder, fresh=True))}"  # for what sweepers and launchers write themselves
    )
    # Hydra's parser takes overrides in one row only: flags stay before them, and the place is the first, so that one
    # that was said wins.
    others = [word for word in words if word not in _MULTIRUN]
    first = next((n for n, word in enumerate(others) if "=" in word and not word.startswith("-")), len(others))
    try:
        _hydra([_MULTIRUN[0], *others[:first], place, *others[first:]])
    except Exception as error:  # a launcher whose worker was killed; the table says what became of the jobs
        print(f"error: the sweep was cut short: {redact_text(' '.join(str(error).split()))[:300]}", file=sys.stderr)
    return show_sweep(folder, None if jobs.is_search else jobs.overrides)


def _hydra(words: Sequence[str]) -> int:
    """Hand over to Hydra itself, for sweeps and for printing configurations."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from d1lit.app.composing import with_choice

    sys.argv = [sys.argv[0], *map(with_choice, words)]

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
    def job(config) -> float | None:
        from d1lit.app.running import run_training
        from d1lit.app.sweeps import FOLDER, blank_secrets, notes_of, reached, run_job
        from d1lit.processes import place

        blank_secrets(notes_of(Path(os.environ[FOLDER])))
        said = list(HydraConfig.get().overrides.task)
        swept = HydraConfig.get().sweeper.get("params") or {}  # by an experiment: a sweep even over one value
        fixed = _fixed_keys(words) - set(swept)
        name = _job_name([word for word in said if word.split("=")[0] not in fixed])
        config.run_dir = str(Path(os.environ[FOLDER]) / name)  # a folder for each job of a sweep
        if place().world_size > 1:  # the launcher has started the processes of this job: it is one of them
            run_training(config, said)
        else:
            command = [*_ITSELF, "train", *_where_to_look(words), "hydra.mode=RUN"]
            run_job(command, HydraConfig.get().job.num, said, Path(config.run_dir))
        return reached(Path(config.run_dir))

    job()
    return 0


def _fixed_keys(words: Sequence[str]) -> set[str]:
    """Keys that have one value in every job of a sweep. (Hydra writes values its own way, `false` as `False`.)"""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    said = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    return {word.input_line.split("=")[0] for word in said if word.input_line and not word.is_sweep_override()}


def _job_name(varying: Sequence[str]) -> str:
    """A folder's name from what only this job of a sweep was told."""
    whole, name = (re.sub(r"[^\w=.,+-]+", "_", ",".join(words)) for words in (varying, redact(list(varying))))
    if name == whole and len(name) <= 150:
        return name or "default"
    return f"{name[:140]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"  # two secrets are two folders


def _where_to_look(words: Sequence[str]) -> list[str]:
    """The words that name folders with YAMLs of the user's own."""
    found = [word for word in words if word.startswith(("hydra.searchpath=", "--config-dir=", "-cd="))]
    for option, folder in itertools.pairwise(words):
        if option in ("--config-dir", "-cd"):
            found += [option, folder]
    return found


def _own_packages(words: Sequence[str]) -> list[str]:
    """Modules of the folders named here, as far as that is where Python finds them."""
    stems = [(file.stem, folder) for folder in _user_folders(words) for file in folder.iterdir()]
    return [
        stem for stem, folder in stems if stem.isidentifier() and not stem.startswith("_") and _comes_from(stem, folder)
    ]


def _comes_from(name: str, folder: Path) -> bool:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(Path(place).resolve().is_relative_to(folder) for place in places)


def _asks_help(words: Sequence[str]) -> bool:
    return any(word in ("--help", "-h") for word in words)


def _groups() -> str:
    lines = []
    for group in sorted(p for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "scale"):
        choices = ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
        if choices:
            lines.append(f"  {group.name:<14} {choices}")
    return "\n".join(lines)


def _see_user_code(words: Sequence[str]) -> None:
    """Let YAMLs in a folder of the user's name classes that stand beside them, or in the working folder."""
    # Last, so that they hide nothing that is installed: the working folder may be one that was downloaded.
    sys.path += [os.getcwd(), *map(str, _user_folders(words))]


def _user_folders(words: Sequence[str]) -> list[Path]:
    """The folders named by hydra.searchpath or --config-dir, where they are, and those they stand in."""
    named = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("hydra.searchpath="):
            named += word.split("=", 1)[1].strip("[]'\"").split(",")
        elif word.startswith("--config-dir=") or before in ("--config-dir", "-cd"):
            named.append(word.split("=", 1)[-1])
    folders = [Path(entry.strip().strip("'\"").removeprefix("file://")).resolve() for entry in named]
    return [place for folder in folders if folder.is_dir() for place in (folder.parent, folder)]
