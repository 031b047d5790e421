"""Faults in numbers too large for the tests, on `train.py` itself, with a line of figures at the end.

python -m tests.faults kill --stage grpo --times 50 --in-saves 5
python -m tests.faults signal --stage grpo --times 20
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from pathlib import Path

from tests.end_to_end.served import Server
from tests.faults.jobs import JOBS
from tests.faults.killing import STOPPED, many


def kill(arguments: argparse.Namespace) -> None:
    """SIGKILL at random moments, some within a save."""
    _signals(arguments, [signal.SIGKILL], arguments.in_saves)


def ask(arguments: argparse.Namespace) -> None:
    """SIGTERM, SIGINT and SIGUSR1 at random moments."""
    _signals(arguments, list(STOPPED), 0)


def _signals(arguments: argparse.Namespace, signums: list[signal.Signals], in_saves: int) -> None:
    with tempfile.TemporaryDirectory(prefix="d1lit-faults-") as name:
        server = Server(Path(name) / "cache")
        for signum in signums:
            started, home = time.monotonic(), Path(name) / signum.name
            home.mkdir()
            job = JOBS[arguments.stage]
            tally = many(server, job, home, arguments.times, signum, arguments.seed, in_saves)
            seconds = time.monotonic() - started
            print(f"{arguments.stage}, {signum.name}: {tally.line()}; all ended bit-identical ({seconds:.0f} s)")
        server.close()


def main() -> None:
    """Choose a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="FAULT")
    for name, act, times in (("kill", kill, 50), ("signal", ask, 20)):
        command = commands.add_parser(name, help=act.__doc__)
        command.set_defaults(act=act)
        command.add_argument("--stage", choices=list(JOBS), default="d1")
        command.add_argument("--times", type=int, default=times)
        command.add_argument("--seed", type=int, default=0)
        if name == "kill":
            command.add_argument("--in-saves", type=int, default=5, help="how many have to fall within a save")
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
