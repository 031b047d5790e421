"""Rewards for the shape of a completion, whatever its content: after d1's five GSM8K parts, with their faults mended.

Each is between 0 and 1; weights stand in YAML. Differs from the paper's code: reasoning may have several lines, and the
tag count is never negative. `prefill` is text the prompt already ended with (such as an opening tag); it is put in
front of the completion before the shape is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d1lit.rewards.extract import answer_block, boxes, until_end_of_text
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def _sections(text: str) -> tuple[str, str, str, str, str] | None:
    """Text before, inside and after the four tags, each once and in order; None where they are not."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    cuts = [text.find(tag) for tag in TAGS]
    if cuts != sorted(cuts):
        return None
    ends = [0, *(cut + len(tag) for cut, tag in zip(cuts, TAGS, strict=True))]
    before, reasoning, between, answer, after = (
        text[start:stop] for start, stop in zip(ends, [*cuts, len(text)], strict=True)
    )
    return before, reasoning, between, answer, after


@dataclass(frozen=True)
class StrictFormat:
    """1 for reasoning and answer, both filled, every tag on a line of its own and nothing else around."""

    prefill: str

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        sections = _sections(self.prefill + until_end_of_text(text))
        if sections is None:
            return Verdict(0.0)
        before, reasoning, between, answer, after = sections
        own_lines = all(part[:1] == "\n" == part[-1:] and part.strip() for part in (reasoning, answer))
        return Verdict(float(own_lines and not before.strip() and between == "\n" and not after.strip()))


@dataclass(frozen=True)
class SoftFormat:
    """1 for reasoning and answer between their tags, in order, with only white space outside."""

    prefill: str

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        sections = _sections(self.prefill + until_end_of_text(text))
        if sections is None:
            return Verdict(0.0)
        before, reasoning, between, answer, after = (part.strip() for part in sections)
        return Verdict(float(bool(reasoning and answer) and not (before or between or after)))


@dataclass(frozen=True)
class TagCount:
    """A quarter for each tag standing exactly once, less `trailing_cost` a character after the answer; at least 0."""

    prefill: str
    trailing_cost: float

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        text = self.prefill + until_end_of_text(text)
        count = sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS)
        _, close, after = text.rpartition(TAGS[-1])
        trailing = len(after.strip()) if close else 0
        return Verdict(max(count - self.trailing_cost * trailing, 0.0))


@dataclass(frozen=True)
class BoxedInTags:
    """The paper's MATH format: answer tags and a box in them 1, tags alone 0.75, a box alone 0.5, neither 0.25.

    Differs from the paper's code, where a forgotten escape makes 1 and 0.5 unreachable. The four values stand in YAML.
    """

    both: float
    tags: float
    box: float
    neither: float

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        text = until_end_of_text(text)
        block = answer_block(text) if TAGS[-1] in text else None
        if block is not None:
            return Verdict(self.both if boxes(block) else self.tags)
        return Verdict(self.box if boxes(text) else self.neither)
