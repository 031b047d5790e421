"""What a task's source of rows offers, and the few helpers all sources share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from d1lit.types import Example

Split = Literal["train", "val", "test"]
Manner = Literal["direct", "careless", "careful"]
Forbidden = Callable[[Example], bool]
"""True for an example that must not appear, because it (or its solution) belongs to another split."""

Purpose = Literal["corpus", "demonstrations"]

SHARES: Mapping[Purpose, Mapping[Manner, float]] = {
    "corpus": {"direct": 0.40, "careless": 0.35, "careful": 0.25},
    "demonstrations": {"careless": 0.55, "careful": 0.45},
}
"""Authors of the generated text for pretraining a tiny base and for its SFT: mostly careless, so RL can select."""
METHOD_CHARACTER: Mapping[Manner, str] = {"careless": "r", "careful": "x"}
"""First character of a built-in trace; an evaluation may force it to see what the model can do in each manner."""

_MAX_ATTEMPTS = 2000


class NoAnswer(ValueError):
    """A data row without its gold answer: left out of train and counted, refused in test."""


@runtime_checkable
class Source(Protocol):
    """Where a task's rows come from: made up by a pure function, or read from data and checked."""

    @property
    def synthetic(self) -> bool:
        """True where generated rows only stand in for a real data set."""
        ...

    @property
    def required(self) -> tuple[str, ...]:
        """Fields that every data row must have."""
        ...

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields that are taken where a data row has them."""
        ...

    def generate(self, split: Split, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """`count` distinct examples, each a pure function of (seed, split, index) and of what is forbidden."""
        ...

    def traces(self, purpose: Purpose, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """`count` generated examples with a `completion` and the `manner` of its author, drawn by SHARES."""
        ...

    def example(self, values: Mapping[str, Any], place: str) -> dict[str, Any] | None:
        """A data row as an example; None where the row is no instance of this task.

        Raises:
            NoAnswer: where only the gold answer is missing.
            ValueError: one line that begins with `place`.
        """
        ...

    def identity(self, example: Example) -> str:
        """What makes two examples the same problem."""
        ...

    def group(self, example: Example) -> str:
        """What train and validation never share; the identity, or something coarser (a Sudoku's solution)."""
        ...

    def worked(self, example: Example, short: bool) -> str | None:
        """The full assistant text of a correct worked answer to a data row; None where the row has none."""
        ...


def private_rng(*words: object) -> random.Random:
    """A generator of its own for what `words` name; the process-wide generators are never touched."""
    return random.Random("\x1f".join(map(str, words)))


def fingerprint(*words: object) -> str:
    """Twelve hexadecimal digits that depend on the words alone."""
    return hashlib.blake2b("\x1f".join(map(str, words)).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def write_traces(
    name: str,
    purpose: Purpose,
    count: int,
    seed: int,
    forbidden: Forbidden,
    make: Callable[[random.Random], dict[str, Any] | None],
    write: Callable[[Example, Manner], str],
) -> list[dict[str, Any]]:
    """`count` examples drawn by `make`, each completed by `write` in the manner of an author drawn by SHARES.

    Raises:
        ValueError: if all that `make` draws is forbidden.
    """
    shares = SHARES[purpose]
    rows = []
    for index in range(count):
        rng = private_rng(name, purpose, seed, index)
        manner = rng.choices(list(shares), weights=list(shares.values()))[0]
        example = draw_allowed(make, rng, forbidden)
        if example is None:
            raise ValueError(
                f"task.source: every {name} problem drawn for the {purpose} is in test or validation. "
                "Try: larger numbers in task.source, or a smaller task.num_builtin.test [E309]"
            )
        rows.append(example | {"manner": manner, "completion": write(example, manner)})
    return rows


def tagged(reasoning: str | None, answer: str, short: bool) -> str:
    """An assistant text with tags; without the reasoning part for None, without the newline where `short`."""
    closing = f"<answer>{answer}</answer>"
    if reasoning is None:
        return closing
    return f"<reasoning>{reasoning}</reasoning>{'' if short else chr(10)}{closing}"


def draw_allowed(
    make: Callable[[random.Random], dict[str, Any] | None], rng: random.Random, forbidden: Forbidden
) -> dict[str, Any] | None:
    """The first thing `make` draws that is not None and not forbidden; None after 2000 draws in vain."""
    for _ in range(_MAX_ATTEMPTS):
        example = make(rng)
        if example is not None and not forbidden(example):
            return example
    return None


def distinct(
    make: Callable[[random.Random], dict[str, Any] | None],
    words: tuple[str, Split, int],
    count: int,
    identity: Callable[[Example], str],
    forbidden: Forbidden,
) -> list[dict[str, Any]]:
    """`count` examples without repetition; the i-th is drawn from the generator named (words, i).

    Raises:
        ValueError: if there are not so many.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for index in range(count):
        example = draw_allowed(make, private_rng(*words, index), lambda e: identity(e) in seen or forbidden(e))
        if example is None:
            name, split, _ = words
            raise ValueError(
                f"task.num_builtin.{split}: {count} different {name} problems apart from the other splits were not "
                f"found, about {index} exist. Try: task.num_builtin.{split}={index // 2} [E309]"
            )
        seen.add(identity(example))
        rows.append(example)
    return rows


def required_text(values: Mapping[str, Any], field: str, place: str) -> str:
    """A non-empty text value, stripped.

    Raises:
        ValueError: naming the place and the field.
    """
    value = values.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{place}: {field} is {type(value).__name__}, not text. Try: quote it in the data [E304]")
    if not value.strip():
        kind = NoAnswer if field == "answer" else ValueError
        raise kind(f"{place}: {field} is empty. Try: fill it in or delete the row [E304]")
    return value.strip()
