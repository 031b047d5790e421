"""Countdown: reach a target with the given numbers, each used once, by + - * / (d1 uses three numbers)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from d1lit.tasks.source import (
    METHOD_CHARACTER,
    Forbidden,
    Manner,
    Purpose,
    Split,
    distinct,
    tagged,
    write_traces,
)
from d1lit.types import Example

_CALCULATE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}


@dataclass(frozen=True)
class CountdownSource:
    """Solvable instances, made by drawing an expression first and reading its target off.

    Args:
        count_numbers: how many numbers a problem has; data rows with another count are left out and counted.
        max_number: generated numbers are 1 to this.
        max_target: generated targets are 1 to this.
        operations: the operators generated solutions may use, such as "+-*/".
    """

    count_numbers: int
    max_number: int
    max_target: int
    operations: str
    synthetic = False
    required = ("numbers", "target")
    optional = ("id", "expression", "steps")

    def __post_init__(self) -> None:
        if not self.operations or not set(self.operations) <= set(_CALCULATE):
            raise ValueError(f"task.source.operations: {self.operations!r} is not made of + - * /. Try: '+-*/'")
        if not 2 <= self.count_numbers <= 6:
            raise ValueError(f"task.source.count_numbers: {self.count_numbers} is not within 2 to 6. Try: 3")

    def _draw(self, rng: random.Random) -> dict[str, Any] | None:
        """Combine two random terms until one is left; None where a step leaves the positive integers."""
        numbers = [rng.randint(1, self.max_number) for _ in range(self.count_numbers)]
        terms = [(Fraction(number), str(number)) for number in numbers]
        steps: list[str] = []
        while len(terms) > 1:
            left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
            symbol = rng.choice(self.operations)
            value = _CALCULATE[symbol](left[0], right[0])
            if value is None or value.denominator != 1 or value < 1:
                return None
            last = len(terms) == 0
            text = f"{left[1]}{symbol}{right[1]}"
            steps.append(f"{left[0]}{symbol}{right[0]}={value}")
            terms.append((value, text if last else f"({text})"))
        target = int(terms[0][0])
        if target > self.max_target:
            return None
        return _example(numbers, target) | {"expression": terms[0][1], "steps": ";".join(steps)}

    def generate(self, split: Split, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Distinct solvable problems, with a solution and its steps."""
        return distinct(self._draw, ("countdown", split, seed), count, self.identity, forbidden)

    def traces(self, purpose: Purpose, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Problems with a written answer: steps and a right expression, or a careless one (the sum, minus the last)."""
        return write_traces("countdown", purpose, count, seed, forbidden, self._draw, _written)

    def example(self, values: Mapping[str, Any], place: str) -> dict[str, Any] | None:
        """A problem from data: numbers as a list or as text with commas, the target as a number or as text."""
        numbers = values["numbers"]
        if isinstance(numbers, str):
            numbers = [part for part in re.split(r"[,\s]+", numbers.strip(" []")) if part]
        if not isinstance(numbers, (list, tuple)) or not numbers:
            raise ValueError(f"{place}: numbers is {str(numbers)[:40]!r}, not a list. Try: [3, 7, 25] [E304]")
        whole = [_whole_number(number, "numbers", place) for number in numbers]
        target = _whole_number(values["target"], "target", place)
        if len(whole) != self.count_numbers:
            return None
        known = {field: values[field] for field in ("expression", "steps") if isinstance(values.get(field), str)}
        return _example(whole, target) | known

    def identity(self, example: Example) -> str:
        """The numbers in any order, and the target."""
        return f"{sorted(example['numbers'])}={example['target']}"

    def group(self, example: Example) -> str:
        """The problem itself."""
        return self.identity(example)

    def worked(self, example: Example, short: bool) -> str | None:
        """The worked steps and the expression, where the row has them."""
        if "expression" not in example:
            return None
        steps = [line for line in str(example.get("steps", "")).split("\n") if "=" in line]
        if short:
            joined = ";".join(step.replace(" ", "") for step in steps)
            return tagged(METHOD_CHARACTER["careful"] + joined, example["expression"].replace(" ", ""), short=True)
        return tagged("\n".join(steps).replace(";", "\n"), example["expression"], short=False)


def _example(numbers: list[int], target: int) -> dict[str, Any]:
    question = f"Numbers: {numbers}\nTarget: {target}"
    return {"question": question, "numbers": numbers, "target": target, "answer": str(target)}


def _written(example: Example, manner: Manner) -> str:
    if manner == "careful":
        return tagged(METHOD_CHARACTER[manner] + example["steps"], example["expression"], short=True)
    *first, last = map(str, example["numbers"])
    guess = f"{'+'.join(first)}-{last}"  # right for about a fifth of the generated problems
    return tagged(None if manner == "direct" else METHOD_CHARACTER[manner] + guess, guess, short=True)


def _whole_number(value: Any, field: str, place: str) -> int:
    """A whole number, from a JSON number or from digits in a text."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 10**9 or value != int(value):
        raise ValueError(
            f"{place}: {field} holds {str(value)[:40]!r}, not a whole number. Try: mend or delete the row [E304]"
        )
    return int(value)
