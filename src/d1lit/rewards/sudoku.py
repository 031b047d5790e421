"""4x4 Sudoku, strictly: any legal grid that keeps the givens is right, whichever solution happens to be stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from d1lit.rewards.extract import final_answer
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

CELLS = 16
_DRAWING = re.compile(r"[\s|+\-,;\[\](){}_`*]+")
_GRID = re.compile(r"[0-4]{16}")
_UNITS = tuple(
    [tuple(range(4 * r, 4 * r + 4)) for r in range(4)]
    + [tuple(range(c, 16, 4)) for c in range(4)]
    + [tuple(8 * r + 2 * c + i for i in (0, 1, 4, 5)) for r in range(2) for c in range(2)]
)


def read_grid(answer: str) -> str | None:
    """Sixteen digits (0 for an empty cell), however they are spaced, ruled or bracketed; None for anything else."""
    grid = _DRAWING.sub("", answer)
    return grid if _GRID.fullmatch(grid) else None


def is_legal(grid: str) -> bool:
    """Whether every row, column and box holds 1 to 4."""
    return all({grid[i] for i in unit} == set("1234") for unit in _UNITS)


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 legal grids, in ascending order."""

    def extend(grid: str) -> list[str]:
        if len(grid) == CELLS:
            return [grid]
        at = len(grid)
        seen = {grid[i] for unit in _UNITS if at in unit for i in unit if i < at}
        return [full for digit in "1234" if digit not in seen for full in extend(grid + digit)]

    return tuple(extend(""))


def completions_of(puzzle: str) -> tuple[str, ...]:
    """All legal grids that keep the givens (0 = empty) of a puzzle."""
    givens = [(i, digit) for i, digit in enumerate(puzzle) if digit != "0"]
    return tuple(grid for grid in all_grids() if all(grid[i] == digit for i, digit in givens))


def _grid_of(text: str) -> tuple[str | None, str | None]:
    answer = final_answer(text)
    return (None if answer is None else read_grid(answer)), answer


@dataclass(frozen=True)
class SudokuSolved:
    """1 for a legal grid that keeps every given, else 0."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    @staticmethod
    def _judge(text: str, example: Example) -> Verdict:
        grid, answer = _grid_of(text)
        if grid is None:
            return Verdict(0.0, "unparsed", answer)
        kept = all(given in ("0", digit) for given, digit in zip(example["puzzle"], grid, strict=True))
        return Verdict(float(kept and is_legal(grid)), parsed=grid)


@dataclass(frozen=True)
class CellShare:
    """Share of the empty cells that are right in the legal completion nearest to the answer."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    @staticmethod
    def _judge(text: str, example: Example) -> Verdict:
        grid, answer = _grid_of(text)
        if grid is None:
            return Verdict(0.0, "unparsed", answer)
        empty = [i for i, digit in enumerate(example["puzzle"]) if digit == "0"]
        solutions = completions_of(example["puzzle"])
        right = max((sum(grid[i] == solution[i] for i in empty) for solution in solutions), default=0)
        return Verdict(right / len(empty) if empty else float(grid in solutions), parsed=grid)


@dataclass(frozen=True)
class GivensKept:
    """Share of the givens that the answer leaves as they were."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    @staticmethod
    def _judge(text: str, example: Example) -> Verdict:
        grid, answer = _grid_of(text)
        if grid is None:
            return Verdict(0.0, "unparsed", answer)
        givens = [i for i, digit in enumerate(example["puzzle"]) if digit != "0"]
        kept = sum(grid[i] == example["puzzle"][i] for i in givens)
        return Verdict(kept / len(givens) if givens else 1.0, parsed=grid)
