"""The grader of each task: the strict verdict, the paper's verdict, and what is measured beside them."""

from __future__ import annotations

from d1lit.rewards.countdown import CountdownSolved
from d1lit.rewards.d1_countdown import D1CountdownEvaluation
from d1lit.rewards.d1_gsm8k import D1Gsm8kEvaluation
from d1lit.rewards.d1_math import D1MathEvaluation
from d1lit.rewards.d1_sudoku import D1SudokuEvaluation
from d1lit.rewards.math_answers import MathAnswer
from d1lit.rewards.math_process import MathVerify
from d1lit.rewards.number_answers import NumberAnswer
from d1lit.rewards.parts import Grader
from d1lit.rewards.sudoku import CellShare, GivensKept, SudokuSolved


def gsm8k_grader() -> Grader:
    """Grader of GSM8K rows (`answer`: the gold number)."""
    return Grader(NumberAnswer(), D1Gsm8kEvaluation())


def math_grader(seconds: float = 2.0) -> Grader:
    """Grader of MATH rows (`answer`: the bare gold answer).

    Args:
        seconds: deadline of one symbolic comparison, in processor time.
    """
    return Grader(MathAnswer(MathVerify(seconds)), D1MathEvaluation())


def countdown_grader() -> Grader:
    """Grader of Countdown rows (`numbers`, `target`)."""
    return Grader(CountdownSolved(), D1CountdownEvaluation())


def sudoku_grader() -> Grader:
    """Grader of 4x4 Sudoku rows (`puzzle`, `solution`); measures cells and givens too."""
    return Grader(SudokuSolved(), D1SudokuEvaluation(), {"cell_accuracy": CellShare(), "givens_kept": GivensKept()})
