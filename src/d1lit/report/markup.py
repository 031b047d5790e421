"""HTML by functions: whatever is not markup already is escaped, so no text of a model can become part of the page."""

from __future__ import annotations

import html
import re
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_VOID = frozenset({"br", "input", "meta", "line", "circle", "polyline", "rect", "path", "polygon"})


def visible(text: str) -> str:
    """The text with everything that a page cannot hold, or that would reorder it, shown as a sign instead."""
    text = _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n"))
    text = _CONTROLS.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 0x20 else f"[U+{ord(m[0]):04X}]", text)
    return _DIRECTIONS.sub(lambda m: f"[U+{ord(m[0]):04X}]", text)


def text(value: Any) -> Markup:
    """Any value as text of a page; markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(visible(str(value))))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; `class_` loses its underscore, others become hyphens; attributes of None and False are left out."""
    words = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in _VOID:
        assert not children
        return Markup(f"<{name}{words}>") if name in ("br", "input", "meta") else Markup(f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{join(*children)}</{name}>")


def _attribute(key: str, value: Any) -> str:
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{html.escape(visible(str(value)))}"'


def join(*children: Any) -> Markup:
    """Children one after another; None is left out, lists are taken apart."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(text(child))
    return Markup("".join(parts))


def table(
    columns: tuple[str, ...] | list[str], rows: list[Any] | tuple[Any, ...], caption: str | None = None
) -> Markup:
    """A table that scrolls sideways where it is wider than the page; the first cell of a row is its heading."""
    numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
    head = tag(
        "tr", *(tag("th", c, scope="col", class_="n" if n else None) for c, n in zip(columns, numeric, strict=True))
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_="n" if n else None) for cell, n in zip(row[1:], numeric[1:], strict=True)),
        )
        for row in rows
    ]
    title = tag("caption", caption) if caption else None
    inner = tag("table", title, tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption or ", ".join(columns[:4]))


def _is_number(cell: Any) -> bool:
    """Whether a cell stands in a column of numbers: it begins like one, or is empty."""
    return not isinstance(cell, Markup) and re.match(r"([-+−<]?\s?\d|$)", str(cell)) is not None
