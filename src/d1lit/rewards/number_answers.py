"""GSM8K, strictly: the final answer must be one number, compared exactly with the gold number.

Read as numbers: whole numbers, decimals, a/b, thousands commas, a sign, currency, a percent sign, a unit after and
words before. Not read: arithmetic still to be done, two numbers, hedged or negated answers, digits of other scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from d1lit.rewards.answer_words import hedges_in, is_unit
from d1lit.rewards.extract import LONGEST_ANSWER, final_answer
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

MOST_DIGITS = 40
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?P<sign>[+-])\s?)?(?:\$\s?)?(?P<inner>-?)(?P<size>{_UNSIGNED})")
_FRACTION = re.compile(r"(?P<sign>[+-]?)\$?(?P<over>[0-9]+)\s?/\s?(?P<under>[0-9]+)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{([0-9]{1,40})\}\s?\{([0-9]{1,40})\}")
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s?\{([^{}\\]*)\}")
_CURRENCY = re.compile(r"[€£¥₹]|(?<![A-Za-z])(?:USD|US)\b|\\\$")
_UNIT_POWER = re.compile(r"(?:(?<=[A-Za-z]{2})|(?<=[^A-Za-z]m))(?:\^?\{?[23]\}?|[²³])(?![0-9.,])")
_FOREIGN_DIGIT = re.compile(r"[^\D0-9]|[⁰¹⁴-⁹₀-₉]")
_UNFINISHED = re.compile(r"\s*[-/*](?![A-Za-z])")
_AROUND = re.compile(r"[A-Za-z'°%\s/.!:;,()\[\]*_`~$-]*")
_MULTIPLES = re.compile(r"\s?(?:[kKMBGT]|[mb]n)(?![A-Za-z])")
_GLUED = re.compile(r"[.,]?[0-9]|\.[0-9]|\s?/\s?[0-9]|[eE]-?$")
_DENIED = re.compile(r"[!<>~/:\u2248\u2260\u2264\u2265]\s?=|\.{3}|\u2026")
_PRODUCT_SIGN = re.compile(r"(?<=[0-9])\s?[xX]\s?(?=[$0-9])")
_UNSOLVED = re.compile(
    r"[-0-9+*/^|{]\s?[b-fi-kn-rt-zB-HJ-Z](?![A-Za-z])|(?<![A-Za-z])[b-fi-kn-rt-zB-HJ-Z]\s?[-+*/^'|]|\\(?:sqrt|frac|log|ln|bar)"
    r"|(?<![A-Za-z/])(?:d|(?:sin|cos|tan|cot|sec|csc|exp|sqrt|log|ln|lg)[\s({]+)[t-z](?![A-Za-z])"
)
"""Left of an equals sign: not the name of what is asked for, but something done to it (`2x = 18`, `dx = 18`).

`$4/dz`, a price for a dozen, is none.
"""
_BRACKETED_AFTER_MINUS = re.compile(r"(?<=-)\s?(\$?)[(\[]\s?([$0-9.,]+)\s?[)\]]")
_FREE_MINUS = re.compile(r"(?<![A-Za-z])-|-(?![A-Za-z])")
_CALLED = re.compile(
    r"[A-Za-z)\]][(\[][^A-Za-z]*$"  # f(18
    r"|(?<![A-Za-z])(?:[b-zA-HJ-Z]|[aI]\s?\*)[\s*_]*[(\[]?$"  # x 18, x*18; not "a" and "I"
    r"|[A-Za-z)\]][_*/]$|[)\]!]$"  # x_18, (x)18, !18
)
_BEFORE = re.compile(
    r"\b(?:(?:square|cube|pair|digits?|power|product|multiples?|factors?|part|fraction|floor|ceiling|digit sum) of"
    r"|min|past|point|say|some|as many as|off by|different from)\s(?:the\s)?$",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"[)\]*_$]*\s?!|\([A-Za-z]\)|[)\]]+[A-Za-z(\[]|[\s*_]*[-*/]?fold"  # 18!, (18)x, 18-fold
    r"|\W*(?:score|odd|something|cube|square|in base|base)\W*(?!\w)"
)
_NEXT_LETTERS = re.compile(r"(\s?[-*/_]?)([A-Za-z]+)")
_NEGATIVE_WORDS = re.compile(r"\b(?:minus|negative)\s+(?=[$0-9.])", re.IGNORECASE)


def exact_number(text: str) -> Fraction | None:
    """The number a gold answer states: digits, thousands commas, a decimal point, a sign, nothing else."""
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST_ANSWER else None
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Fraction | None:
    digits = match["size"].replace(",", "")
    if len(digits) > MOST_DIGITS or (match["sign"] and match["inner"]):
        return None
    value = Fraction(digits)
    return -value if "-" in (match["sign"], match["inner"]) else value


def _plain(text: str) -> str:
    """The answer without mark-up: maths delimiters, text macros, emphasis, currency, exponents of units."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\,", " ").replace("\\%", "%")
    text = _TEXT_MACRO.sub(lambda match: " " * (len(match[1]) > 2) + match[1], text)  # `18\text{x}` is a product
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text)
    text = _CURRENCY.sub("$", text)
    for mark in ("\\(", "\\)", "\\[", "\\]", "$$", "**", "^\\circ", "^{\\circ}"):
        text = text.replace(mark, " ")
    text = _NEGATIVE_WORDS.sub("-", _UNIT_POWER.sub("", text))
    text = _BRACKETED_AFTER_MINUS.sub(r"\1\2", text)
    return " ".join(text.split())


