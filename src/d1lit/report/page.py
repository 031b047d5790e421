"""One self-contained page: no server, no network, no file beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from d1lit.report.comparing import Cell, compare, compare_pairs, final_entry, scores_by_row, shared_tasks
from d1lit.report.curves import Series, chart, whisker
from d1lit.report.markup import Markup, join, table, tag
from d1lit.report.player import player
from d1lit.report.recording import Recording
from d1lit.report.runs import Run, variants
from d1lit.report.sections import (
    CHARTS,
    FLOPS,
    SPENDING,
    accuracy_by_flops,
    accuracy_section,
    by_spending,
    changes,
    cost_section,
    curves_section,
    player_section,
    repeat_section,
    rows_section,
    samples_section,
    section,
)
from d1lit.report.tables import Table, differences_table, p_text, pairs_table, percent, percent_interval, results_table
from d1lit.statistics import Interval, mcnemar_exact

SCRIPTS = ("page.js", "player.js")


def document(title: str, lead: str, sections: Sequence[Markup | None]) -> str:
    """The page around its sections; its own policy forbids every request, and every script but the one it brings."""
    home = files("d1lit.report")
    style = home.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(home.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    kept = [part for part in sections if part is not None]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        Markup(f"<style>{style}</style>"),
    )
    links = [tag("li", tag("a", heading, href=f"#{identity}")) for identity, heading in map(_heading, kept)]
    body = tag(
        "body",
        tag("a", "Skip to the contents", href="#main", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            tag("p", lead, class_="lead"),
            tag("nav", tag("ul", *links), aria_label="Contents"),
        ),
        tag("main", *kept, id="main"),
        Markup(f"<script>{script}</script>"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _heading(part: Markup) -> tuple[str, Markup]:
    """The id and the heading of a section."""
    identity = part.split(' id="', 1)[1].split('"', 1)[0]
    return identity, Markup(part.split("<h2>", 1)[1].split("</h2>", 1)[0])


def write_page(file: Path, page: str) -> Path:
    """Write a page in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.tmp")
    staging.write_text(page, encoding="utf-8")
    staging.replace(file)
    return file


def player_page(title: str, recordings: Sequence[Recording]) -> str:
    """A page with nothing but the player."""
    return document(
        title, "How completions came to be, step by step.", [section("player", "Rollouts", player(recordings))]
    )


# -------------------------------------------------------------------------------------------------------- one run


def run_page(run: Run) -> str:
    """report.html of one run."""
    results = run.results
    title = f"{results['recipe']} on {results['task']}"
    lead = f"Model {results['model']}, seed {results['seed']}, run {run.name}. {verdict(run)}"
    sections = [
        accuracy_section(run),
        curves_section(run),
        player_section(run),
        samples_section(run),
        rows_section(run),
        cost_section(run),
        repeat_section(run),
    ]
    return document(title, lead, sections)


def verdict(run: Run) -> str:
    """What the run reached, in a sentence, and what the base reached on the same rows."""
    if len(run.tasks) > 1:
        return f"Final accuracy in per cent: {_final(run)}."
    return _verdict(run, run.tasks[0]) if run.tasks else "It was not evaluated."


def _verdict(run: Run, task: str) -> str:
    entries = [entry for entry in run.evaluations if entry["task"] == task]
    first, last = entries[0], final_entry(run, task)
    assert last is not None
    interval = percent_interval(Interval(last["accuracy"], *last["interval"]))
    said = f"After {last['stage']}: {percent(last['accuracy'])} % of {last['n']} (95 % interval {interval})."
    if first["stage"] == last["stage"] or first.get("completion_length") != last.get("completion_length"):
        return said
    a, b = scores_by_row(run, first), scores_by_row(run, last)
    shared = a.keys() & b.keys()
    wins, losses = sum(b[r] > a[r] for r in shared), sum(b[r] < a[r] for r in shared)
    p = p_text(mcnemar_exact(losses, wins))
    before = f"{first['stage'].capitalize()}: {percent(first['accuracy'])} %"
    return f"{said} {before}; {wins} rows won and {losses} lost since, p {p}."


# -------------------------------------------------------------------------------------------------------- several runs


def comparison_page(runs: Sequence[Run]) -> str:
    """report.html of several runs."""
    cells, pairs, groups = compare(runs), compare_pairs(runs), variants(runs)
    names = ", ".join(dict.fromkeys(name for name, _ in groups))
    tasks = ", ".join(sorted({run.results["task"] for run in runs}))
    lead = f"{len(runs)} runs of {names} on {tasks}."
    sections = [
        _accuracy(cells),
        _from_table(
            "pairs", pairs_table(pairs), "There is nothing to pair: one recipe only, or no row answered by two."
        ),
        _curves(groups),
        _equal_compute(groups),
        _wins_and_losses(groups),
        _from_table("differences", differences_table(runs), "The configurations differ in nothing but their seeds."),
        _folders(groups),
    ]
    return document("Runs compared", lead, sections)


