"""The parts of a single run's report."""

from __future__ import annotations

import bisect
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from d1lit.report.comparing import Probe, probes, row_score
from d1lit.report.curves import Series, chart, whisker
from d1lit.report.markup import Markup, join, table, tag
from d1lit.report.player import part_words, player
from d1lit.report.runs import Row, Run, Scalars
from d1lit.report.tables import number, percent, percent_interval
from d1lit.security import redact
from d1lit.statistics import Interval

MOST_SAMPLES = 8
MOST_ROWS = 12
MOST_CHARACTERS = 4000


def section(identity: str, title: str, *children: Any) -> Markup:
    """A numberless section that the contents link to."""
    return tag("section", tag("h2", title), *children, id=identity)


def clipped(value: Any) -> str:
    """A text of bearable length; what was left out is said."""
    words = str(value)
    if len(words) <= MOST_CHARACTERS:
        return words
    return f"{words[:MOST_CHARACTERS]}\n[{len(words) - MOST_CHARACTERS} more characters]"


# ------------------------------------------------------------------------------------------------------------- accuracy


def accuracy_section(run: Run) -> Markup:
    """Every stage and length with its interval, and what no model at all reaches."""
    entries = run.evaluations
    tasks = len(run.tasks) > 1
    extra = sorted({name for entry in entries for name in entry.get("extra", {})})
    columns = ["stage", *(["task"] if tasks else []), "accuracy", "95 % interval", "0 to 100 %", "rows", "d1's grader"]
    columns += [name.replace("_", " ") for name in extra]
    columns += ["tokens asked", "tokens used", "truncated", "passes", "unparsed"]
    rows = [_entry_row(baseline_cells(run, name), entry, extra) for name, entry in run.baselines.items()]
    rows += [_entry_row((entry["stage"], *([entry["task"]] if tasks else [])), entry, extra) for entry in entries]
    note = (
        "Per cent of rows. The interval is Wilson's over rows: it says how much another draw of test rows could change "
        "the number, not another seed. Rows marked “no model” are answers made without any model."
    )
    settings = entries[-1].get("settings", {}) if entries else {}
    protocol = tag(
        "details", tag("summary", "Evaluation protocol"), tag("pre", yaml.safe_dump(redact(settings), sort_keys=True))
    )
    return section(
        "accuracy",
        "Accuracy",
        table(columns, rows, "Accuracy by stage"),
        tag("p", note, class_="note"),
        _probes(run),
        protocol,
    )


def baseline_cells(run: Run, name: str) -> tuple[str, ...]:
    """What a baseline is called in a table: of a mixture, where it is named `task/baseline`, with its task apart."""
    if len(run.tasks) < 2:
        return (f"no model: {name}",)
    task, _, own = name.rpartition("/")
    return f"no model: {own}", task


def _entry_row(name: Sequence[str], entry: Mapping[str, Any], extra: Sequence[str]) -> tuple[Any, ...]:
    """A line of the accuracy table; baselines have fewer facts."""
    graded = percent(entry["d1_correct"] / max(1.0, entry["d1_out_of"])) if "d1_correct" in entry else ""
    return (
        *name,
        percent(entry["accuracy"]),
        percent_interval(Interval(entry["accuracy"], *entry["interval"])),
        whisker(entry["accuracy"], *entry["interval"]),
        str(entry["n"]),
        graded,
        *(percent(entry["extra"][key]["mean"]) if key in entry.get("extra", {}) else "" for key in extra),
        str(entry.get("completion_length") or ""),
        "" if entry.get("effective_tokens") is None else f"{entry['effective_tokens']:.1f}",
        "" if entry.get("truncated_fraction") is None else percent(entry["truncated_fraction"]),
        "" if entry.get("passes") is None else f"{entry['passes']:.1f}",
        percent(entry.get("unparsed_fraction", math.nan)),
    )


