r"""MATH as d1 (arXiv 2504.12216, github.com/dllm-reasoning/d1) rewards and grades it, mistakes included.

The normaliser follows the rules of Hendrycks et al. (arXiv 2103.03874, github.com/hendrycks/math), which compare
strings. It raises on some inputs (letters in a/b, a macro with nothing after it); equality then falls back to the raw
strings. The format reward looks for a backspace followed by "oxed", because the original forgot to escape `\b`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d1lit.rewards.extract import first_between
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

_UNESCAPED_BOX = "\x08oxed"


def last_box(text: str) -> str:
    r"""The last `\boxed{...}` or `\fbox{...}` with its braces matched; `\boxed x` runs to the next dollar sign.

    The whole text where there is no box.

    Raises:
        ValueError: the last box is not closed.
    """
    if "\\boxed " in text:
        return "\\boxed " + text.rsplit("\\boxed ", 1)[-1].split("$", 1)[0]
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return text[start : at + 1]
    raise ValueError("the last box is not closed")


def box_content(box: str) -> str:
    r"""What stands in `\boxed{...}` or after `\boxed `; other text, `\fbox{...}` among it, is returned as it is.

    Raises:
        ValueError: the text holds a box but is not one.
    """
    if box.startswith("\\boxed "):
        return box.removeprefix("\\boxed ")
    if "\\boxed{" not in box:
        return box
    if not (box.startswith("\\boxed{") and box.endswith("}")):
        raise ValueError("text around the box")
    return box[len("\\boxed{") : -1]


# ------------------------------------------------------------------------------------------------------- the normaliser


def _brace_fraction_arguments(text: str) -> str:
    r"""`\frac12` to `\frac{1}{2}`; the text unchanged where a macro has a single character after it.

    Raises:
        IndexError: nothing follows a macro.
    """
    head, *tails = text.split("\\frac")
    pieces = [head]
    for tail in tails:
        pieces.append("\\frac")
        if tail[0] == "{":
            pieces.append(tail)
        elif len(tail) < 2:
            return text
        elif tail[1] == "{":
            pieces.append("{" + tail[0] + "}" + tail[1:])
        else:
            pieces.append("{" + tail[0] + "}{" + tail[1] + "}" + tail[2:])
    return "".join(pieces)


def _fraction_from_slash(text: str) -> str:
    r"""`1/2` to `\frac{1}{2}` where both sides are whole numbers in their shortest spelling.

    Raises:
        ValueError: a single slash between other things.
    """
    sides = text.split("/")
    if len(sides) != 2:
        return text
    over, under = int(sides[0]), int(sides[1])
    return f"\\frac{{{over}}}{{{under}}}" if text == f"{over}/{under}" else text


def _without_unit(text: str) -> str:
    r"""Cut a trailing `\text{ unit}`.

    Raises:
        AssertionError: there are two.
    """
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise AssertionError("two units")
    return parts[0]


def _brace_root_arguments(text: str) -> str:
    r"""`\sqrt2` to `\sqrt{2}`.

    Raises:
        IndexError: nothing follows a macro.
    """
    head, *tails = text.split("\\sqrt")
    return head + "".join("\\sqrt" + (tail if tail[0] == "{" else "{" + tail[0] + "}" + tail[1:]) for tail in tails)


_DROPPED_FIRST = (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_DROPPED_NEXT = (("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""))
_DROPPED_LAST = (("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0."))


def normal_form(text: str) -> str:
    """The spelling that d1 compares.

    Raises:
        ValueError, IndexError, AssertionError: on the inputs where the original raises.
    """
    for old, new in (*_DROPPED_FIRST, *_DROPPED_NEXT):
        text = text.replace(old, new)
    text = _without_unit(text)
    for old, new in _DROPPED_LAST:
        text = text.replace(old, new)
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _brace_fraction_arguments(_brace_root_arguments(text).replace(" ", ""))
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _fraction_from_slash(text)


def equal_strings(first: str, second: str) -> bool:
    """Equality of the normal forms, of the raw strings where the normaliser raises."""
    try:
        return normal_form(first) == normal_form(second)
    except (ValueError, IndexError, AssertionError):
        return first == second


# ---------------------------------------------------------------------------------------------------------- the rewards


def _training_answer(text: str) -> str:
    try:
        return box_content(last_box(text))
    except ValueError:
        return text


def evaluation_answer(text: str) -> str | None:
    """What the evaluation takes for the answer: the last box, the first answer pair where the box is empty or open."""
    try:
        answer = box_content(last_box(text))
    except ValueError:
        answer = None
    if not answer:
        block = first_between(text, "<answer>", "</answer>")
        answer = answer if block is None else block.strip()
    return answer


@dataclass(frozen=True)
class D1MathCorrectness:
    """2 where the last box equals the last box of the reference solution."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        answer = _training_answer(text)
        truth = _training_answer(example.get("solution") or example["answer"])
        return Verdict(2.0 if equal_strings(answer, truth) else 0.0, parsed=answer)


@dataclass(frozen=True)
class D1MathFormat:
    """0.75 with an opening answer tag, 0.25 without; 1 and 0.5 only for a box written with a literal backspace."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(lambda text, _: Verdict(self._value(text)), completions, examples)

    @staticmethod
    def _value(text: str) -> float:
        return (0.75 if "<answer>" in text else 0.25) + (0.25 if _UNESCAPED_BOX in text else 0.0)


@dataclass(frozen=True)
class D1MathEvaluation:
    """The paper's evaluation: equality of normalised strings with the bare gold answer."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        answer = evaluation_answer(text)
        if answer is None:
            return Verdict(0.0, "unparsed")
        return Verdict(float(equal_strings(answer, example["answer"])), parsed=answer)
