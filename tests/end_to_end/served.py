"""The command line in a process that has imported everything once and forks a fresh run for each request.

A request is a line {"words": [...], "log": FILE}; the answers are the run's process id and, later, its exit status.
"""

from __future__ import annotations

import json
import os
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

    def start(self, words: Sequence[str], log: Path) -> int:
        """The process id of a run of `train.py`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"words": list(words), "log": str(log)}) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        return int(self._answer())

    def run(self, words: Sequence[str], log: Path) -> int:
        """From start to end."""
        self.start(words, log)
        return self.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _run(request: dict[str, Any]) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from d1lit.cli import train

        return train(request["words"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99


def _serve() -> None:
    import d1lit.running  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = _run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
