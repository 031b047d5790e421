r"""MATH, strictly: exact match, then one spelling, then exact numbers, and only then math-verify.

A gold answer that is a number is only met by a number: `2^3` or `4+4` for 8 leaves the work undone and would let a
policy copy the question. So symbolic equality is asked only for symbolic gold answers, after guards that keep lists and
copies of the question out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d1lit.rewards.arithmetic import Refused, TooMuch, python_value
from d1lit.rewards.extract import LONGEST_ANSWER, final_answer
from d1lit.rewards.math_forms import APART, APPLIED, Form, normalised, top_level_items
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

_WORDS = re.compile(r"[A-Za-z]+")
_BASE = re.compile(r"([0-9A-Z]+)_\{?[0-9]+\}?")
_CLOCK = re.compile(r"[0-9.]+(?::[0-9.]+)+")
_RELATION = re.compile(r"[<>]|\\[lg]eq")
_OPERATION = re.compile(r"[+*/^]|-|\\(?:frac|sqrt|times|cdot|div|pm)|[0-9A-Za-z)}]\(")
_LAYOUT = re.compile(r"[\s$]|\\(?:left|right|!|,)")
_LONG_NUMERAL = re.compile(r"[0-9](?:\.?[0-9]){7}")
_POWERS = re.compile(r"[0-9+\-*^{}()]+")
_CHANGED = re.compile(
    r"\\(?:not|neg|lnot|cancel|[lc]?dots|prime|overline|bar|approx|int|sum|prod|lim|max|min|gcd|lcm|det|[bp]?mod)(?![A-Za-z])"
    r"|\\frac\{d\}|vmatrix|…|['\"]|\^\{?T|(?<=[0-9])_"
)
"""What denies, changes or leaves open an answer, math-verify passes over, or is work still to be done."""
_DANGLING = re.compile(r"(?<![A-Za-z])(?:and|or)[^A-Za-z0-9]*$")
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?(?:\([A-Za-z]\))?")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FRACTION_SIZE = re.compile(r"\\[dt]frac")
_BRACKETS = ("()", "[]", "(]", "[)")
_POWER_TOWER = re.compile(r"(?:\^|\*\*)\{?-?[0-9]+(?:\^|\*\*)|(?:\^|\*\*)\{?-?[0-9]{4,}|[0-9]{60,}|!{2,}|[0-9]{4,}!")
"""Beyond these math-verify may not return; the worker would be killed, so it is spared the attempt."""


def same_form(gold: Form, answer: Form) -> bool:
    """Whether two answers are one spelling, with units and names that do not contradict each other."""
    return gold.text == answer.text and _compatible(gold, answer)


def _compatible(gold: Form, answer: Form) -> bool:
    """Whether units, names and hedges allow two answers to be the same."""
    if gold.hedges != answer.hedges or (gold.symbol and answer.symbol and gold.symbol != answer.symbol):
        return False
    if gold.units and answer.units and gold.units != answer.units:
        return False
    sides = (gold.units | gold.marks, answer.units | answer.marks)
    if not all(sides):
        return True  # units may be left out
    return gold.marks <= sides[1] and answer.marks <= sides[0]


def _items(text: str) -> tuple[str, list[str]]:
    """The kind of a list (its brackets; "" for a bare one) and its items."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "", top_level_items(text[2:-2])
    if text.startswith("{") and text.endswith("}"):
        return "", top_level_items(text[1:-1])
    bare = top_level_items(text)
    if len(bare) == 1 and len(text) > 2 and text[0] + text[-1] in _BRACKETS:
        inside = top_level_items(text[1:-1])
        if len(inside) > 1:
            return text[0] + text[-1], inside
    return "", bare


Pairs = list[tuple[str, str]]
"""Expressions that algebra has to find equal, every one."""


def decide(gold: Form, answer: Form) -> bool | Pairs:
    """What can be said without algebra, or what algebra has to decide."""
    if not _compatible(gold, answer):
        return False
    if gold.text == answer.text:
        return True
    gold_number, number = gold.number, answer.number
    if gold_number is not None or number is not None:
        return (_power_value(gold.text) if gold_number is None else gold_number) == number
    if _WORDS.fullmatch(gold.text):
        return len(gold.text) > 1 and gold.text.lower() == answer.text.lower()
    if _BASE.fullmatch(gold.text) or _CLOCK.fullmatch(gold.text) or not answer.text or APART in answer.text:
        return False
    if _LONG_NUMERAL.search(answer.text) and not _LONG_NUMERAL.search(gold.text):
        return False  # many digits that come near a root or pi
    if "=" in answer.text and "=" not in gold.text and not gold.symbol and _is_unsolved(answer.text):
        return False
    if _RELATION.search(gold.text) and not _RELATION.search(answer.text):
        # An interval may say what a chain of inequalities says.
        return _whole(gold, answer) if answer.text[0] in "([" and answer.text[-1] in ")]" else False
    gold_kind, gold_items = _items(gold.text)
    kind, items = _items(answer.text)
    if len(gold_items) != len(items) or (len(items) > 1 and gold_kind != kind):
        return False
    verdict = _decide_items(gold_items, items, ordered=bool(kind)) if len(items) > 1 else None
    return _whole(gold, answer) if verdict is None else verdict


