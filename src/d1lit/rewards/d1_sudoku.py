"""4x4 Sudoku as d1 (arXiv 2504.12216, github.com/dllm-reasoning/d1) rewards and grades it, mistakes included.

Differs from the rules of the game: cells are compared with one stored solution although many puzzles have several,
only the originally empty cells count, and the givens may be altered at will.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from d1lit.rewards.extract import last_between
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

CELLS = 16
_DIGITS_OR_SPACE = re.compile(r"[\d\s]+")
_BEFORE_CLOSE = re.compile(r"(\d{16})\s*</answer>")
_SIXTEEN_DIGITS = re.compile(r"\b(\d{16})\b")
_ENDS = ("<|eot_id|>", "<|endoftext|>")


def sized(grid: str) -> str:
    """The grid cut to 16 characters, or filled up with zeros."""
    return grid[:CELLS].ljust(CELLS, "0")


def matching_cells(grid: str, example: Example) -> tuple[int, int]:
    """Empty cells of the puzzle where `grid` (16 characters) has the stored digit; and their number."""
    empty = [i for i, digit in enumerate(example["puzzle"][:CELLS]) if digit == "0"]
    return sum(grid[i] == example["solution"][i] for i in empty), len(empty)


def _fenced_digits(text: str) -> str | None:
    """Digits in a code fence after the first answer tag."""
    start = text.find("<answer>")
    at = text.find("```", start + len("<answer>")) if start >= 0 else -1
    while at >= 0:
        run = _DIGITS_OR_SPACE.match(text, at + 3)
        if run and text.startswith("```", run.end()):
            return run.group()
        at = text.find("```", at + 1)
    return None


def _up_to_first(text: str, start: int, ends: Sequence[str]) -> str | None:
    stops = [at for end in ends if (at := text.find(end, start)) >= 0]
    return text[start : min(stops)] if stops else None


def _after_open(text: str) -> str | None:
    start = text.find("<answer>")
    return None if start < 0 else _up_to_first(text, start + len("<answer>"), (*_ENDS, "</answer>"))


def _after_close(text: str) -> str | None:
    start = text.find("</answer>")
    if start < 0:
        return None
    rest = text[start + len("</answer>") :].lstrip()
    found = _up_to_first(rest, 0, _ENDS)
    return rest if found is None else found


def _group(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match.group(1) if match else None


def evaluation_grid(text: str) -> str:
    """What the evaluation takes for the grid: the first of five readings that is not blank, white space removed."""
    readings = (
        _fenced_digits,
        _after_open,
        _after_close,
        lambda text: _group(_BEFORE_CLOSE, text),
        lambda text: _group(_SIXTEEN_DIGITS, text),
    )
    for read in readings:
        grid = "".join((read(text) or "").split())
        if grid:
            return grid
    return ""


@dataclass(frozen=True)
class D1SudokuReward:
    """Share of the empty cells that hold the stored digit, read from the digits of the last answer pair."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        block = last_between(text, "<answer>", "</answer>")
        grid = "".join(char for char in (block or "") if char.isdigit())
        if not grid:
            return Verdict(0.0, "unparsed")
        right, empty = matching_cells(sized(grid), example)
        return Verdict(right / empty if empty else 0.0, parsed=grid)


@dataclass(frozen=True)
class D1SudokuEvaluation:
    """The paper's evaluation: right empty cells out of all empty cells."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        grid = evaluation_grid(text)
        if not grid:
            return Verdict(0.0, "unparsed", out_of=float(example["puzzle"][:CELLS].count("0")))
        right, empty = matching_cells(sized(grid), example)
        return Verdict(float(right), parsed=sized(grid), out_of=float(empty))
