"""GSM8K (Cobbe et al., arXiv 2110.14168): school word problems; a generated stand-in, or the real rows from data."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d1lit.tasks.source import (
    METHOD_CHARACTER,
    Forbidden,
    Manner,
    NoAnswer,
    Purpose,
    Split,
    distinct,
    required_text,
    tagged,
    write_traces,
)
from d1lit.types import Example

_NAMES = ("Tom", "Ana", "Ben", "Eva", "Max", "Mia", "Leo", "Zoe", "Sam", "Kim", "Ada", "Ida")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "kites", "nuts", "pens", "shells", "stamps")
_MARK = re.compile(r"<<([^<>]*)>>")


@dataclass(frozen=True)
class Gsm8kSource:
    """Word problems of one or two steps on small numbers, standing in for the real data.

    Args:
        max_number: generated problems use whole numbers from 2 to this.
    """

    max_number: int
    synthetic = True
    required = ("question", "answer")
    optional = ("id",)

    def __post_init__(self) -> None:
        if self.max_number < 4:
            raise ValueError(f"task.source.max_number: {self.max_number} is below 4. Try: 12")

    def _draw(self, rng: random.Random) -> dict[str, Any] | None:
        name, other = rng.sample(_NAMES, 2)
        thing = rng.choice(_THINGS)
        a, b, c = (rng.randint(2, self.max_number) for _ in range(3))
        form = rng.randrange(5)
        if form == 0:
            story, steps, result = f"{name} has {a} {thing} and gets {b}.", (f"{a}+{b}={a + b}",), a + b
        elif form == 1:
            story, steps, result = f"{name} has {a} {thing} and gives {other} {b}.", (f"{a}-{b}={a - b}",), a - b
        elif form == 2:
            story, steps, result = f"{name} has {a} bags of {b} {thing}.", (f"{a}*{b}={a * b}",), a * b
        elif form == 3:
            story = f"{name} has {a} {thing}, gets {b} and loses {c}."
            steps, result = (f"{a}+{b}={a + b}", f"{a + b}-{c}={a + b - c}"), a + b - c
        else:
            story = f"{name} has {a} bags of {b} {thing} and gets {c}."
            steps, result = (f"{a}*{b}={a * b}", f"{a * b}+{c}={a * b + c}"), a * b + c
        if result < 1:
            return None
        solution = "".join(f"<<{step}>>{step.split('=')[1]}\n" for step in steps) + f"#### {result}"
        return {"question": f"{story} How many?", "answer": str(result), "solution": solution}

    def generate(self, split: Split, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Distinct word problems with a solution written as GSM8K writes them."""
        return distinct(self._draw, ("gsm8k", split, seed), count, self.identity, forbidden)

    def traces(self, purpose: Purpose, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Problems with a written answer: the steps and the result, or the careless last number of the question."""
        return write_traces("gsm8k", purpose, count, seed, forbidden, self._draw, _written)

    def example(self, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        """A row of data: the gold answer is what follows the last `####`, or the whole answer where there is none."""
        solution = required_text(values, "answer", place)
        gold = solution.rsplit("####", 1)[-1].strip()
        if not gold:
            raise NoAnswer(f"{place}: nothing follows '####' in answer. Try: mend or delete the row [E304]")
        example = {"question": required_text(values, "question", place), "answer": gold}
        return example | {"solution": values["answer"]} if "####" in solution else example

    def identity(self, example: Example) -> str:
        """The question, white space aside."""
        return " ".join(example["question"].split())

    def group(self, example: Example) -> str:
        """The question."""
        return self.identity(example)

    def worked(self, example: Example, short: bool) -> str | None:
        """The rationale without its calculator marks, or `short` the marks alone."""
        if "solution" not in example:
            return None
        rationale = example["solution"].rsplit("####", 1)[0].strip()
        if short:
            return _short(rationale, example["answer"])
        return tagged(_MARK.sub("", rationale), example["answer"], short=False)


def _short(rationale: str, answer: str) -> str:
    steps = ";".join(mark.replace(" ", "") for mark in _MARK.findall(rationale))
    return tagged(METHOD_CHARACTER["careful"] + steps, answer, short=True)


def _written(example: Example, manner: Manner) -> str:
    if manner == "careful":
        return _short(example["solution"], example["answer"])
    last_number = re.findall(r"[0-9]+", example["question"])[-1]
    return tagged(None if manner == "direct" else METHOD_CHARACTER[manner] + last_number, last_number, short=True)
