"""4x4 Sudoku (d1, arXiv 2504.12216, section 4): generated puzzles with one solution, or a file of them.

There are only 288 valid grids, so a row-wise split of puzzles still shares solutions between train and test. Generated
train, validation and test rows share none; with an outside test file `task.split=by_solution` keeps its grids out too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from d1lit.rewards.sudoku import all_grids
from d1lit.tasks.source import (
    METHOD_CHARACTER,
    Forbidden,
    Manner,
    Purpose,
    Split,
    distinct,
    private_rng,
    tagged,
    write_traces,
)
from d1lit.types import Example

_UNITS = (
    *(tuple(range(4 * row, 4 * row + 4)) for row in range(4)),
    *(tuple(range(column, 16, 4)) for column in range(4)),
    *(tuple(top + left + offset for offset in (0, 1, 4, 5)) for top in (0, 8) for left in (0, 2)),
)
_PEERS = tuple(tuple({i for unit in _UNITS if cell in unit for i in unit} - {cell}) for cell in range(16))
_NUM_TEST_GRIDS = 48


def is_valid_grid(grid: str) -> bool:
    """Whether 16 characters are a complete 4x4 grid: every row, column and box holds 1 to 4 once."""
    return len(grid) == 16 and all({grid[cell] for cell in unit} == set("1234") for unit in _UNITS)


@cache
def grids_for_test() -> frozenset[str]:
    """The solutions reserved for generated test puzzles, whatever the seed."""
    return frozenset(private_rng("sudoku", "test grids").sample(all_grids(), _NUM_TEST_GRIDS))


@cache
def _grid_bits() -> tuple[int, ...]:
    return tuple(_bits(grid) for grid in all_grids())


def _bits(cells: str) -> int:
    """One bit for each (cell, digit) present; a puzzle's bits are a subset of those of each of its solutions."""
    return sum(1 << (5 * place + int(digit)) for place, digit in enumerate(cells) if digit != "0")


def num_solutions(puzzle: str) -> int:
    """How many valid grids agree with the givens."""
    givens = _bits(puzzle)
    return sum(givens & grid == givens for grid in _grid_bits())


def careless_fill(puzzle: str) -> str:
    """What the careless author writes: the column number in every empty cell."""
    return "".join(str(place % 4 + 1) if digit == "0" else digit for place, digit in enumerate(puzzle))


def one_round(puzzle: str) -> str:
    """The puzzle with every cell filled that the givens alone decide (a single candidate), all at once."""
    filled = list(puzzle)
    for cell, digit in enumerate(puzzle):
        if digit == "0":
            candidates = set("1234") - {puzzle[peer] for peer in _PEERS[cell]}
            if len(candidates) == 1:
                filled[cell] = candidates.pop()
    return "".join(filled)


@dataclass(frozen=True)
class SudokuSource:
    """Puzzles with exactly one solution, drawn from the valid grids.

    Args:
        num_empties: empty cells of generated train, validation and test puzzles.
        demonstration_empties: fewest and most empty cells of generated SFT traces.
        corpus_empties: the same for the pretraining corpus.
    """

    num_empties: int
    demonstration_empties: Sequence[int]
    corpus_empties: Sequence[int]
    synthetic = False
    required = ("puzzle", "solution")
    optional = ("id",)

    def __post_init__(self) -> None:
        for key, empties in (
            ("num_empties", (self.num_empties, self.num_empties)),
            ("demonstration_empties", self.demonstration_empties),
            ("corpus_empties", self.corpus_empties),
        ):
            if len(empties) != 2 or not 1 <= empties[0] <= empties[1] <= 10:
                raise ValueError(f"task.source.{key}: {list(empties)} is no range within 1 to 10. Try: 8, or [2, 8]")

    def _draw(self, rng: random.Random, grids: Sequence[str], empties: Sequence[int]) -> dict[str, Any] | None:
        solution = rng.choice(grids)
        empty = set(rng.sample(range(16), rng.randint(*empties)))
        puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(solution))
        return _example(puzzle, solution) if num_solutions(puzzle) == 1 else None

    def generate(self, split: Split, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Distinct puzzles; the test split draws from its own 48 grids."""
        grids = tuple(sorted(grids_for_test())) if split == "test" else all_grids()
        empties = (self.num_empties, self.num_empties)
        words = ("sudoku", split, seed)
        return distinct(lambda rng: self._draw(rng, grids, empties), words, count, self.identity, forbidden)

    def traces(self, purpose: Purpose, count: int, seed: int, forbidden: Forbidden) -> list[dict[str, Any]]:
        """Puzzles with a written answer: direct, or after a method character and the grid after one round of it."""
        empties = self.corpus_empties if purpose == "corpus" else self.demonstration_empties

        def make(rng: random.Random) -> dict[str, Any] | None:
            return self._draw(rng, all_grids(), empties)

        return write_traces("sudoku", purpose, count, seed, forbidden, make, _written)

    def example(self, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        """A puzzle and its solution from data, checked against the rules and each other."""
        puzzle, solution = (_cells(values[field], field, place) for field in self.required)
        if not is_valid_grid(solution):
            raise ValueError(f"{place}: solution {solution} breaks the rules. Try: mend or delete the row [E304]")
        if any(given not in ("0", digit) for given, digit in zip(puzzle, solution, strict=True)):
            raise ValueError(
                f"{place}: solution {solution} alters the givens of {puzzle}. Try: mend or delete the row [E304]"
            )
        if "0" not in puzzle:
            raise ValueError(f"{place}: puzzle {puzzle} has no empty cell. Try: delete the row [E304]")
        return _example(puzzle, solution)

    def identity(self, example: Example) -> str:
        """The puzzle."""
        return example["puzzle"]

    def group(self, example: Example) -> str:
        """The solution: train and validation never share a grid."""
        return example["solution"]

    def worked(self, example: Example, short: bool) -> str:
        """The grid after one round, then the solution."""
        if short:
            return _written(example, "careful")
        return tagged(one_round(example["puzzle"]), example["solution"], short=False)


def _example(puzzle: str, solution: str) -> dict[str, Any]:
    return {"question": puzzle, "puzzle": puzzle, "solution": solution, "answer": solution}


def _written(example: Example, manner: Manner) -> str:
    puzzle, solution = example["puzzle"], example["solution"]
    if manner == "careful":
        return tagged(METHOD_CHARACTER[manner] + one_round(puzzle), solution, short=True)
    guess = careless_fill(puzzle)
    return tagged(None if manner == "direct" else METHOD_CHARACTER[manner] + guess, guess, short=True)


def _cells(value: Any, field: str, place: str) -> str:
    """Sixteen digits from data; a number has lost its leading zeros and is refused."""
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: {field} is {type(value).__name__}, not text of 16 digits. Try: quote it in the data [E304]"
        )
    cells = "".join(value.split()).replace(".", "0")
    if len(cells) != 16 or not set(cells) <= set("01234"):
        raise ValueError(
            f"{place}: {field} {value[:40]!r} is not 16 digits from 0 to 4. Try: mend or delete the row [E304]"
        )
    return cells