def read_number(answer: str) -> Fraction | None:
    """The one number an answer states, or None where it states none, or more than one, or hedges."""
    if len(answer) > LONGEST_ANSWER or _FOREIGN_DIGIT.search(answer):
        return None
    text = _plain(answer)
    if _DENIED.search(text):
        return None
    if "=" in text:
        # "9 * 2 = 18" commits itself to what stands on the right; "x = 18" too.
        left, text = text.rsplit("=", 1)
        if _UNSOLVED.search(_PRODUCT_SIGN.sub("*", left)):
            return None
        text = text.strip()
    match = _FRACTION.search(text)
    if match:
        if len(match["over"]) > MOST_DIGITS or len(match["under"]) > MOST_DIGITS or int(match["under"]) == 0:
            return None
        value: Fraction | None = Fraction(int(match["over"]), int(match["under"])) * (-1 if match["sign"] == "-" else 1)
    else:
        match = _NUMBER.search(text)
        value = _value(match) if match else None
    if match is None or value is None or not _harmless(text[: match.start()], text[match.end() :]):
        return None
    return value


def _harmless(before: str, after: str) -> bool:
    """Whether the words around a number leave it the one thing stated."""
    if not (_AROUND.fullmatch(before) and _AROUND.fullmatch(after)):
        return False
    # Glued signs and points change the number: "1--5", "3.4.5"; so does an exponent: "1e".
    if before.rstrip().endswith(("-", "/", "(-", "~")) or _MULTIPLES.match(after) or _GLUED.match(after):
        return False
    if _UNFINISHED.match(after) and not before.endswith(after.strip()[:1]):
        return False
    if (before and before[-1].isalpha()) or _FREE_MINUS.search(before):
        return False
    if _CALLED.search(before) or _BEFORE.search(before) or _AFTER.match(after) or _is_multiplied(after):
        return False
    return not hedges_in([before, after])


def _is_multiplied(after: str) -> bool:
    """Whether letters right after a number are a factor (`18x`, `18 x`) and no unit or word."""
    match = _NEXT_LETTERS.match(after)
    if not match or is_unit(match[2]):
        return False
    return match[1] in ("", "_") or (len(match[2]) == 1 and match[2] != "a")


@dataclass(frozen=True)
class NumberAnswer:
    """1 where the final answer is the gold number, else 0."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        gold = exact_number(example["answer"])
        if gold is None:
            return Verdict(0.0, "error", f"gold answer {example['answer']!r} is no number")
        answer = final_answer(text)
        number = None if answer is None else read_number(answer)
        if number is None:
            return Verdict(0.0, "unparsed", answer)
        return Verdict(float(number == gold), parsed=answer)


@dataclass(frozen=True)
class IntegerAnswer:
    """1 where the final answer is a whole number, right or wrong; the shaping idea of d1's integer reward."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    @staticmethod
    def _judge(text: str, example: Example) -> Verdict:
        answer = final_answer(text)
        number = None if answer is None else read_number(answer)
        if number is None:
            return Verdict(0.0, "unparsed", answer)
        return Verdict(float(number.denominator == 1), parsed=answer)