def _is_unsolved(text: str) -> bool:
    """Whether an equation has more on its left than a name, and a variable in it: `x^2=3`, `1/x=3`."""
    left = text.split("=", 1)[0]
    if APPLIED.match(left):
        return True
    return not _NAME.fullmatch(left) and any(map(str.isalpha, _COMMAND.sub("", left)))


def _whole(gold: Form, answer: Form) -> Pairs:
    """The two answers as they are; where only one side kept its equals sign, the other's `y =` is part of it."""
    left = f"{gold.symbol}={gold.text}" if gold.symbol and "=" in answer.text else gold.text
    right = f"{answer.symbol}={answer.text}" if answer.symbol and "=" in gold.text else answer.text
    return [(left, right)]


def _power_value(text: str) -> int | None:
    """The whole number that sums and products of powers are (`2^{27}-2^{11}`), where it can be had exactly."""
    if not _POWERS.fullmatch(text):
        return None
    try:
        value = python_value(text.replace("^", "**").replace("{", "(").replace("}", ")"))
    except (Refused, TooMuch):
        return None
    return value if isinstance(value, int) else None


def _decide_items(gold: list[str], items: list[str], ordered: bool) -> bool | Pairs | None:
    """Lists item by item; bare lists (the roots of an equation) in any order, repeated items as often as in gold."""
    gold_names, gold_keys = _named(gold)
    names, keys = _named(items)
    if names and not gold_names and len(set(names)) > 1:
        return False
    if len(set(gold_names)) > 1:  # `a=1,b=2`: names, or else their order, say which value is whose
        named, asked = dict(zip(gold_names, gold_keys, strict=True)), dict(zip(names or gold_names, keys, strict=True))
        if len(named) < len(gold) or named.keys() != asked.keys():
            return False
        open_pairs = [(named[name], asked[name]) for name in gold_names if named[name] != asked[name]]
        return False if any("=" in pair[0][:1] + pair[1][:1] for pair in open_pairs) else open_pairs or True
    if names and gold_names and names != gold_names:
        return False
    if not ordered:
        gold_keys, keys = sorted(gold_keys), sorted(keys)
    if gold_keys == keys:
        return True
    all_numbers = all(key.startswith("=") for key in (*gold_keys, *keys))
    return False if all_numbers else None


def _named(items: list[str]) -> tuple[list[str], list[str]]:
    """The names that stand before an equals sign in every item (none where one has none), and a key for each value."""
    forms = [normalised(item) for item in items]
    names = [form.symbol for form in forms]
    return names if all(names) else [], [form.text if form.number is None else f"={form.number}" for form in forms]


def _changes(form: Form, answer: str) -> set[str]:
    """The marks of an answer that deny it, change it or leave it open."""
    dangling = _DANGLING.search(answer)
    return {
        *_CHANGED.findall(form.text + form.symbol),
        *re.findall(r"\.{3}", answer),
        *([dangling[0]] if dangling else []),
    }


def _in_other_case(answer: str, gold: str) -> bool:
    """Whether the answer writes X where gold has x: another variable, which math-verify takes for the same."""
    asked, known = (set(filter(str.isalpha, _COMMAND.sub("", text))) for text in (answer, gold))
    return any(letter.swapcase() in known for letter in asked - known)


def is_copied(answer: Form, gold: Form, question: str) -> bool:
    """Whether an answer that still holds operations stands in the question, word for word, and the gold answer not."""
    if not _OPERATION.search(answer.text) or len(answer.text) < 3:
        return False
    asked = _FRACTION_SIZE.sub(r"\\frac", _LAYOUT.sub("", question))
    return answer.text in asked and gold.text not in asked


@dataclass(frozen=True)
class MathAnswer:
    """1 where the final answer equals the gold answer, else 0.

    Args:
        equivalence: judges a (gold, answer) pair of expressions where spelling and numbers do not decide.
    """

    equivalence: Callable[[str, str], Verdict]

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        answer = final_answer(text)
        if not example["answer"].strip():
            return Verdict(0.0, "error", answer)  # a row without a gold answer cannot be judged
        if answer is None:
            return Verdict(0.0, "unparsed")
        return self.compare(example["answer"], answer, example.get("question", ""))

    def compare(self, gold: str, answer: str, question: str = "") -> Verdict:
        """The verdict on an answer that is already extracted."""
        if " ".join(gold.split()) == " ".join(answer.split()):
            return Verdict(1.0, parsed=answer)
        if len(answer) > LONGEST_ANSWER:
            return Verdict(0.0, "refused", answer)
        gold_form, form = normalised(gold), normalised(answer)
        if _changes(form, answer) - _changes(gold_form, gold):
            return Verdict(0.0, parsed=answer)
        decided = decide(gold_form, form)
        if isinstance(decided, bool):
            return Verdict(float(decided), parsed=answer)
        if is_copied(form, gold_form, question) or _in_other_case(form.text, gold_form.text):
            return Verdict(0.0, parsed=answer)
        if _POWER_TOWER.search(form.text):
            return Verdict(0.0, "refused", answer)
        for pair in decided:
            verdict = self.equivalence(*pair)
            if verdict.value != 1.0:
                return Verdict(verdict.value, verdict.outcome, answer)
        return Verdict(1.0, parsed=answer)
