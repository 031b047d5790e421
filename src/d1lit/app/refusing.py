"""How a command answers what it cannot do: one line that names key, cause and cure, and an exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from d1lit.errors import ConfigError, RunError, from_system, out_of_memory
from d1lit.security import redact_text


class Parser(argparse.ArgumentParser):
    """One whose complaints are of the catalogue."""

    def error(self, message: str) -> NoReturn:
        """Say it in one line; exit status 2."""
        match = re.match(r"argument (\S+?)(?:/\S+)*: (.*)", message)
        key, cause, code = (match[1], match[2], "E110") if match else (self.prog.split()[-1], message, "E101")
        sys.exit(refused(ConfigError(key, cause, f"{self.prog} --help", code)))


def no_such_command(word: str, known: Sequence[str]) -> ConfigError:
    """For a first word that is no command."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return ConfigError(word, "no such command", f"d1lit {nearest[0] if nearest else '--help'}", "E101")


def refused(error: Exception) -> int:
    """Say what is wrong in one line; an error that is no user's keeps its traceback.

    Returns:
        Exit status: 2 for what was refused, 1 for what broke off.
    """
    from d1lit.app.config_errors import as_config_error, is_about_configuration

    rank = 0
    if {"RANK", "SLURM_PROCID"} & os.environ.keys():
        from d1lit.processes import place

        rank = place().rank
    if isinstance(error, ValueError) and is_about_configuration(error):
        if rank == 0:
            print(f"error: {redact_text(str(as_config_error(error)))}", file=sys.stderr)
        return 2
    said = error if isinstance(error, RunError) else out_of_memory(error)
    if isinstance(error, OSError):
        said = from_system(error)
    if said is None:
        raise error
    said = redact_text(str(said))
    print(f"error: {said}" if rank == 0 else f"error in process {rank}: {said}", file=sys.stderr)
    return 1


def guarded(act: Callable[[], int]) -> int:
    """What a user can cause is one line and an exit status."""
    try:
        return act()
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return refused(error)
