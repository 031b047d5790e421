"""Faults in numbers too large for the tests, on `train.py` itself, with a line of figures at the end.

python -m tests.faults kill --stage grpo --times 50 --in-saves 5
python -m tests.faults signal --stage grpo --times 20
python -m tests.faults mutants
python -m tests.faults soak --steps 20000
python -m tests.faults losses
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("sft", "grpo", "d1")


def kill(arguments: argparse.Namespace) -> None:
    """SIGKILL at random moments, some within a save."""
    _signals(arguments, [signal.SIGKILL], arguments.in_saves)


def ask(arguments: argparse.Namespace) -> None:
    """SIGTERM, SIGINT and SIGUSR1 at random moments."""
    _signals(arguments, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], 0)


def mutate(arguments: argparse.Namespace) -> None:
    """Every guard taken away once; the tests have to notice."""
    from tests.faults.mutants import MUTANTS, survivors

    sys.exit(1 if survivors(MUTANTS[arguments.first : arguments.last]) else 0)


def soak(arguments: argparse.Namespace) -> None:
    """Many steps in one process: memory, open files and children must not grow."""
    from tests.faults.soak import growth

    print(growth(arguments.steps).line())


def losses(arguments: argparse.Namespace) -> None:
    """Write down the losses of three recipes anew."""
    from tests.faults.losses import write

    write()


def _signals(arguments: argparse.Namespace, signums: list[signal.Signals], in_saves: int) -> None:
    from tests.end_to_end.served import Server
    from tests.faults.jobs import JOBS
    from tests.faults.killing import many

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
        command.add_argument("--stage", choices=STAGES, default="d1")
        command.add_argument("--times", type=int, default=times)
        command.add_argument("--seed", type=int, default=0)
        if name == "kill":
            command.add_argument("--in-saves", type=int, default=5, help="how many have to fall within a save")
    command = commands.add_parser("mutants", help=mutate.__doc__)
    command.set_defaults(act=mutate)
    command.add_argument("--first", type=int, default=0, help="number of the first one that is tried")
    command.add_argument("--last", type=int, default=None, help="number of the first one that is not")
    commands.add_parser("losses", help=losses.__doc__).set_defaults(act=losses)
    command = commands.add_parser("soak", help=soak.__doc__)
    command.set_defaults(act=soak)
    command.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