def _probes(run: Run) -> Markup | None:
    """What the policy reaches under other conditions: words put in its mouth, several samples a row."""
    found = probes(run)
    if not found:
        return None
    tasks = len(run.tasks) > 1
    extra = sorted({name for probe in found for name in probe.entry.get("extra", {}) if "pass_at_k" not in probe.entry})
    columns = ["stage", *(["task"] if tasks else []), "probe", "per cent", "95 % interval", "0 to 100 %", "completions"]
    rows = [
        (
            *(probe.stage, *([probe.task] if tasks else []), probe.name),
            *(percent(probe.estimate.value), percent_interval(probe.estimate)),
            whisker(probe.estimate.value, probe.estimate.low, probe.estimate.high),
            str(probe.entry["n"]),
            *(_measured(probe, name) for name in extra),
        )
        for probe in found
    ]
    note = (
        "pass@k: at least one of k samples is right, estimated without bias from all samples of a row. forced: the "
        "greedy answer when it has to begin with these words."
    )
    columns += [name.replace("_", " ") for name in extra]
    return join(
        tag("h3", "Asked otherwise"),
        table(columns, rows, "Accuracy when asked otherwise"),
        tag("p", note, class_="note"),
    )


def _measured(probe: Probe, name: str) -> str:
    """A further measure of forced answers; of samples the mean would speak of no k."""
    return "" if "pass_at_k" in probe.entry else percent(probe.entry["extra"].get(name, {}).get("mean", math.nan))


# --------------------------------------------------------------------------------------------------------------- curves

VALIDATION = "Validation"
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("rollout/reward", "rollout/reward/")),
    ("KL to the reference (nats)", ("train/kl",)),
    ("Share of clipped tokens", ("train/clip_fraction",)),
    ("Tokens up to the end", ("rollout/length",)),
    ("Groups of equal reward (nothing to learn from)", ("rollout/zero_std_fraction",)),
    ("Rollouts cut off before their end", ("rollout/truncated_fraction",)),
    ("Entropy when a token is fixed (nats)", ("rollout/entropy",)),
    (VALIDATION, ("val/accuracy", "val/loss")),
    ("Loss", ("train/loss",)),
    ("Loss per masked token (nats)", ("train/nll_per_masked_token",)),
)
"""Title, and the scalars of the chart; a name that ends in a slash stands for all below it."""


def curves_section(run: Run) -> Markup:
    """The training curves of every stage that has any."""
    stages = []
    for stage, scalars in run.curves.items():
        figures = [chart(title, series_of(scalars, tags), smooth=title != VALIDATION) for title, tags in CHARTS]
        drawn = [figure for figure in figures if figure is not None]
        if drawn:
            stages += [tag("h3", f"Stage {stage}"), tag("div", *drawn, class_="charts")]
    note = "Faint: every update. Bold: a centred moving mean. Point at a chart to read it, or use the arrow keys on it."
    empty = tag("p", "This run kept no event files (logger=none).")
    return section("curves", "Training curves", *(stages or [empty]), tag("p", note, class_="note") if stages else None)


def series_of(scalars: Mapping[str, Any], tags: Sequence[str]) -> list[Series]:
    """The lines of a chart."""
    names = [
        name
        for wanted in tags
        for name in sorted(scalars)
        if name == wanted or (wanted.endswith("/") and name.startswith(wanted))
    ]
    total = "rollout/reward"
    label = {
        name: "total" if name == total and len(names) > 1 else name.rpartition("/")[2].replace("_", " ")
        for name in names
    }
    return [Series(label[name], scalars[name], place) for place, name in enumerate(names)]


FLOPS = "FLOPs since the base"
SPENDING = (
    ("FLOPs", FLOPS, ("cost/flops",)),
    ("time", "seconds of rollouts and updates", ("time/",)),
)
"""What a run spends: in words, as an axis, and the scalars that count it; a name that ends in a slash as above."""


def spent_by_step(scalars: Scalars, tags: Sequence[str]) -> list[tuple[int, float]]:
    """What a stage had spent at each of its steps."""
    steps: dict[int, float] = {}
    for name, line in scalars.items():
        if any(name == tag or (tag.endswith("/") and name.startswith(tag)) for tag in tags):
            for step, amount in line:
                steps[step] = steps.get(step, 0.0) + amount
    ordered = sorted(steps)
    return list(zip(ordered, itertools.accumulate(steps[step] for step in ordered), strict=True))


def spent_before(run: Run, stage: str, tags: Sequence[str]) -> float:
    """What the stages between the base and this one had spent."""
    names = [name for name in run.curves if name != "base"]
    earlier = names[: names.index(stage)] if stage in names else []
    return sum(spent[-1][1] for name in earlier if (spent := spent_by_step(run.curves[name], tags)))


