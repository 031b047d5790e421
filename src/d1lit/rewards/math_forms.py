r"""One spelling for answers that differ only in form, and exact numbers where an answer is one.

After the rules of Hendrycks et al. (arXiv 2103.03874), made safe and extended: thousands commas, trailing zeros, units
compared instead of cut, spacing macros, `x =` in front, words for separators. All functions expect short texts
(`extract.LONGEST_ANSWER`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from d1lit.rewards.answer_words import hedges_in, is_unit, marks_in, units_in

_SAME = (
    ("\u2212", "-"),
    ("\u03c0", "\\pi "),
    ("\u221e", "\\infty "),
    ("\u222a", "\\cup "),
    ("\u00d7", "\\times "),
    ("\u00b7", "\\cdot "),
    ("\u2264", "\\leq "),
    ("\u2265", "\\geq "),
    ("\u2260", "\\neq "),
    ("\u00b0", ""),
    ("\\degree", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
    ("\\%", ""),
    ("%", ""),
    ("{,}", ","),
    ("\\!", ""),
    ("\\displaystyle", ""),
    ("\\textstyle", ""),
    ("<=", "\\leq "),
    (">=", "\\geq "),
    ("!=", "\\neq "),
)
_PATTERNS = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|bigl|bigr|big|Bigl|Bigr|Big)(?![A-Za-z])\.?", ""),
        (r"(?<!\\)\\(?:,|;|:|quad(?![A-Za-z])|qquad(?![A-Za-z])| )|~", " "),
        (r"\\le(?![A-Za-z])", r"\\leq"),
        (r"\\ge(?![A-Za-z])", r"\\geq"),
        (r"\\ne(?![A-Za-z])", r"\\neq"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\+\\infty", r"\\infty"),
    )
)
_TEXT_MACRO = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|textit|textnormal|textrm|mathbf|operatorname)\s?\{([^{}\\]*)\}(\s*\^\{?[0-9]\}?)?"
)
_CONNECTIVE = re.compile(r"(?<![A-Za-z\\])(?:,\s*)?(?:and|or)(?![A-Za-z])")
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("\\boxed{", "}"), ("{", "}"))
_SYMBOL = r"(?:\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?)"
_ASSIGNMENT = re.compile(
    rf"({_SYMBOL}(?:\({_SYMBOL}\))?|\({_SYMBOL}(?:,{_SYMBOL})+\))(?:=|\\in(?![A-Za-z0-9.+-]))(?=[^=])(.+)"
)
APPLIED = re.compile(r"\\(?:log|ln|lg|exp|sin|cos|tan|cot|sec|csc|arc[a-z]+|sqrt)|d[a-z]$")
"""No name of what is asked for, but something done to it: `\\log x=5`, `dx=5`."""
_TRAILING_WORDS = re.compile(r"([0-9}/)]|\\pi)\.?\s*([A-Za-z]{2,}(?:[.\s/]+[A-Za-z]{2,})*[.\s]*(?:\^\{?[23]\}?)?)$")
_OPERATORS = tuple("-+*/^!<>=|")
_FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "pi sin cos tan sec csc cot log ln exp sqrt frac mod gcd lcm arcsin arccos arctan")
)
_SPACING_AT_THE_END = re.compile(r"(?:(?<!\\)\\(?:[,;:! ]|q?quad)|~|\s)+$")
_GROUPED_BY_SPACES = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:\s[0-9]{3})+(?![0-9])")
_SPACED_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])")
_MIXED = re.compile(r"(-?\s*[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_BRACED_FRACTION = re.compile(r"(?<=[0-9])\{(\\frac\{[0-9]+\}\{[0-9]+\})\}")
_TWO_NUMBERS = re.compile(r"(?<=[0-9])(?<![_^][0-9])\s+(?=[0-9.])")
APART = "\u2423"
"""Stands for the space between two numbers that nothing joins."""
_LEADING_PLUS = re.compile(r"(?<![0-9A-Za-z)}\]!])\+")
_SPACED_THOUSANDS = re.compile(r"(?<=[0-9]),\\[!,]\s*(?=[0-9]{3})")
_DOUBLED_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z])")
_BRACKET = re.compile(r"[(\[]|\\\{")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_FRACTION_ARGUMENTS = re.compile(r"\\frac(?:([0-9A-Za-z])|(\{[^{}]*\}))(?:([0-9A-Za-z])|(\{[^{}]*\}))")
_ROOT_ARGUMENT = re.compile(r"\\sqrt([0-9A-Za-z])")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_SINGLE_BRACED = re.compile(r"([_^])\{([0-9A-Za-z])\}")
_CHOICE = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True)
class Form:
    """An answer in one spelling."""

    text: str
    """Without white space, units, mark-up and `x =`."""
    symbol: str
    """What stood in front of an equals sign, if anything did."""
    units: frozenset[str]
    """Known units that stood there as words and were cut."""
    marks: frozenset[str]
    """Units that stood there as signs (dollar, per cent, degree) and were cut."""
    hedges: frozenset[str]
    """Words that were cut and leave the answer undecided (`not`, `about`, `million`)."""

    @property
    def number(self) -> Fraction | None:
        """The exact number the answer is, where it is one."""
        if self.text.startswith("(") and self.text.endswith(")"):
            return exact_number(self.text[1:-1])
        return exact_number(self.text)


def _unwrapped(text: str) -> str:
    for _ in range(4):
        text = _SPACING_AT_THE_END.sub("", text).strip().rstrip(".,;").strip()
        for opening, closing in _WRAPPINGS:
            inside = text[len(opening) : len(text) - len(closing)]
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                if closing == "}" and not _is_balanced(inside):
                    continue
                if opening == "{" and len(top_level_items(inside)) > 1:
                    continue  # a set
                if closing == "$" and "$" in inside:
                    continue
                text = inside
                break
        else:
            return text
    return text


def _is_balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def _without_text_macros(text: str) -> tuple[str, list[str]]:
    r"""The text with `\text{...}` resolved: connectives to commas, units cut and returned, other words left bare."""
    bare = _TEXT_MACRO.sub("", text)
    has_core = any(char.isalnum() for char in re.sub(r"\\[A-Za-z]+", "", bare)) or "\\pi" in bare
    cut: list[str] = []
    return _TEXT_MACRO.sub(partial(_resolve_text_macro, has_core, cut), text), cut


def _resolve_text_macro(has_core: bool, cut: list[str], match: re.Match[str]) -> str:
    content = match[1].strip()
    if content.strip(" ,.") in ("and", "or"):
        return ","
    called = match[0].startswith("\\operatorname") or match.string[match.end() :].lstrip().startswith(("(", "["))
    if has_core and not called and _is_a_note(content):
        cut.append(content + (match[2] or "").strip())
        return " "
    return f" {content} " + (match[2] or "")


def _is_a_note(content: str) -> bool:
    """Whether a text beside an answer may be cut: a unit or words, no factor (`ab`, `M`) and no digits."""
    if any(char.isdigit() for char in content) or content.startswith(_OPERATORS) or content in ("K", "M", "B", "T"):
        return False
    return bool(units_in([content])) or sum(map(str.isalpha, content)) > 2 or not any(map(str.isalnum, content))


def _is_a_factor(words: str, is_glued: bool) -> bool:
    """Whether letters after a number are variables (`6ab`, `6 ab`): no unit, and glued or two letters."""
    word = words.split("^")[0].strip()
    return word.isalpha() and not is_unit(word) and (is_glued or len(word) < 3)


def _without_trailing_words(text: str) -> tuple[str, str]:
    """`12 square inches` to `12` and the words; names of functions are no units."""
    match = _TRAILING_WORDS.search(text)
    if not match or any(word.strip(".").lower() in _FUNCTION_WORDS for word in match[2].split("^")[0].split()):
        return text, ""
    if _is_a_factor(match[2], match.end(1) == match.start(2)):
        return text, ""
    return text[: match.end(1)], match[2]


def _plain_decimal(match: re.Match[str]) -> str:
    whole, part = match[1].lstrip("0") or "0", match[2].rstrip("0")
    return f"{whole}.{part}" if part else whole


def _without_loose_spaces(text: str) -> str:
    """White space gone, where it joins nothing: `1 200` is a number, `3 1/2` a mixed one, `1 2` neither."""
    mixed = _MIXED.fullmatch(text)
    if mixed:
        text = f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = _SPACED_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _GROUPED_BY_SPACES.sub(lambda match: re.sub(r"\s", "", match[0]), text)
    return re.sub(r"\s+", "", _TWO_NUMBERS.sub(APART, text))


def _without_plus_minus(text: str) -> str:
    r"""`3\pm2` as the two values it stands for, where it is the whole answer."""
    if text.count("\\pm") != 1 or len(top_level_items(text)) > 1 or _BRACKET.match(text):
        return text
    return ",".join(_LEADING_PLUS.sub("", re.sub(r"\\pm(?![A-Za-z])", sign, text)) for sign in "+-")


def normalised(answer: str) -> Form:
    """The one spelling of an answer."""
    text = _unwrapped(_SPACED_THOUSANDS.sub(",", answer))
    if "\\begin" not in text:
        text = _DOUBLED_BACKSLASH.sub(r"\\", text)
    marks = marks_in(text)
    for old, new in _SAME:
        text = text.replace(old, new)
    for pattern, new in _PATTERNS:
        text = pattern.sub(new, text)
    text = text.replace("$", "")
    if not _BRACKET.search(text):  # "(12,102)" is a pair
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text, cut = _without_text_macros(text)
    if re.search(r"[0-9)}\]]", text) or "=" in text:
        text = _CONNECTIVE.sub(",", text)
    text, words = _without_trailing_words(text.strip().rstrip(".,;").strip())
    text = _without_loose_spaces(re.sub(r",\s*,", ",", text).strip()).rstrip(".,;")
    assignment = _ASSIGNMENT.fullmatch(text)
    symbol = ""
    if assignment and "=" not in assignment[2] and not APPLIED.match(assignment[1]):
        symbol, text = assignment[1], assignment[2]
    text = _without_plus_minus(_spelled(text))
    choice = _CHOICE.fullmatch(text)
    cut.append(words)
    return Form(choice[1] if choice else text, symbol, units_in(cut), marks, hedges_in(cut))


def _spelled(text: str) -> str:
    """One spelling of decimals, fractions, roots and indices."""
    text = _DECIMAL.sub(_plain_decimal, text)
    text = _FRACTION_ARGUMENTS.sub(
        lambda match: f"\\frac{match[2] or '{' + match[1] + '}'}{match[4] or '{' + match[3] + '}'}", text
    )
    text = _BRACED_FRACTION.sub(r"\1", text)
    text = _ROOT_ARGUMENT.sub(r"\\sqrt{\1}", text)
    slash = _SLASH.fullmatch(text)
    if slash:
        text = f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}"
    return _SINGLE_BRACED.sub(r"\1\2", text)


_INTEGER = re.compile(r"[+-]?[0-9]{1,60}")
_PLAIN = re.compile(r"[+-]?[0-9]{1,60}(?:\.[0-9]{1,60})?")
_RATIO = re.compile(r"([+-]?)([0-9]{0,60})\\frac\{([+-]?[0-9.]{1,60})\}\{([+-]?[0-9.]{1,60})\}")
_SCIENTIFIC = re.compile(r"([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?)(?:\\times|\\cdot)10\^\{?(-?[0-9]{1,2})\}?")


def exact_number(text: str) -> Fraction | None:
    """The number a normalised text is: whole, decimal, fraction, mixed number or scientific; None for anything else."""
    if not text.isascii():
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific:
        return Fraction(scientific[1]) * Fraction(10) ** int(scientific[2])
    ratio = _RATIO.fullmatch(text)
    if not ratio or not (_PLAIN.fullmatch(ratio[3]) and _PLAIN.fullmatch(ratio[4])) or Fraction(ratio[4]) == 0:
        return None
    part = Fraction(ratio[3]) / Fraction(ratio[4])
    if ratio[2] and not 0 < part < 1:
        return None  # 3 7/2 is a product or a slip, not a mixed number
    value = Fraction(ratio[2] or 0) + part
    return -value if ratio[1] == "-" else value


def top_level_items(text: str) -> list[str]:
    """The parts of a text between commas (or semicolons) that stand in no bracket."""
    items, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char in ",;" and depth == 0:
            items.append(text[start:at])
            start = at + 1
    return [*items, text[start:]]
