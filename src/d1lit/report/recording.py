"""How completions came to be, as plain values: every token with the steps at which it came, changed or went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d1lit.types import Example, Rollout, Verdict

Recording = Mapping[str, Any]
LEVELS = 5
"""Shades of confidence."""
END = "∎"
"""How the end token is shown."""


def record_group(
    rollout: Rollout,
    verdicts: Mapping[str, Sequence[Verdict]],
    weights: Mapping[str, float],
    decode_token: Callable[[int], str],
    *,
    index: int,
    stage: str,
    mask_token_id: int,
    eos_token_id: int,
    block_length: int,
) -> dict[str, Any]:
    """One prompt's rollouts, for the player, the report and the GIF.

    Args:
        rollout: completions of ONE prompt with text; with a trace, remasked and edited tokens are seen too.
        verdicts: what each reward part said of them.
        weights: of the reward parts.
        decode_token: the text of a single token.
        index: the row's place in its split.
        stage: the stage whose model it was.
        mask_token_id: id of [MASK].
        eos_token_id: id that ends a completion.
        block_length: tokens of a block.
    """
    example: Example = rollout.examples[0]
    shades = _shades(rollout)
    spelt = {int(token): decode_token(int(token)) for token in rollout.completion_ids.unique()}
    if rollout.trace is not None:
        spelt |= {int(token): decode_token(int(token)) for token in rollout.trace.unique()}
    spelt[eos_token_id] = END
    rollouts = []
    for n in range(len(rollout.row_ids)):
        parts = {name: given[n] for name, given in verdicts.items()}
        judged = {name: v for name, v in parts.items() if v.outcome not in ("timeout", "error")}
        events = _events(rollout, n, mask_token_id)
        tokens = [
            {
                "text": spelt[int(token)],
                "events": [[step, None if shown is None else spelt[shown]] for step, shown in events[c]],
                "confidence": _number(float(rollout.confidence[n, c])) if events[c] else None,
                "shade": shades[n][c] if events[c] else None,
                "end": not bool(rollout.completion_mask[n, c]) or int(token) == eos_token_id,
            }
            for c, token in enumerate(rollout.completion_ids[n].tolist())
        ]
        rollouts.append(
            {
                "text": rollout.completions[n],
                "reward": sum(weights[name] * v.value for name, v in judged.items()),
                "parts": {
                    name: {"value": v.value, "outcome": v.outcome, "parsed": v.parsed, "weight": weights[name]}
                    for name, v in parts.items()
                },
                "length": int(rollout.completion_mask[n].sum()),
                "tokens": tokens,
            }
        )
    steps = 1 + max((e[0] for r in rollouts for t in r["tokens"] for e in t["events"]), default=0)
    plain = {key: example.get(key) for key in ("id", "question", "answer")}
    return {**plain, "index": index, "stage": stage, "block_length": block_length, "steps": steps, "rollouts": rollouts}


def _events(rollout: Rollout, n: int, mask_token_id: int) -> list[list[tuple[int, int | None]]]:
    """For each position, (step, token) when a token appeared or changed and (step, None) when it was masked again."""
    length = rollout.completion_ids.shape[1]
    found: list[list[tuple[int, int | None]]] = [[] for _ in range(length)]
    if rollout.trace is None:
        pairs = zip(rollout.commit_step[n].tolist(), rollout.completion_ids[n].tolist(), strict=True)
        for place, (step, token) in enumerate(pairs):
            if step >= 0:
                found[place].append((step, token))
        return found
    before = [mask_token_id] * length
    # Positions that were never reached are filled with the end token after the last step; that is no step's doing.
    reached = (rollout.commit_step[n] >= 0).tolist()
    for step, canvas in enumerate(rollout.trace[:, n].tolist()):
        for place, (old, new) in enumerate(zip(before, canvas, strict=True)):
            if old != new and reached[place]:
                found[place].append((step, None if new == mask_token_id else new))
        before = canvas
    return found


def _shades(rollout: Rollout) -> list[list[int | None]]:
    """Confidence in five shades: fixed edges where it is a probability, the group's own range where it is not."""
    values = [[_number(value) for value in row] for row in rollout.confidence.tolist()]
    steps = rollout.commit_step.tolist()
    known = [
        v
        for row, at in zip(values, steps, strict=True)
        for v, s in zip(row, at, strict=True)
        if v is not None and s >= 0
    ]
    if not known:
        return [[None] * len(row) for row in values]
    low, high = min(known), max(known)
    edges = [0.5, 0.8, 0.95, 0.995] if low >= 0.0 and high <= 1.0 + 1e-6 else _even_edges(low, high)
    return [[None if v is None else sum(v >= edge for edge in edges) for v in row] for row in values]


def _even_edges(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / LEVELS for i in range(1, LEVELS)]


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def shown_at(token: Mapping[str, Any], step: int) -> str | None:
    """What stands at a token's place after a step; None for a mask."""
    shown = None
    for at, text in token["events"]:
        if at <= step:
            shown = text
    return shown


def state_at(token: Mapping[str, Any], step: int) -> str:
    """masked, new or edited (appeared, took another's place in this very step), fixed, remasked, or unreached."""
    if not token["events"]:
        return "unreached"
    if shown_at(token, step) is None:
        return "remasked" if any(at <= step for at, _ in token["events"]) else "masked"
    if all(at != step for at, _ in token["events"]):
        return "fixed"
    return "new" if shown_at(token, step - 1) is None else "edited"


def one_line(text: str) -> str:
    """A token's text on one line: line breaks and tabs as signs."""
    return text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
