"""Line charts as SVG: drawn once, in plain numbers, coloured by the page's style."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d1lit.report.markup import Markup, tag

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34
MOST_POINTS = 240
NUM_COLOURS = 8

Number = float | int
Points = Sequence[tuple[Number, Number]]
Place = Callable[[Number, Number], tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named line."""

    label: str
    points: Points
    colour: int
    """Place in the page's palette; lines that belong together share one."""


def chart(title: str, series: Sequence[Series], x_label: str = "update", smooth: bool = True) -> Markup | None:
    """A figure with one line a series, smoothed over its raw points; None where there is nothing to draw."""
    drawn = [Series(s.label, finite(s.points), s.colour) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return None
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    # Updates are counted: no ticks between them.
    whole = all(float(x).is_integer() for x in xs)
    x_ticks, y_ticks = (
        ticks(min(xs), max(xs), min(5, max(1, int(max(xs) - min(xs)))) if whole else 5),
        ticks(min(ys), max(ys), 5),
    )
    x_range, y_range = (min(xs), max(max(xs), min(xs) + 1e-9)), (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))

    def place(x: Number, y: Number) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    grid = [_y_tick(y, place(x_range[0], y)[1]) for y in y_ticks]
    grid += [_x_tick(x, place(x, y_range[0])[0]) for x in x_ticks if x_range[0] <= x <= x_range[1]]
    lines = [line for s in drawn for line in _lines(s, place, smooth)]
    name = tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 3, class_="axis", text_anchor="end")
    cross = tag("line", class_="cross", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden")
    svg = tag(
        "svg", *grid, *lines, name, cross, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", tabindex="0",
        aria_label=_words(title, drawn),
    )  # fmt: skip
    data = [{"label": s.label, "points": [[_short(x), _short(y)] for x, y in thinned(s.points)]} for s in drawn]
    legend = [tag("li", tag("span", class_=f"key s{s.colour % NUM_COLOURS}"), s.label) for s in _one_a_label(drawn)]
    return tag(
        "figure",
        tag("figcaption", title),
        svg,
        tag("ul", *legend, class_="legend") if len(legend) > 1 else None,
        tag("p", Markup("&nbsp;"), class_="readout", aria_live="polite"),
        class_="chart",
        data_series=json.dumps(data),
        data_range=f"{_short(x_range[0])},{_short(x_range[1])}",
        data_x=x_label,
    )


def finite(points: Points) -> list[tuple[float, float]]:
    """Points that can be drawn."""
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: neighbours are averaged."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Points, share: float = 0.08) -> list[tuple[float, float]]:
    """Centred moving mean over a share of the line; shorter at both ends, so that no end is invented."""
    reach = round(len(points) * share / 2)
    found = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = points[i - near : i + near + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


def ticks(low: Number, high: Number, count: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high - low <= 1e-12 * max(1.0, abs(low)):  # one number, as far as a picture can tell
        is_zero = abs(low) < 1e-300  # a range this small would have no logarithm
        low, high = (0.0, 1.0) if is_zero else (min(0.0, 2 * low), max(0.0, 2 * low))
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _lines(series: Series, place: Place, smooth: bool) -> list[Markup]:
    points = thinned(series.points)
    colour = f"s{series.colour % NUM_COLOURS}"
    if len(points) < 3 or not smooth:
        dots = [
            tag("circle", cx=_short(place(*p)[0]), cy=_short(place(*p)[1]), r=3, class_=f"dot {colour}") for p in points
        ]
        return [*dots, _polyline(points, place, f"line {colour}")]
    return [_polyline(points, place, f"raw {colour}"), _polyline(smoothed(points), place, f"line {colour}")]


def _polyline(points: Points, place: Place, name: str) -> Markup:
    return tag("polyline", points=" ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points), class_=name)


def _y_tick(value: Number, y: Number) -> Markup:
    line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_short(y), y2=_short(y), class_="grid")
    return Markup(line + tag("text", _label(value), x=LEFT - 6, y=_short(y + 4), class_="axis", text_anchor="end"))


def _x_tick(value: Number, x: Number) -> Markup:
    return tag("text", _label(value), x=_short(x), y=HEIGHT - BOTTOM + 16, class_="axis", text_anchor="middle")


def _label(value: Number) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.6g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _short(value: Number) -> str:
    return f"{value:.5g}"


def _one_a_label(series: Sequence[Series]) -> list[Series]:
    return list({s.label: s for s in reversed(series)}.values())[::-1]


def _words(title: str, series: Sequence[Series]) -> str:
    """The chart for those who do not see it."""
    said = []
    for s in series[:8]:
        (x0, y0), (x1, y1) = s.points[0], s.points[-1]
        low, high = min(y for _, y in s.points), max(y for _, y in s.points)
        said.append(f"{s.label}: {y0:.3g} at {x0:g}, {y1:.3g} at {x1:g}, lowest {low:.3g}, highest {high:.3g}")
    return f"{title}. " + "; ".join(said)


def whisker(value: Number, low: Number, high: Number) -> Markup:
    """A share between 0 and 1 with its interval, drawn small."""
    width, height = 120, 16

    def x(share: Number) -> str:
        return f"{4 + min(1.0, max(0.0, share)) * (width - 8):.1f}"

    axis = tag("line", x1=x(0), x2=x(1), y1=8, y2=8, class_="grid")
    line = tag("line", x1=x(low), x2=x(high), y1=8, y2=8, class_="whisker")
    dot = tag("circle", cx=x(value), cy=8, r=4, class_="dot s0")
    return tag("svg", axis, line, dot, viewBox=f"0 0 {width} {height}", class_="whiskers", aria_hidden="true")
