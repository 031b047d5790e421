"""SFT demonstrations from data: s1K (Muennighoff et al., arXiv 2501.19393), or any rows of prompt and completion."""

from __future__ import annotations

from typing import Any

from d1lit.tasks.reading import Columns, Row, read_rows
from d1lit.tasks.source import fingerprint, required_text, tagged

_S1K: tuple[tuple[str, str], ...] = (
    ("thinking_trajectories", "attempt"),
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
    ("gemini_thinking_trajectory", "gemini_attempt"),
    ("thinking", "attempt"),
)
"""Columns of thinking and final answer: s1K, s1K-1.1 (two authors; the first one is taken), and a common short form."""


def read_demonstrations(location: str, key: str, columns: Columns) -> tuple[list[dict[str, Any]], str | None]:
    """Rows with `question` and `completion`, from a file or the hub, and the commit of the latter.

    Rows that have the columns of s1K become `<reasoning>thinking</reasoning>`, a newline, `<answer>attempt</answer>`,
    as d1 writes them. Other rows must have the columns that `columns` names for `question` and `completion`; a
    completion is taken as it stands.

    Raises:
        ValueError: one line with file and line.
    """
    taken: dict[str, Any] = {name: name for pair in _S1K for name in pair}
    taken |= {"question": columns.get("question", ("question", "prompt"))}
    taken |= {"completion": columns.get("completion", "completion")}
    rows = read_rows(location, key, taken, ("question",), "train")
    return [_demonstration(row) for row in rows], rows[0].commit


def _demonstration(row: Row) -> dict[str, Any]:
    question = required_text(row.values, "question", row.place)
    given = "completion" in row.values
    completion = required_text(row.values, "completion", row.place) if given else _from_s1k(row)
    return {"id": f"sft-{fingerprint(question, completion)}", "question": question, "completion": completion}


def _from_s1k(row: Row) -> str:
    for thinking_name, attempt_name in _S1K:
        if thinking_name in row.values and attempt_name in row.values:
            thinking = row.values[thinking_name]
            if isinstance(thinking, list):  # s1K keeps a list; d1 uses the first
                thinking = thinking[0] if thinking else None
            values = {"thinking": thinking, "attempt": row.values[attempt_name]}
            return tagged(
                required_text(values, "thinking", row.place), required_text(values, "attempt", row.place), short=False
            )
    raise ValueError(
        f"{row.place}: neither a completion nor s1K's thinking_trajectories and attempt. "
        "Try: task.demonstration_columns.completion=NAME [E303]"
    )
