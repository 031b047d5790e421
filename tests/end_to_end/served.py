"""The command line in a process that has imported everything once and forks a fresh run for each request.

A request is a line {"words": [...], "log": FILE, ...}; the answers are the run's process id and, later, its exit status.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Server:
    """The side of the test: starts runs, kills them, and hears how they ended."""

    def __init__(self, cache: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "D1LIT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.served"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        assert self._answer() == "ready"

    def start(self, words: Sequence[str], log: Path, **faults: Any) -> int:
        """The process id of a run of `train.py`.

        Args:
            words: its command line.
            log: where its output is appended.
            faults: `prepared`: compose and check the command line once for all runs that differ in `run_dir` alone;
                `at`: a function (`module:name.name`), the number of a call, a signal that the process gets as that call
                begins; `max_file_bytes`: what no file may outgrow; `environment`: variables of this run alone.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"words": list(words), "log": str(log), **faults}) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        return int(self._answer())

    def run(self, words: Sequence[str], log: Path, **faults: Any) -> int:
        """From start to end."""
        self.start(words, log, **faults)
        return self.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _signal_at(dotted: str, visit: int, signum: int) -> None:
    """Send this process a signal as the n-th call of a function begins."""
    module, *names = dotted.split(":")[0], *dotted.split(":")[1].split(".")
    owner: Any = importlib.import_module(module)
    for name in names[:-1]:
        owner = getattr(owner, name)
    real, calls = getattr(owner, names[-1]), itertools.count(1)

    def calling(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == visit:
            os.kill(os.getpid(), signum)
        return real(*args, **kwargs)

    setattr(owner, names[-1], calling)


_PREPARED: dict[tuple[str, ...], tuple[Any, Any]] = {}


def _prepare(words: tuple[str, ...]) -> None:
    """What `train` does before a run begins."""
    if words not in _PREPARED:
        from d1lit.app.build import plan_run
        from d1lit.app.composing import compose_jobs

        (config,) = compose_jobs("train", words).configs
        _PREPARED[words] = (config, plan_run(config))


def _run_prepared(words: tuple[str, ...], run_dir: str) -> int:
    """And from there on."""
    from d1lit.app.running import run_training

    config, plan = _PREPARED[words]
    config.run_dir = plan.config.run_dir = run_dir
    return run_training(config, [*words, f"run_dir={run_dir}"], plan)


def _run(request: dict[str, Any]) -> int:
    os.environ |= request.get("environment", {})
    if "at" in request:
        _signal_at(*request["at"])
    if "max_file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], resource.RLIM_INFINITY))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from d1lit.app.cli import train

        if request.get("prepared"):
            return _run_prepared(*_split(request["words"]))
        return train(request["words"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99


def _split(words: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The words but for the run's folder, and that."""
    (run_dir,) = [word.removeprefix("run_dir=") for word in words if word.startswith("run_dir=")]
    return tuple(word for word in words if not word.startswith("run_dir=")), run_dir


def _serve() -> None:
    import d1lit.app.running  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("prepared"):
            _prepare(_split(request["words"])[0])
        child = os.fork()
        if child == 0:
            status = _run(request)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
