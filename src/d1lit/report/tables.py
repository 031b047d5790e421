"""One table, many clothes: console, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from d1lit.report.comparing import CURVES, Cell, Pair
from d1lit.report.runs import Run, differing_settings, variants
from d1lit.statistics import Interval


@dataclass(frozen=True)
class Table:
    """Cells as text, with a title above and a note below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def percent(value: float | int) -> str:
    """A share as per cent with one decimal."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def percent_interval(interval: Interval) -> str:
    """`low to high` in per cent; shares end at 0 and 100."""
    if math.isinf(interval.low):
        return "unknown"
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def number(value: float | int | None) -> str:
    """A number with three digits that count."""
    return "" if value is None else f"{0.0 if abs(value) < 1e-7 else value:.3g}"


def p_text(value: float | int) -> str:
    """A p-value; very small ones as a bound."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def results_table(cells: Sequence[Cell]) -> Table:
    """Accuracy of every recipe and stage."""
    lengths = len({cell.length for cell in cells}) > 1
    splits = len({cell.split for cell in cells}) > 1
    shown = [tag for tag in CURVES if any(tag in cell.curves for cell in cells)]
    head = ("task", "model", "recipe", "stage", *(["length"] if lengths else []), *(["split"] if splits else []))
    extra = sorted({name for cell in cells for name in cell.extra})
    asked = list(dict.fromkeys(name for cell in cells for name in cell.probes))
    columns = (*head, "accuracy", "95 % interval", "over", *(name.replace("_", " ") for name in extra), *asked)
    flops = any(cell.flops is not None for cell in cells)
    columns += ("tokens", "truncated", *(CURVE_NAMES[tag] for tag in shown), "s", *(["FLOPs"] if flops else []))
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell.task, cell.model)):
        more = [str(cell.length)] * lengths + [str(cell.split)] * splits
        curves = [number(cell.curves.get(tag)) for tag in shown]
        measured = [percent(cell.extra.get(name, math.nan)) for name in extra]
        measured += [percent(cell.probes.get(name, math.nan)) for name in asked]
        rows.append(
            (
                *(cell.task, cell.model, cell.recipe, cell.stage, *more),
                *(percent(cell.accuracy.value), percent_interval(cell.accuracy), cell.over, *measured),
                *("" if math.isnan(cell.tokens) else f"{cell.tokens:.1f}", percent(cell.truncated), *curves),
                *(number(cell.seconds), *([number(cell.flops)] if flops else [])),
            )
        )
    note = "Accuracy in per cent. Interval: Student's t over seeds, Wilson's over rows for a single seed. s: seconds."
    if asked:
        note += " pass@k and forced words: per cent, the latter being put in the model's mouth."
    if shown:
        note += " Curves: mean of the last tenth of the stage's updates."
    return Table("Accuracy", columns, tuple(rows), note)


CURVE_NAMES = {
    "rollout/reward": "reward",
    "train/kl": "KL",
    "rollout/length": "rollout length",
    "rollout/zero_std_fraction": "zero variance",
}


def pairs_table(pairs: Sequence[Pair]) -> Table:
    """Differences between recipes on the same rows."""
    rows = tuple(
        (
            pair.task,
            f"{pair.second} − {pair.first}",
            f"{100 * pair.difference.value:+.1f}",
            percent_interval(pair.difference),
            f"{pair.rows} rows × {pair.seeds}",
            f"{pair.wins} / {pair.losses}",
            p_text(pair.p_value),
            p_text(pair.p_holm),
            "" if pair.over_seeds is None else percent_interval(pair.over_seeds),
        )
        for pair in pairs
    )
    columns = ("task", "difference of", "points", "95 % interval", "on", "wins / losses", "p", "p (Holm)", "over seeds")
    note = (
        "Final models on the rows that both answered. Interval: paired bootstrap over rows. p: exact McNemar test "
        "(over several seeds: exact sign test on each row's mean). Holm: corrected for the number of pairs. "
        "Over seeds: Student's t interval of the differences between runs of equal seed."
    )
    return Table("Paired differences", columns, rows, note)


def differences_table(runs: Sequence[Run]) -> Table:
    """What differs between the configurations of the recipes."""
    groups = variants(runs)
    found = differing_settings([group[0] for _, group in groups])
    rows = tuple((key, *(_short(value) for value in values)) for key, values in found)
    return Table("What differs", ("key", *(name for name, _ in groups)), rows, "Seeds and folders aside.")


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -------------------------------------------------------------------------------------------------------------- clothes


def as_rich(table: Table) -> RichTable:
    """For the console; no cell is read as markup."""
    shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
    numeric = _numeric_columns(table)
    for place, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="right" if place in numeric else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _numeric_columns(table: Table) -> set[int]:
    """Columns whose every cell begins like a number."""
    starts = "0123456789+-−<"
    return {
        place
        for place in range(len(table.columns))
        if any(row[place] for row in table.rows)
        and all(not row[place] or row[place][0] in starts for row in table.rows)
    }


def as_markdown(table: Table) -> str:
    """A pipe table with its title and note."""
    numeric = _numeric_columns(table)
    lines = [f"**{table.title}**", "", _pipes(table.columns)]
    lines.append("|" + "|".join("---:" if i in numeric else "---" for i in range(len(table.columns))) + "|")
    lines += [_pipes(row) for row in table.rows]
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def _pipes(cells: Sequence[str]) -> str:
    clean = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return "| " + " | ".join(clean) + " |"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "×": r"$\times$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def as_latex(table: Table) -> str:
    """A booktabs table."""
    numeric = _numeric_columns(table)
    spec = "".join("r" if i in numeric else "l" for i in range(len(table.columns)))
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.title)}. {_tex(table.note)}}}"]
    lines += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", _ampersands(table.columns), r"\midrule"]
    lines += [_ampersands(row) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def as_csv(cells: Sequence[Cell]) -> str:
    """The results with all their digits, one line a cell, shares as fractions."""
    fields = ["task", "model", "recipe", "stage", "split", "length", "seeds", "rows", "accuracy", "low", "high", "over"]
    fields += ["accuracies", "tokens", "truncated", "extra", "probes", *CURVES, "seconds", "flops"]
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        writer.writerow(_record(cell))
    return out.getvalue()


def _record(cell: Cell) -> Mapping[str, Any]:
    same = (
        "task",
        "model",
        "recipe",
        "stage",
        "split",
        "length",
        "rows",
        "over",
        "tokens",
        "truncated",
        "seconds",
        "flops",
    )
    return {name: getattr(cell, name) for name in same} | {
        "seeds": " ".join(map(str, cell.seeds)),
        "accuracies": " ".join(map(repr, cell.accuracies)),
        "accuracy": cell.accuracy.value,
        "low": cell.accuracy.low,
        "high": cell.accuracy.high,
        "extra": " ".join(f"{name}={value!r}" for name, value in cell.extra.items()),
        "probes": " ".join(f"{name.replace(' ', ':')}={value!r}" for name, value in cell.probes.items()),
        **{tag: cell.curves.get(tag, "") for tag in CURVES},
    }