def _from_table(identity: str, shown: Table, empty: str) -> Markup:
    if not shown.rows:
        return section(identity, shown.title, tag("p", empty))
    note = tag("p", shown.note, class_="note") if shown.note else None
    return section(identity, shown.title, table(shown.columns, shown.rows, shown.title), note)


def _accuracy(cells: Sequence[Cell]) -> Markup:
    shown = results_table(cells)
    ordered = sorted(cells, key=lambda cell: (cell.task, cell.model))
    place = shown.columns.index("95 % interval") + 1
    columns = (*shown.columns[:place], "0 to 100 %", *shown.columns[place:])
    rows = []
    for cell, row in zip(ordered, shown.rows, strict=True):
        known = cell.accuracy.low > -1e9
        drawn: Any = whisker(cell.accuracy.value, cell.accuracy.low, cell.accuracy.high) if known else ""
        rows.append((*row[:place], drawn, *row[place:]))
    return section("accuracy", shown.title, table(columns, rows, shown.title), tag("p", shown.note, class_="note"))


def _curves(groups: Sequence[tuple[str, Sequence[Run]]]) -> Markup:
    """The curves of all runs over each other, one colour a recipe."""
    runs = [(name, colour, run) for colour, (name, group) in enumerate(groups) for run in group]
    stages = list(dict.fromkeys(stage for _, _, run in runs for stage in run.curves))
    parts: list[Markup] = []
    for stage in stages:
        figures = [
            chart(
                title,
                [
                    Series(name, run.curves[stage][tags[0]], colour)
                    for name, colour, run in runs
                    if tags[0] in run.curves.get(stage, {})
                ],
            )
            for title, tags in CHARTS
        ]
        drawn = [figure for figure in figures if figure is not None]
        if drawn:
            parts += [tag("h3", f"Stage {stage}"), tag("div", *drawn, class_="charts")]
    return section("curves", "Training curves", *(parts or [tag("p", "None of these runs kept event files.")]))


def _equal_compute(groups: Sequence[tuple[str, Sequence[Run]]]) -> Markup | None:
    """Reward, and accuracy on test rows, against what was spent since the base: FLOPs, and seconds."""
    runs = [(name, colour, run) for colour, (name, group) in enumerate(groups) for run in group]
    stages = list(dict.fromkeys(stage for _, _, run in runs for stage in run.curves))
    figures = [
        chart(
            f"Accuracy on {task} at equal FLOPs (per cent)",
            [Series(name, accuracy_by_flops(run, task), colour) for name, colour, run in runs],
            FLOPS,
            smooth=False,
        )
        for task in dict.fromkeys(task for _, _, run in runs for task in run.tasks)
    ]
    for stage in stages:
        own = [(name, colour, run) for name, colour, run in runs if stage in run.curves]
        for title, axis, tags in SPENDING:
            lines = [Series(name, by_spending(run, stage, tags), colour) for name, colour, run in own]
            figures.append(chart(f"Reward in stage {stage} at equal {title}", lines, axis))
    drawn = [figure for figure in figures if figure is not None]
    note = "Spent since the base, by all stages so far; evaluations are not counted. Seconds are of one machine only."
    return (
        section("cost", "Cost at equal compute", tag("div", *drawn, class_="charts"), tag("p", note, class_="note"))
        if drawn
        else None
    )


def _wins_and_losses(groups: Sequence[tuple[str, Sequence[Run]]]) -> Markup | None:
    """Row by row: the first two runs of every pair of recipes."""
    parts = []
    for i, (first, first_runs) in enumerate(groups):
        for second, second_runs in groups[i + 1 :]:
            a, b = _same_seed(first_runs, second_runs)
            for task in shared_tasks([a], [b]):
                left, right = final_entry(a, task), final_entry(b, task)
                if left is None or right is None or not scores_by_row(a, left).keys() & scores_by_row(b, right).keys():
                    continue
                seeds = f"seeds {a.results['seed']} and {b.results['seed']}"
                lists = changes(a.rows(left), b.rows(right), a.grader(left), (first, second))
                parts += [tag("h3", f"{second} against {first} on {task}, {seeds}"), lists]
    return section("rows", "Wins and losses", join(*parts)) if parts else None


def _same_seed(first: Sequence[Run], second: Sequence[Run]) -> tuple[Run, Run]:
    seeds = {run.results["seed"]: run for run in second}
    return next(
        ((run, seeds[run.results["seed"]]) for run in first if run.results["seed"] in seeds), (first[0], second[0])
    )


def _folders(groups: Sequence[tuple[str, Sequence[Run]]]) -> Markup:
    rows = [
        (run.name, name, str(run.results["seed"]), _final(run), " ".join(run.overrides))
        for name, group in groups
        for run in group
    ]
    return section(
        "runs", "Runs", table(["run", "recipe", "seed", "final accuracy", "said on the command line"], rows, "Runs")
    )


def _final(run: Run) -> str:
    finals = [entry for task in run.tasks if (entry := final_entry(run, task)) is not None]
    named = len(finals) > 1
    return ", ".join((f"{entry['task']} " if named else "") + percent(entry["accuracy"]) for entry in finals)
