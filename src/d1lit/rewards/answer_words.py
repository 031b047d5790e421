"""Words around an answer: units, which may be left out but not contradict, and hedges, which leave it undecided."""

from __future__ import annotations

import re
from collections.abc import Iterable

HEDGES = frozenset(
    re.findall(
        r"[\w']+",
        # denied or left open
        "not no nor neither never or isn't wasn't none nope either between maybe perhaps probably possibly likely "
        "hopefully guess think suppose unknown wrong wrongly incorrect incorrectly mistake mistaken false fake "
        "untrue error invalid except but if unless instead rather excluding without versus vs opposite "
        # widened
        "about approximately approx appx roughly around almost nearly near nearby circa ca est estimated within "
        "ish than least most under over below above beyond upward upwards exceed exceeds exceeding max maximum "
        "minimum cannot can't to through and "
        # operations still to be done
        "plus minus negative neg negated times divided multiplied raised squared cubed factorial root sqrt cbrt "
        "log ln sin cos tan cot csc exp arg abs gcd lcm mod modulo reciprocal inverse complement successor "
        "predecessor logarithm sine cosine tangent pi twice thrice double doubled triple tripled quadruple "
        "quadrupled halved "
        # other numbers and multiples
        "hundred hundreds thousand thousands million millions billion billions trillion trillions quadrillion "
        "quadrillions quintillion quintillions zillion gazillion myriad lakh lakhs crore crores cr mil mill mn bn "
        "tn trn kilo mega giga milli micro dozen dozens doz dz tens gross grand hex hexadecimal octal binary ppm "
        "fold tenfold twofold threefold fourfold half halves quarter third thirds fourth fourths fifth fifths "
        "sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth "
        "thousandths millionth millionths zero two three four five six seven eight nine ten eleven twelve thirteen "
        "fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
        "ninety",
    )
)
"""Words that deny, widen, multiply or change a number beside which they stand, and numbers spelled out."""

_UNITS = {
    name: canonical
    for canonical, names in {
        "inch": "inch inches in",
        "foot": "foot feet ft",
        "yard": "yard yards yd",
        "mile": "mile miles mi",
        "mm": "mm millimeter millimeters",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "ml": "ml milliliter milliliters",
        "l": "l liter liters litre litres",
        "pound": "pound pounds lb lbs",
        "ounce": "ounce ounces oz",
        "second": "second seconds sec s",
        "minute": "minute minutes min",
        "hour": "hour hours hr hrs h",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years",
        "mile hour": "mph",
        "cent": "cent cents",
        "dollar": "dollar dollars",
        "percent": "percent",
        "euro": "euro euros",
        "radian": "radian radians rad rads",
        "gradian": "gradian gradians grad",
        "degree": "degree degrees",
        "am": "am a.m",
        "pm": "pm p.m",
    }.items()
    for name in names.split()
}
_MARKS = {
    "\\$": "dollar",
    "\\%": "percent",
    "%": "percent",
    "\u00b0": "degree",
    "\\circ": "degree",
    "\\degree": "degree",
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_WORD = re.compile(r"([A-Za-z][A-Za-z.]*)(?:\^\{?([0-9])\}?)?")


def units_in(words: Iterable[str]) -> frozenset[str]:
    """The known units that words name, each with its power: `square cm` and `cm^2` are one."""
    found: set[str] = set()
    for text in words:
        power, named = 1, _WORD.findall(text.lower())
        for place, (word, exponent) in enumerate(named, start=1):
            name = word.rstrip(".")
            power = _POWERS.get(name, power)
            if name in _UNITS and (name != "in" or place == len(named)):  # `in total` is no inch
                power = int(exponent) if exponent else power
                found.update(unit if power == 1 else f"{unit}^{power}" for unit in _UNITS[name].split())
                power = 1
    return frozenset(found)


def marks_in(text: str) -> frozenset[str]:
    """The units that signs stand for: dollar, per cent, degree."""
    return frozenset(unit for mark, unit in _MARKS.items() if mark in text)


def is_unit(word: str) -> bool:
    """Whether a word is a known unit."""
    return word.lower().rstrip(".") in _UNITS


def hedges_in(words: Iterable[str]) -> frozenset[str]:
    """The words that leave an answer undecided."""
    found = (word for text in words for word in re.findall(r"[a-z']+", text.lower()))
    return frozenset(word for word in found if word in HEDGES or word.endswith("n't"))