def by_spending(run: Run, stage: str, tags: Sequence[str]) -> list[tuple[float, float]]:
    """A stage's reward against what had been spent since the base when the step that brought it was done."""
    spent, before = spent_by_step(run.curves[stage], tags), spent_before(run, stage, tags)
    steps = [step for step, _ in spent]
    reward = [(bisect.bisect_right(steps, at), value) for at, value in run.curves[stage].get("rollout/reward", [])]
    return [(before + (spent[place - 1][1] if place else 0.0), value) for place, value in reward] if spent else []


def accuracy_by_flops(run: Run, task: str) -> list[tuple[float, float]]:
    """Accuracy in per cent after every stage, at the length of training, against the FLOPs it took to get there."""
    found: dict[str, tuple[float, float]] = {}
    for entry in run.evaluations:
        stage = entry["stage"]
        if entry["task"] == task and stage not in found and (stage == "base" or stage in run.curves):
            own = [] if stage == "base" else spent_by_step(run.curves[stage], ("cost/flops",))
            spent = spent_before(run, stage, ("cost/flops",)) + (own[-1][1] if own else 0.0)
            found[stage] = (spent, 100 * entry["accuracy"])
    return list(found.values())


# -------------------------------------------------------------------------------------------------------------- samples


def player_section(run: Run) -> Markup | None:
    """The recorded groups, if the run kept any."""
    if not run.recordings:
        return None
    words = (
        "Each token appears at the step that fixed it; boxes are the sampler's blocks. "
        "These rows were sampled at the temperature of training."
    )
    return section("player", "How completions came to be", tag("p", words), player(run.recordings))


def samples_section(run: Run) -> Markup | None:
    """The last completions of training with every reward part."""
    if not run.samples:
        return None
    cards = [_sample(row) for row in run.samples[-MOST_SAMPLES:][::-1]]
    words = f"The last {len(cards)} of {len(run.samples)} completions kept in samples.jsonl, newest first."
    return section("samples", "Samples from training", tag("p", words), tag("div", *cards, class_="cards"))


def _sample(row: Row) -> Markup:
    parts = row.get("parts", {})
    parsed = next((part["parsed"] for part in parts.values() if part.get("parsed")), None)
    facts = [("Parsed", parsed if parsed is not None else "nothing"), ("Gold", row.get("answer"))]
    listed = [tag("li", part_words(name, part)) for name, part in parts.items()]
    reward, advantage = number(row.get("reward")), number(row.get("advantage"))
    head = f"{row.get('stage', '')}, rollout {row.get('rollout', '')}: reward {reward}, advantage {advantage}"
    return tag(
        "article",
        tag("h3", head),
        _labelled("Prompt", row.get("question")),
        _labelled("Completion", row.get("completion")),
        tag("dl", *(join(tag("dt", name), tag("dd", clipped(value))) for name, value in facts)),
        tag("ul", *listed, class_="parts"),
        class_="card",
    )


def _labelled(name: str, value: Any) -> Markup:
    return join(tag("p", name, class_="label"), tag("pre", clipped(value)))


# ----------------------------------------------------------------------------------------------------------------- rows


def rows_section(run: Run) -> Markup | None:
    """What training changed, row by row: the first evaluation against the last."""
    parts: list[Markup] = []
    names = ("", "")
    for task in run.tasks:
        own = [entry for entry in run.evaluations if entry["task"] == task]
        first = own[0]
        last = [entry for entry in own if entry.get("completion_length") == first.get("completion_length")][-1]
        if last is first:
            continue
        names = (first["stage"], last["stage"])
        parts += [tag("h3", task)] if len(run.tasks) > 1 else []
        parts.append(changes(run.rows(first), run.rows(last), run.grader(first), names))
    return section("rows", f"Row by row: {names[0]} against {names[1]}", *parts) if parts else None


