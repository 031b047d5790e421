"""The unmasking player: several completions of one prompt side by side, step by step.

The page holds the finished state as plain elements, so that it prints and reads without a script; player.js takes
tokens away again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d1lit.report.markup import Markup, join, tag
from d1lit.report.recording import LEVELS, Recording, one_line

SHADE_NAMES = ("least sure", "", "", "", "surest")


def player(recordings: Sequence[Recording]) -> Markup:
    """One player a recorded prompt, under one key to the colours."""
    return join(_key(), *(_one(recording) for recording in recordings))


def _key() -> Markup:
    shades = [tag("span", SHADE_NAMES[n] or Markup("&nbsp;"), class_=f"t c{n}") for n in range(LEVELS)]
    words = (tag("span", "masked", class_="t masked"), " ", tag("span", "just fixed", class_="t c4 new"), " ")
    words += (tag("span", "just changed", class_="t c4 edited"), " ")
    more = (tag("span", "masked again", class_="t masked again"), " ", tag("span", "∎ end", class_="t end"))
    return tag("p", "Confidence when fixed: ", *shades, " ", *words, *more, class_="key-line")


def _one(recording: Recording) -> Markup:
    steps = recording["steps"]
    title = f"Row {recording['index']} ({recording['id']}), {recording['stage']}, {steps} steps"
    slider = tag(
        "input",
        type="range",
        min=0,
        max=steps,
        value=steps,
        step=1,
        class_="scrub",
        aria_label=f"Step of row {recording['index']}",
    )
    controls = tag(
        "div",
        tag("button", "▶ Play", type="button", class_="play"),
        tag("button", "‹", type="button", class_="back", aria_label="One step back"),
        slider,
        tag("button", "›", type="button", class_="next", aria_label="One step on"),
        tag("output", f"step {steps} of {steps}", class_="at"),
        class_="controls",
    )
    question = tag("p", tag("b", "Prompt "), one_line(str(recording["question"])), class_="question")
    gold = tag("p", tag("b", "Gold "), one_line(str(recording["answer"])), class_="question")
    panes = [_rollout(n, rollout, recording["block_length"]) for n, rollout in enumerate(recording["rollouts"])]
    return tag(
        "section",
        tag("h3", title),
        question,
        gold,
        controls,
        tag("div", *panes, class_="panes"),
        class_="player",
        data_steps=steps,
    )


def _rollout(number: int, rollout: Mapping[str, Any], block_length: int) -> Markup:
    tokens = rollout["tokens"]
    blocks = [
        tag("div", *(_token(token) for token in tokens[start : start + block_length]), class_="block")
        for start in range(0, len(tokens), block_length)
    ]
    parts = [tag("li", part_words(name, part)) for name, part in rollout["parts"].items()]
    head = tag("h4", f"Rollout {number + 1}: reward {rollout['reward']:.3g}")
    return tag(
        "div",
        head,
        tag("ul", *parts, class_="parts"),
        *blocks,
        tag("p", Markup("&nbsp;"), class_="readout", aria_live="polite"),
        class_="pane",
        tabindex="0",
        role="group",
        aria_label=f"Rollout {number + 1}: the arrow keys read its tokens",
    )


def part_words(name: str, part: Mapping[str, Any]) -> str:
    """A reward part in words: its value, its weight, and what went wrong if something did."""
    weight = f" × {part['weight']:g}" if part.get("weight", 1.0) != 1.0 else ""
    outcome = "" if part["outcome"] == "ok" else f" ({part['outcome']})"
    return f"{name.replace('_', ' ')} {part['value']:.3g}{weight}{outcome}"


def _token(token: Mapping[str, Any]) -> Markup:
    shade = "" if token["shade"] is None else f" c{token['shade']}"
    events = token["events"]
    steps = ",".join(f"{'-' if shown is None else ''}{step + 1}" for step, shown in events)
    changed = len({shown for _, shown in events if shown is not None}) > 1
    return tag(
        "span",
        one_line(token["text"]) or Markup("&nbsp;"),
        class_=f"t{' end' if token['end'] else ''}{shade}{'' if events else ' never'}",
        data_s=steps or None,
        data_p=None if token["confidence"] is None else f"{token['confidence']:.3g}",
        data_was="\x1f".join(one_line(shown or "") for _, shown in events).replace("\x1f", "\u241f")
        if changed
        else None,
    )
