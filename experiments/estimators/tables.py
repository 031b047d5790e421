"""The measured numbers as Markdown and as a plot."""

from __future__ import annotations

from typing import Any


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(*head), "|" + "---|" * len(head), *(_row(*row) for row in rows)])


def tables_of(results: dict[str, Any], main: str) -> str:
    """All tables as Markdown, the main cell first."""
    cells = results["gradients"]
    parts = ["<!-- written by run.py from results.json -->", f"### {main} (J {cells[main]['J']:.3f}, G 8)\n"]
    rows = []
    ordered = sorted(cells[main]["pairs"].items(), key=lambda item: -item[1]["cosine"])
    for name, m in ordered:
        reached = results["outcome"].get("pairs", {}).get(name)
        rows.append(
            [
                name,
                f"{m['passes']:g}",
                f"{m['cosine']:.3f} ± {m['error']:.3f}",
                f"{m['norm_ratio']:.3f}",
                f"{m['bias']:.2f}",
                f"{m['variance']:.0f}",
                f"{m['alignment']:.2f}",
                "" if reached is None else f"{reached['mean']:.3f} ± {reached['error']:.3f} ({reached['rate']:g})",
            ]
        )
    head = ["pair", "passes", "cosine", "norm ratio", "bias", "variance", "alignment", "J reached (rate)"]
    parts.append(_table(head, rows) + "\n")
    parts.append("### Cosine in every cell\n")
    names = [name for name, _ in ordered]
    columns = list(cells)
    for start in range(0, len(columns), 7):
        some = columns[start : start + 7]
        body = [
            [name, *(f"{cells[c]['pairs'][name]['cosine']:.2f} ± {cells[c]['pairs'][name]['error']:.2f}" for c in some)]
            for name in names
        ]
        parts.append(_table(["pair", *some], body) + "\n")
    if results["jumps"]:
        parts.append("### What the gradient explains of a step\n")
        body = [
            [
                name,
                f"{j['mean_abs_change']:.2e}",
                f"{j['first_order_r2']:.3f}",
                f"{j['integral_r2']:.4f}",
                f"{j['mean_abs_jump']:.1e}",
            ]
            for name, j in results["jumps"].items()
        ]
        head = ["run", "mean change of J", "R2 of gradient x step", "R2 of the gradient along the step", "mean jump"]
        parts.append(_table(head, body) + "\n")
    if "cosine" in results["outcome"]:
        parts.append("### Does it predict the reward reached?\n")
        body = [
            [key, f"{c['spearman']:.2f}", f"{c['low']:.2f} to {c['high']:.2f}", f"{c['p']:.4f}", str(c["pairs"])]
            for key, c in results["outcome"].items()
            if key != "pairs"
        ]
        parts.append(_table(["predictor", "Spearman", "95 %", "permutation p", "pairs"], body) + "\n")
    return "\n".join(parts)


def plot_of(results: dict[str, Any], main: str) -> str:
    """Cosine against the reward reached, one point a pair, as SVG."""
    found, measured = results["outcome"]["pairs"], results["gradients"][main]["pairs"]
    points = [(measured[name]["cosine"], found[name]["mean"], found[name]["error"], name) for name in found]
    titles = ("cosine of the expected update with the exact gradient", "expected reward reached")
    return scatter(points, titles, margin=0.03, digits=2)


def scatter(points: list[tuple[float, float, float, str]], titles: tuple[str, str], margin: float, digits: int) -> str:
    """Named points with a bar of plus and minus their error, as SVG.

    Args:
        points: x, y, error of y, name.
        titles: of the axes.
        margin: room above and below, in the unit of y.
        digits: of the numbers on the y axis.
    """
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1 = min(xs) - 0.05, max(xs) + 0.05
    y0, y1 = min(ys) - margin, max(ys) + margin
    width, height, edge = 820, 520, 60

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            edge + (x - x0) / (x1 - x0) * (width - 2 * edge),
            height - edge - (y - y0) / (y1 - y0) * (height - 2 * edge),
        )

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{edge} {edge}V{height - edge}H{width - edge}" fill="none" stroke="#444"/>',
        f'<text x="{width / 2}" y="{height - 15}" text-anchor="middle">{titles[0]}</text>',
        f'<text x="18" y="{height / 2}" text-anchor="middle" transform="rotate(-90 18 {height / 2})">'
        f"{titles[1]}</text>",
    ]
    for tick in range(6):
        x, y = x0 + (x1 - x0) * tick / 5, y0 + (y1 - y0) * tick / 5
        lines.append(f'<text x="{at(x, y0)[0]:.1f}" y="{height - edge + 16}" text-anchor="middle">{x:.2f}</text>')
        lines.append(f'<text x="{edge - 6}" y="{at(x0, y)[1] + 4:.1f}" text-anchor="end">{y:.{digits}f}</text>')
    for x, y, error, name in points:
        (px, py), (_, low), (_, high) = at(x, y), at(x, y - error), at(x, y + error)
        lines.append(f'<path d="M{px:.1f} {low:.1f}V{high:.1f}" stroke="#2563eb" opacity="0.5"/>')
        lines.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="#2563eb"/>')
        lines.append(f'<text x="{px + 6:.1f}" y="{py - 4:.1f}" fill="#333">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