def changes(before: Sequence[Row], after: Sequence[Row], grader: str, names: tuple[str, str]) -> Markup:
    """Rows won, lost, and never solved, with both answers."""
    old = {(row["index"], row["id"]): row for row in before}
    both = [(old[key], row) for row in after if (key := (row["index"], row["id"])) in old]
    scored = [(row_score(a, grader), row_score(b, grader), a, b) for a, b in both]
    kinds = (
        ("Won", [(a, b) for x, y, a, b in scored if y > x]),
        ("Lost", [(a, b) for x, y, a, b in scored if y < x]),
        ("Not solved by either", [(a, b) for x, y, a, b in scored if x == y and y < 1]),
        ("Solved by both", [(a, b) for x, y, a, b in scored if x == y and y >= 1]),
    )
    lists = []
    for title, found in kinds:
        shown = [_change(a, b, names) for a, b in found[:MOST_ROWS]]
        more = f", the first {MOST_ROWS}" if len(found) > MOST_ROWS else ""
        lists.append(tag("details", tag("summary", f"{title}: {len(found)} of {len(scored)} rows{more}"), *shown))
    return join(*lists)


def _change(before: Row, after: Row, names: tuple[str, str]) -> Markup:
    def cell(name: str, row: Row) -> Markup:
        verdict = row["strict"]
        found = verdict.get("parsed") or verdict["outcome"]
        words = f"{name}: {'right' if verdict['value'] >= 1 else 'wrong'}, read as {found}"
        return tag("div", tag("p", clipped(words), class_="label"), tag("pre", clipped(row["completion"])))

    question = tag(
        "p",
        tag("b", f"Row {after['index']} "),
        clipped(after["question"]),
        tag("b", " Gold "),
        clipped(after["answer"]),
    )
    return tag(
        "div", question, tag("div", cell(names[0], before), cell(names[1], after), class_="two"), class_="change"
    )


# ------------------------------------------------------------------------------------------------------- how to repeat


def repeat_section(run: Run) -> Markup:
    """The command, the machine, and the whole configuration."""
    environment = run.environment
    said = " ".join(shlex.quote(word) for word in redact(run.overrides) if not word.startswith(("run_dir=", "resume=")))
    commit = environment.get("commit")
    steps = [f"git checkout {commit}"] if commit else []
    command = "\n".join([*steps, f"python train.py {said}".strip()])
    packages = environment.get("packages", {})
    facts = {
        **{key: environment[key] for key in ("python", "platform", "processor", "threads") if key in environment},
        "devices": ", ".join(environment.get("devices", [])) or "CPU only",
        **packages,
    }
    data = run.results.get("data") or {}
    full = tag(
        "details",
        tag("summary", "The whole configuration"),
        tag("pre", yaml.safe_dump(redact(dict(run.config)), sort_keys=False)),
    )
    return section(
        "repeat",
        "How to repeat this run",
        tag("pre", command, class_="command"),
        table(["machine", "value"], [(key, str(value)) for key, value in facts.items()], "Environment"),
        table(["data", "rows"], [(key.replace("_", " "), str(value)) for key, value in data.items()], "Data")
        if data
        else None,
        full,
    )


def cost_section(run: Run) -> Markup:
    """What results.json says of cost: the whole run, its stages, and the parts of each."""
    cost = run.results.get("cost") or {}
    rows = [("the whole run", cost)]
    for stage, spent in (cost.get("stages") or {}).items():
        rows += [(stage, spent), *((f"{stage}: {part}", of) for part, of in (spent.get("sections") or {}).items())]
    if "base" in run.curves and "base" not in (cost.get("stages") or {}):
        seconds = [v for name, line in run.curves["base"].items() if name.startswith("time/") for _, v in line]
        rows.insert(1, ("base, made by this run", {"seconds": sum(seconds)}))
    known = {"updates": "updates", "seconds": "seconds", "forwards": "forwards", "tokens": "tokens through the network",
             "flops": "FLOPs", "peak_memory_mb": "peak memory, MB"}  # fmt: skip
    found = [key for key in known if any(key in of for _, of in rows)]
    cells = [(name, *(_plain(of[key]) if key in of else "" for key in found)) for name, of in rows]
    table_of_cost = table(["where", *(known[key] for key in found)], cells, "Cost by stage")
    note = tag(
        "p", "Seconds of the whole run are the clock's, evaluation included; all else is training.", class_="note"
    )
    figures = [
        chart(f"Reward in stage {stage} against {title}", [Series("reward", by_spending(run, stage, tags), 0)], axis)
        for stage in run.curves
        for title, axis, tags in SPENDING
    ]
    drawn = [figure for figure in figures if figure is not None]
    return section("cost", "Cost", table_of_cost, note, tag("div", *drawn, class_="charts") if drawn else None)


def _plain(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return (
        f"{value:.3g}" if value >= 1e7 else f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
    )
