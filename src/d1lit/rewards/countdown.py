"""Countdown, strictly: each number exactly once, + - * / and parentheses, exactly the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from d1lit.rewards.arithmetic import Refused, exact_value
from d1lit.rewards.extract import final_answer
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Reward, Verdict

_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))


def _unwrapped(text: str) -> str:
    for opening, closing in _WRAPPINGS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            return text[len(opening) : -len(closing)].strip()
    return text


def solves(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression (or "expression = target") makes the target from the numbers, each used exactly once.

    Raises:
        Refused: it is not arithmetic of the game.
    """
    sides = _unwrapped(expression).split("=")
    if len(sides) == 2:
        stated = sides[1].strip()
        digits = stated.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and int(stated) == target):
            raise Refused("what stands right of the equals sign is not the target")
    elif len(sides) > 2:
        raise Refused("several equals signs")
    value, used = exact_value(sides[0])
    return value == target and sorted(used) == sorted(numbers)


def _judge(text: str, example: Example) -> Verdict:
    answer = final_answer(text)
    if answer is None:
        return Verdict(0.0, "unparsed")
    try:
        return Verdict(float(solves(answer, example["numbers"], int(example["target"]))), parsed=answer)
    except Refused:
        return Verdict(0.0, "unparsed", answer)


@dataclass(frozen=True)
class CountdownSolved:
    """1 where the expression solves the row, else 0."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(_judge, completions, examples)


@dataclass(frozen=True)
class CountdownAttempt:
    """1 where the grader says right, `attempt` for any other answer given, 0 for none (d1's 0 / 0.1 / 1)."""

    grader: Reward
    attempt: float

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return [self._paid(*pair) for pair in zip(completions, self.grader(completions, examples), strict=True)]

    def _paid(self, text: str, verdict: Verdict) -> Verdict:
        if verdict.value == 1.0 or final_answer(text) is None:
            return verdict
        return replace(verdict, value=self.attempt)
