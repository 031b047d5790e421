"""Words around an answer: units, which may be left out but not contradict, and hedges, which leave it undecided."""

from __future__ import annotations

import re
from collections.abc import Iterable

HEDGES = frozenset(
    re.findall(
        r"[\w']+",
        "not no nor neither or isn't wasn't never about approximately roughly around almost nearly circa between "
        "either maybe perhaps probably possibly likely guess than least most under over below above cannot can't "
        "unknown wrong incorrect false except but if unless ish plus minus negative times dozen thousand million "
        "billion trillion hundred half twice double triple quadruple squared cubed and to through ",
    )
)
"""Words that deny, widen or multiply a number beside which they stand."""

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
        "radian": "radian radians",
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


def hedges_in(words: Iterable[str]) -> frozenset[str]:
    """The words that leave an answer undecided."""
    found = (word for text in words for word in re.findall(r"[a-z']+", text.lower()))
    return frozenset(word for word in found if word in HEDGES or word.endswith("n't"))
