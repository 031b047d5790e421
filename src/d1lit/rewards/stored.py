"""Rows of d1's published generations in the project's schema, so that they can be graded again.

The files keep the raw text after a `<reasoning>` prefill and, as `ground_truth`, what d1's evaluation compared with.
"""

from __future__ import annotations

import re
from typing import Any

from d1lit.types import Example

_PUZZLE = re.compile(r"([0-4]{16})\s*$")


def published_row(row: dict[str, Any]) -> tuple[str, Example]:
    """The completion and the example of one row of a published file.

    GSM8K's truth is null where d1 could not read a negative gold number; its `answer` is then empty and the strict
    grader says "error", unless the caller puts the gold answer of the same question back.

    Raises:
        ValueError: an unknown task or a Sudoku question without a puzzle.
    """
    task, truth = row["task"], row["ground_truth"]
    example: dict[str, Any] = {
        "id": f"{task}/{row['gen_length']}/{row['rank']}/{row['index_in_rank']}",
        "question": row["question"],
    }
    if task == "gsm8k":
        example["answer"] = "" if truth is None else f"{truth:.10f}".rstrip("0").rstrip(".")
    elif task == "math500":
        example["answer"] = truth
    elif task == "countdown":
        example |= {"numbers": truth[0], "target": truth[1], "answer": str(truth[1])}
    elif task == "sudoku":
        puzzle = _PUZZLE.search(row["question"])
        if not puzzle:
            raise ValueError(f"{example['id']}: no puzzle at the end of the question. Try: d1's published files")
        example |= {"puzzle": puzzle[1], "solution": truth, "answer": truth}
    else:
        raise ValueError(f"task: {task!r} is not one of gsm8k, math500, countdown, sudoku. Try: d1's published files")
    return row["generation"], example
