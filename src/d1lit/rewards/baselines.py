"""Answers that need no model: what a table must beat before it says anything.

Each takes rows and gives one completion a row, in the trained shape, so that the same grader judges it. Randomness
comes from a hash of the row's id: the same row always gets the same answer, in any order and on any machine. All take
the training rows too, which few look at.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from d1lit.types import Example


def as_completion(answer: str) -> str:
    """An answer in the trained shape."""
    return f"<reasoning>\nA guess.\n</reasoning>\n<answer>\n{answer}\n</answer>"


def _choose(row_id: str, purpose: str, size: int) -> int:
    """A number below `size` that hangs on the row and the purpose alone."""
    digest = hashlib.sha256(f"{purpose}\x1f{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % size


def most_common_answer(examples: Sequence[Example], train: Sequence[Example]) -> list[str]:
    """The commonest `answer` of the training rows, for every row (GSM8K, MATH).

    Raises:
        ValueError: no training rows.
    """
    if not train:
        raise ValueError("train: no rows to count answers in. Try: the training split")
    counts = Counter(str(row["answer"]).strip() for row in train)
    commonest = min(counts, key=lambda answer: (-counts[answer], answer))
    return [as_completion(commonest)] * len(examples)


def sum_of_numbers(examples: Sequence[Example], train: Sequence[Example] = ()) -> list[str]:
    """Countdown: all numbers added, in the order given."""
    return [as_completion(" + ".join(map(str, row["numbers"]))) for row in examples]


def random_expression(examples: Sequence[Example], train: Sequence[Example] = ()) -> list[str]:
    """Countdown: the numbers in random order with random operators, bracketed from the left."""
    return [as_completion(_random_expression(row)) for row in examples]


def _random_expression(row: Example) -> str:
    numbers = sorted(row["numbers"])
    text = str(numbers.pop(_choose(row["id"], "number 0", len(numbers))))
    for place in range(1, len(row["numbers"])):
        number = numbers.pop(_choose(row["id"], f"number {place}", len(numbers)))
        operator = "+-*/"[_choose(row["id"], f"operator {place}", 4)]
        text = f"({text} {operator} {number})" if numbers else f"{text} {operator} {number}"
    return text


def constant_digit(examples: Sequence[Example], train: Sequence[Example] = (), digit: str = "1") -> list[str]:
    """Sudoku: one digit in every cell, givens and all (what d1's cell metric pays 24 to 26 % for)."""
    return [as_completion(digit * 16) for _ in examples]


def row_fill(examples: Sequence[Example], train: Sequence[Example] = ()) -> list[str]:
    """Sudoku: each row's missing digits in ascending order; keeps the givens, looks at nothing else."""
    return [as_completion(_filled(row["puzzle"])) for row in examples]


def _filled(puzzle: str) -> str:
    grid = ""
    for start in range(0, 16, 4):
        line = puzzle[start : start + 4]
        missing = iter(sorted(set("1234") - set(line)))
        grid += "".join(next(missing, "1") if digit == "0" else digit for digit in line)
    return grid


def random_candidate(examples: Sequence[Example], train: Sequence[Example] = ()) -> list[str]:
    """Sudoku: each empty cell a random digit that its row, column and box givens allow (1 where none is)."""
    return [as_completion(_candidate(row)) for row in examples]


def _candidate(row: Example) -> str:
    puzzle = row["puzzle"]
    grid = ""
    for at, given in enumerate(puzzle):
        if given != "0":
            grid += given
            continue
        r, c = divmod(at, 4)
        near = {
            puzzle[i] for i in range(16) if i // 4 == r or i % 4 == c or (i // 8 == r // 2 and i % 4 // 2 == c // 2)
        }
        allowed = sorted(set("1234") - near) or ["1"]
        grid += allowed[_choose(row["id"], f"cell {at}", len(allowed))]
    return grid
