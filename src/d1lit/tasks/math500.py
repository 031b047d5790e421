"""MATH-500 (Hendrycks et al., arXiv 2103.03874; the 500 rows of Lightman et al., arXiv 2305.20050), or a stand-in."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Math500Source:
    """Small exercises whose answer is boxed (sums, brackets, one-step equations, fractions), standing in for MATH.

    Args:
        max_number: generated exercises use whole numbers from 2 to this.
    """

    max_number: int
    synthetic = True
    required = ("question", "answer")
    optional = ("id", "solution")

    def __post_init__(self) -> None:
        if self.max_number < 5:
            raise ValueError(f"task.source.max_number: {self.max_number} is below 5. Try: 12")

    def _draw(self, rng: random.Random) -> dict[str, Any] | None:
        a, b, c = (rng.randint(2, self.max_number) for _ in range(3))
        form = rng.randrange(5)
        if form == 0:
            return _example(f"Compute ${a}*{b}+{c}$.", (f"{a}*{b}={a * b}", f"{a * b}+{c}={a * b + c}"), str(a * b + c))
        if form == 1:
            steps = (f"{b}+{c}={b + c}", f"{a}*{b + c}={a * (b + c)}")
            return _example(f"Compute ${a}({b}+{c})$.", steps, str(a * (b + c)))
        if form == 2:
            return _example(f"Compute ${a}-{b}$.", (f"{a}-{b}={a - b}",), str(a - b))
        if form == 3:
            return _example(f"Solve $x+{a}={a + b}$ for $x$.", (f"{a + b}-{a}={b}",), str(b))
        divisor = math.gcd(a, b)
        if divisor == 1 or b % a == 0 or a % b == 0:
            return None
        top, bottom = a // divisor, b // divisor
        return _example(
            f"Reduce $\\frac{{{a}}}{{{b}}}$.",
            (f"{a}/{divisor}={top}", f"{b}/{divisor}={bottom}"),
            f"\\frac{{{top}}}{{{bottom}}}",
        )

    def generate(self, split: Split, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Distinct exercises with steps and a boxed answer."""
        return distinct(self._draw, ("math500", split, seed), count, self.identity, forbidden)

    def traces(self, purpose: Purpose, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Exercises with a written answer: the steps and the result, or the careless last number of the question."""
        return write_traces("math500", purpose, count, seed, forbidden, self._draw, _written)

    def example(self, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        """A row of data: problem and bare gold answer, and the worked solution where the row has one."""
        example = {field: required_text(values, field, place) for field in self.required}
        if isinstance(values.get("solution"), str) and values["solution"].strip():
            example["solution"] = values["solution"].strip()
        return example

    def identity(self, example: Example) -> str:
        """The problem, white space aside."""
        return " ".join(example["question"].split())

    def group(self, example: Example) -> str:
        """The problem."""
        return self.identity(example)

    def worked(self, example: Example, short: bool) -> str | None:
        """The worked solution and the boxed answer, or `short` the boxed answer alone."""
        if short:
            return tagged(None, _boxed(example["answer"]), short=True)
        if "solution" not in example:
            return None
        return tagged(example["solution"], _boxed(example["answer"]), short=False)


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _example(question: str, steps: tuple[str, ...], answer: str) -> dict[str, Any]:
    solution = f"${'$, $'.join(steps)}$, so the answer is ${_boxed(answer)}$."
    return {"question": question, "answer": answer, "steps": ";".join(steps), "solution": solution}


def _written(example: Example, manner: Manner) -> str:
    if manner == "careful":
        return tagged(METHOD_CHARACTER[manner] + example["steps"], _boxed(example["answer"]), short=True)
    last_number = re.findall(r"[0-9]+", example["question"])[-1]
    reasoning = None if manner == "direct" else METHOD_CHARACTER[manner] + last_number
    return tagged(reasoning, _boxed(last_number), short=True)
