"""Arithmetic without `eval`: parsed to a tree, checked node by node, computed exactly, and bounded in every direction.

Two dialects. `exact_value` is the game's: the four operations and parentheses over whole numbers, as Fractions.
`python_value` repeats what Python's own evaluator would say of the characters that d1 (arXiv 2504.12216) lets through,
`**`, `//` and decimals included, and refuses what could take for ever (`9**9**9`).
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from fractions import Fraction

PythonNumber = int | float | complex

LONGEST_EXPRESSION = 200
"""Characters; a Countdown solution of six numbers needs about 40."""
DEEPEST_TREE = 32
MOST_DIGITS = 12
LARGEST_POWER_BITS = 20_000
"""Powers whose result would need more bits than this are refused, not computed."""

_EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_PYTHON = {**_EXACT, ast.FloorDiv: operator.floordiv}
_SPELLINGS = (
    ("\\times", "*"),
    ("\\cdot", "*"),
    ("\\div", "/"),
    ("\\left(", "("),
    ("\\right)", ")"),
    ("\u00d7", "*"),
    ("\u00b7", "*"),
    ("\u22c5", "*"),
    ("\u00f7", "/"),
    ("\u2212", "-"),
)
_EXACT_CHARACTERS = re.compile(r"[0-9+\-*/() ]+")


class Refused(ValueError):
    """The text is not arithmetic of the dialect."""


class TooMuch(ValueError):
    """The text may be arithmetic, but computing it could take for ever."""


def plain_operators(text: str) -> str:
    r"""Multiplication and division signs (\times, \cdot, \div, ×, ·, ÷, −) as the four ASCII operators."""
    for spelling, sign in _SPELLINGS:
        text = text.replace(spelling, sign)
    return text


def _parse(text: str) -> ast.expr:
    """The tree of one expression. `text` must be short: Python's parser recurses in C."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser comments on a model's text ("1 is not callable")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise Refused("not an expression") from error


def exact_value(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression in + - * / and parentheses, and the whole numbers it uses.

    Signs in front of a number, decimals, `**`, `//`, leading zeros and every other character are refused.

    Raises:
        Refused: anything else than such an expression, or one beyond the bounds.
    """
    text = " ".join(plain_operators(text[: 4 * LONGEST_EXPRESSION]).split())
    if not text or len(text) > LONGEST_EXPRESSION or not _EXACT_CHARACTERS.fullmatch(text):
        raise Refused("not arithmetic")
    numbers: list[int] = []
    return _exact_node(_parse(text), 0, numbers), numbers


def _exact_node(node: ast.expr, depth: int, numbers: list[int]) -> Fraction:
    """The value of a node; the whole numbers met are appended to `numbers`."""
    if depth > DEEPEST_TREE:
        raise Refused("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**MOST_DIGITS:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _EXACT:
        left, right = _exact_node(node.left, depth + 1, numbers), _exact_node(node.right, depth + 1, numbers)
        if isinstance(node.op, ast.Div) and right == 0:
            raise Refused("division by zero")
        return _EXACT[type(node.op)](left, right)
    raise Refused(f"{type(node).__name__} is not allowed")


def python_value(text: str) -> PythonNumber:
    """What Python makes of a bounded expression of numbers, signs, + - * / // ** and parentheses.

    Raises:
        Refused: not such an expression, or Python would raise on it (division by zero, overflow).
        TooMuch: longer, deeper or larger than the bounds.
    """
    text = text.strip()
    if len(text) > LONGEST_EXPRESSION:
        raise TooMuch(f"longer than {LONGEST_EXPRESSION} characters")
    try:
        return _python_node(_parse(text), 0)
    except (ArithmeticError, TypeError, MemoryError) as error:
        raise Refused("Python would raise") from error


def _python_node(node: ast.expr, depth: int) -> PythonNumber:
    if depth > 2 * DEEPEST_TREE:
        raise TooMuch("nested too deeply")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _python_node(node.operand, depth + 1)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp):
        left, right = _python_node(node.left, depth + 1), _python_node(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _bounded_power(left, right)
        if type(node.op) in _PYTHON:
            return _PYTHON[type(node.op)](left, right)
    raise Refused(f"{type(node).__name__} has no numeric value")


def _bounded_power(base: PythonNumber, exponent: PythonNumber) -> PythonNumber:
    """base ** exponent as Python has it; only whole-number powers can explode, floats overflow at once."""
    if isinstance(base, int) and isinstance(exponent, int):
        bits = base.bit_length() * abs(exponent) if abs(base) > 1 else 0
        if bits > LARGEST_POWER_BITS:
            raise TooMuch(f"a power of {bits} bits")
    return base**exponent
