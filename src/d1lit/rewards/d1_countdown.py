r"""Countdown as d1 (arXiv 2504.12216, github.com/dllm-reasoning/d1) rewards and grades it, mistakes included.

Differs from the rules of the game: `**`, `//` and decimals glued from two numbers are paid. The official code evaluates
a model's text as Python with no time limit; here a bounded evaluator gives the same verdict, and what lies beyond its
bounds (a power tower) has outcome "timeout", value as for a wrong expression.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from d1lit.rewards.arithmetic import PythonNumber, Refused, TooMuch, python_value
from d1lit.rewards.d1_math import box_content, last_box
from d1lit.rewards.extract import first_between, last_between
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_INTEGER = re.compile(r"\d+")
_SIDE = "0123456789+-*/() "
_EQUALS_NUMBER = re.compile(r"(?<=[0-9+\-*/() ])=[0-9. ]")
_LONGEST_INTEGER = 4000
"""Python refuses to read longer ones; the official code then calls the expression invalid."""
_CLOSE_ENOUGH = 1e-5


def uses_each_number_once(expression: str, numbers: Sequence[int]) -> bool:
    """Whether the digit runs of the text are the given numbers, in any order."""
    found = _INTEGER.findall(expression)
    if len(found) != len(numbers) or any(len(digits) > _LONGEST_INTEGER for digits in found):
        return False
    return sorted(map(int, found)) == sorted(numbers)


def _evaluate(expression: str) -> PythonNumber:
    if not _ALLOWED.fullmatch(expression):
        raise Refused("other characters")
    return python_value(expression)


def left_of_equals(expression: str) -> str:
    """What stands left of the first `= number`; the text itself where there is none."""
    equals = _EQUALS_NUMBER.search(expression)
    if not equals:
        return expression
    before = expression[: equals.start()]
    return before[len(before.rstrip(_SIDE)) :].strip()


def evaluation_expression(text: str) -> str:
    r"""What the evaluation takes for the expression: the last box; the whole text where there is none."""
    try:
        expression = box_content(last_box(text))
    except ValueError:
        block = first_between(text, "<answer>", "</answer>")
        expression = text if block is None else block.strip()
    expression = expression.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    return left_of_equals(expression)


@dataclass(frozen=True)
class D1CountdownReward:
    """0 without a closed answer pair, 0.1 with one, 1 where its expression uses the numbers and makes the target."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        expression = last_between(text, "<answer>", "</answer>")
        if expression is None:
            return Verdict(0.0, "unparsed")
        expression = expression.strip()
        if not uses_each_number_once(expression, example["numbers"]):
            return Verdict(0.1, parsed=expression)
        try:
            right = abs(_evaluate(expression) - example["target"]) < _CLOSE_ENOUGH
        except TooMuch:
            return Verdict(0.1, "timeout", expression)
        except (Refused, OverflowError):
            right = False
        return Verdict(1.0 if right else 0.1, parsed=expression)


@dataclass(frozen=True)
class D1CountdownEvaluation:
    """The paper's evaluation: the last box, its left side, the same checks."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        expression = evaluation_expression(text)
        if not uses_each_number_once(expression, example["numbers"]):
            return Verdict(0.0, parsed=expression)
        try:
            right = abs(_evaluate(expression) - example["target"]) < _CLOSE_ENOUGH
        except TooMuch:
            return Verdict(0.0, "timeout", expression)
        except (Refused, OverflowError):
            right = False
        return Verdict(float(right), parsed=expression)
