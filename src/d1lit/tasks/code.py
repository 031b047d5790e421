"""Programs to write, in the form of HumanEval (arXiv 2107.03374) or MBPP (arXiv 2108.07732), and a few of our own.

A row becomes `question` (what the model reads), `prompt` (code put before its program; empty where the question is
prose), `setup`, `tests`, `entry_point`, and as `answer` the reference program where the data has one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d1lit.tasks.code_problems import PROBLEMS
from d1lit.tasks.source import (
    METHOD_CHARACTER,
    Forbidden,
    Manner,
    Purpose,
    Split,
    distinct,
    required_text,
    tagged,
    write_traces,
)
from d1lit.types import Example

_DEFINITION = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
_INDENT = "    "

EXERCISES: tuple[tuple[str, str, Callable[[int, int], Any]], ...] = (
    ("x plus {c}", "x+{c}", lambda x, c: x + c),
    ("x minus {c}", "x-{c}", lambda x, c: x - c),
    ("x times {c}", "x*{c}", lambda x, c: x * c),
    ("{c} minus x", "{c}-x", lambda x, c: c - x),
    ("the larger of x and {c}", "max(x,{c})", max),
    ("the smaller of x and {c}", "min(x,{c})", min),
    ("the square of x plus {c}", "x*x+{c}", lambda x, c: x * x + c),
    ("x modulo {c}", "x%{c}", lambda x, c: x % c),
    ("whether x is above {c}", "x>{c}", lambda x, c: x > c),
    ("whether {c} divides x", "x%{c}==0", lambda x, c: x % c == 0),
)
"""Words, expression and value of the generated one-line exercises."""


@dataclass(frozen=True)
class CodeSource:
    """Functions to write. Builtin test rows are sixteen hand-written problems first, then generated one-liners.

    Args:
        max_number: generated exercises use whole numbers from 2 to this.
        shown_tests: how many tests of a row stand in its question where that is prose (MBPP's own prompt shows three).
    """

    max_number: int
    shown_tests: int
    synthetic = True
    required = ("question", "tests")
    optional = ("id", "entry_point", "setup", "answer")

    def __post_init__(self) -> None:
        if self.max_number < 3:
            raise ValueError(f"task.source.max_number: {self.max_number} is below 3. Try: 99")
        if self.shown_tests < 0:
            raise ValueError(f"task.source.shown_tests: {self.shown_tests} is below 0. Try: 1")

    def _draw(self, rng: random.Random) -> dict[str, Any] | None:
        words, expression, value = rng.choice(EXERCISES)
        c = rng.randint(2, self.max_number)
        inputs = [0, c, c - 1, c + 1, 3 * c, -rng.randint(1, self.max_number)]
        tests = [f"assert f({x}) == {value(x, c)}" for x in inputs]
        stub = f'def f(x):\n{_INDENT}"""Return {words.format(c=c)}."""\n'
        return _row(stub, stub, "", tests, "f", f"{_INDENT}return {expression.format(c=c)}")

    def generate(self, split: Split, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Distinct exercises; those of test begin with the hand-written problems."""
        own = [_hand_written(*problem) for problem in PROBLEMS] if split == "test" else []
        made = distinct(self._draw, ("code", split, seed), max(0, count - len(own)), self.identity, forbidden)
        return [*own, *made][:count]

    def traces(self, purpose: Purpose, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Exercises with a written body: the right one, or the careless last number of the question."""
        return write_traces("code", purpose, count, seed, forbidden, self._draw, _written)

    def example(self, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        """A row of data.

        Raises:
            ValueError: for tests that are none, or where the function's name cannot be told.
        """
        question = _code_text(values, "question", place)
        tests = values["tests"]
        tests = [tests] if isinstance(tests, str) else tests
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) and t.strip() for t in tests):
            raise ValueError(f"{place}: tests is no text and no list of texts. Try: a list of assert lines [E304]")
        setup = values.get("setup") or ""
        setup = setup if isinstance(setup, str) else "\n".join(setup)
        answer = values.get("answer")
        answer = answer if isinstance(answer, str) else ""
        name = values.get("entry_point") or _tested_name(answer, tests)
        if name is None:
            raise ValueError(
                f"{place}: no entry_point, and none to be told from tests. Try: a column entry_point [E304]"
            )
        name = required_text({"entry_point": name}, "entry_point", place)
        is_stub = re.search(rf"^def\s+{re.escape(name)}\s*\(", question, re.MULTILINE) is not None
        shown = tests[: self.shown_tests]
        if not is_stub:
            question = "\n".join([question.strip(), f"Write the function {name}.", *shown])
        return _row(question, question if is_stub else "", setup, tests, name, answer)

    def identity(self, example: Example) -> str:
        """The question, white space aside."""
        return " ".join(example["question"].split())

    def group(self, example: Example) -> str:
        """The question."""
        return self.identity(example)

    def worked(self, example: Example, short: bool) -> str | None:
        """The reference program in answer tags, fenced unless `short`."""
        if not example["answer"].strip():
            return None
        program = example["answer"].strip("\n")
        return tagged(None, program if short else f"\n```python\n{program}\n```\n", short)


def _row(question: str, prompt: str, setup: str, tests: Sequence[str], entry_point: str, answer: str) -> dict[str, Any]:
    row = {"question": question, "prompt": prompt, "setup": setup, "tests": list(tests)}
    return row | {"entry_point": entry_point, "answer": answer}


def _hand_written(stub: str, body: str, tests: Sequence[str]) -> dict[str, Any]:
    names = _DEFINITION.findall(stub)
    return _row(stub, stub, "", tests, names[-1], body)


def _code_text(values: Mapping[str, Any], field: str, place: str) -> str:
    """Text whose leading and trailing white space means something."""
    required_text(values, field, place)
    return values[field]


def _tested_name(answer: str, tests: Sequence[str]) -> str | None:
    """The function of the reference program that the first test calls (MBPP names it nowhere else)."""
    called = [name for name in _DEFINITION.findall(answer) if re.search(rf"\b{name}\s*\(", tests[0])]
    return called[-1] if called else None


def _written(example: Example, manner: Manner) -> str:
    if manner == "careful":
        expression = example["answer"].split("return ", 1)[1]
        return tagged(METHOD_CHARACTER[manner] + expression, example["answer"], short=True)
    last_number = re.findall(r"[0-9]+", example["question"])[-1]
    reasoning = None if manner == "direct" else METHOD_CHARACTER[manner] + last_number
    return tagged(reasoning, f"{_INDENT}return {last_number}", short=True)
