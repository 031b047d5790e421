"""The loop every per-row judge needs: one verdict a completion, and no silent mismatch of lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from d1lit.types import Example, Verdict


def judge_rows(
    judge: Callable[[str, Example], Verdict], completions: Sequence[str], examples: Sequence[Example]
) -> list[Verdict]:
    """Apply `judge` to each completion and its row.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(completions) != len(examples):
        raise ValueError(
            f"completions: {len(completions)} given for {len(examples)} examples. Repeat each example once a rollout"
        )
    return [judge(text, example) for text, example in zip(completions, examples, strict=True)]
