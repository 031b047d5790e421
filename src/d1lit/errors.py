"""Every kind of mistake that a user can make: its code, what is behind it, and what to do about it.

A refusal is one line, `error: KEY: CAUSE. Try: CURE [CODE]`. Key, cause and cure speak of the case at hand; the code
leads to its entry in the catalogue, which is the page docs/errors.md and is read from there (`d1lit explain CODE`).
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
REFUSED = "E202"
"""The code of a component's ValueError that brings none: it refuses a value of its own."""


class ConfigError(ValueError):
    """What cannot run as it was asked for: `<key>: <cause>. Try: <cure> [<code>]`, on one line."""

    def __init__(self, key: str, cause: str, cure: str, code: str = REFUSED) -> None:
        self.key, self.cause, self.cure, self.code = key, cause, cure, code
        super().__init__(line(key, cause, cure, code))

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        """The first process sends its refusals to the others."""
        return type(self), (self.key, self.cause, self.cure, self.code)


class RunError(RuntimeError):
    """What ended a run that had begun; the same line as a `ConfigError`."""

    def __init__(self, key: str, cause: str, cure: str, code: str) -> None:
        self.key, self.cause, self.cure, self.code = key, cause, cure, code
        super().__init__(line(key, cause, cure, code))

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        """Errors of a run cross processes too."""
        return type(self), (self.key, self.cause, self.cure, self.code)


def line(key: str, cause: str, cure: str, code: str) -> str:
    """The one line."""
    return f"{key}: {cause}. Try: {cure} [{code}]"


def split_code(text: str) -> tuple[str, str | None]:
    """A message without the code at its end, and the code."""
    match = re.fullmatch(r"(.*?)\s*\[(E\d{3})\]\.?", text, re.DOTALL)
    return (match[1], match[2]) if match else (text, None)


def from_system(error: OSError) -> RunError | None:
    """What the operating system refused for a reason that the user can mend; None for any other error."""
    place = str(error.filename or "disk")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(place, _plain(error), "free some space, or run_dir=PATH on another disk", "E506")
    if error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EEXIST,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    ):
        return RunError(place, _plain(error), "a place that can be read and written", "E501")
    return None


def _plain(error: OSError) -> str:
    return " ".join((error.strerror or type(error).__name__).split()).rstrip(".")


def out_of_memory(error: BaseException) -> RunError | None:
    """The error of a machine whose memory was not enough; None for any other."""
    text = str(error)
    on_device = type(error).__name__ == "OutOfMemoryError"
    if not (on_device or isinstance(error, MemoryError) or "can't allocate memory" in text):
        return None
    asked = re.search(r"allocate ([\d.]+ \w+)", text)
    cause = f"the {'device' if on_device else 'machine'} has no memory left{f' for {asked[1]}' if asked else ''}"
    return RunError("memory", cause, "a smaller micro_batch_size, or dry_run=true for what the run needs", "E602")


# ----------------------------------------------------------------------------------------------------------- catalogue


@dataclass(frozen=True)
class Kind:
    """One kind of mistake, as docs/errors.md has it."""

    code: str
    title: str
    cause: str
    cure: str

    @property
    def anchor(self) -> str:
        """Where the page speaks of it."""
        return f"docs/errors.md#{self.code.lower()}"


@cache
def catalogue() -> dict[str, Kind]:
    """Every kind by its code, read from the page."""
    found = {}
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        words = " ".join(section.split(chr(10) + "## ")[0].split())
        match = re.fullmatch(r"(E\d{3}) \*\*(.+?)\.\*\* (.+) Cure: (.+)", words)
        assert match is not None, words
        assert match[1] not in found, match[1]
        found[match[1]] = Kind(*match.groups())
    return found


def explained(code: str) -> str:
    """An entry as text.

    Raises:
        ConfigError: for a code that is not in the catalogue.
    """
    kinds = catalogue()
    kind = kinds.get(code.upper())
    if kind is None:
        raise ConfigError(
            "explain", f"no code {code!r}", f"one of {min(kinds)} to {max(kinds)} (docs/errors.md)", "E110"
        )
    return f"{kind.code}: {kind.title}\n  Why: {kind.cause}\n  Try: {kind.cure}\n  {kind.anchor}"
