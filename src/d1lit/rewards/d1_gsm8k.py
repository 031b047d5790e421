r"""GSM8K as d1 (arXiv 2504.12216, github.com/dllm-reasoning/d1) rewards and grades it, mistakes included.

Differs from what one would want: answers are compared as strings ("1,200" is not "1200"), the format patterns never
match a reasoning of several lines, the tag count may be negative, and the evaluation reads a boxed "1,200" as 1. The
strict rules are in `number_answers.py`; these exist so that the paper's numbers can be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from d1lit.rewards.extract import first_between, pairs_on_one_line
from d1lit.rewards.rows import judge_rows
from d1lit.types import Example, Verdict

_NUMBER = re.compile(r"-?\d+\.?\d*")
_BETWEEN_SECTIONS = re.compile(r"</reasoning>\s*<answer>")
_TRUTH_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def training_answer(text: str) -> str:
    """What the training rewards take for the answer: after the last opening tag; the whole text where there is none."""
    return text.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0].strip()


def training_truth(answer_text: str) -> str | None:
    """The gold string of a raw GSM8K answer text: between its first `####` and the next."""
    parts = answer_text.split("####", 2)
    return parts[1].strip() if len(parts) > 1 else None


def _to_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def evaluation_truth(answer_text: str) -> float | None:
    """The gold number as the evaluation reads it; a leading sign makes it unreadable (None)."""
    text = (training_truth(answer_text) or "").replace(",", "").replace("$", "")
    match = _TRUTH_NUMBER.match(text)
    return float(match.group()) if match else None


def evaluation_answer(text: str) -> float | None:
    r"""The number the evaluation reads: the first usable `\boxed`, else the first `<answer>` pair."""
    for content in pairs_on_one_line(text, "\\boxed{", "}"):
        content = content.strip()
        if not content.strip("."):
            continue
        number = _to_float(content)
        if number is None and (match := _NUMBER.search(content)):
            number = _to_float(match.group())
        if number is not None:
            return number
    content = (first_between(text, "<answer>", "</answer>") or "").strip()
    if not content:
        return None
    number = _to_float(content)
    if number is None and (found := _NUMBER.findall(content)):
        number = _to_float(found[-1])
    return number


def tag_count(text: str) -> float:
    """An eighth for each tag that stands exactly once on its line, less a thousandth a character after the end."""
    count = 0.0
    if text.count("<reasoning>\n") == 1:
        count += 0.125
    if text.count("\n</reasoning>\n") == 1:
        count += 0.125
    if text.count("\n<answer>\n") == 1:
        count += 0.125
        count -= len(text.split("\n</answer>\n")[-1]) * 0.001  # the whole text where the mark is absent
    if text.count("\n</answer>") == 1:
        count += 0.125
        count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return count


def _matches_strict_format(text: str) -> bool:
    """Reasoning and answer of one line each on lines of their own, one or two newlines after, nothing else."""
    lines = text.split("\n", 7)
    marks = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    if len(lines) < 7 or tuple(lines[i] for i in (0, 2, 3, 5)) != marks:
        return False
    # The original pattern ends in `$`, which also matches before one last newline.
    return lines[6:] in ([""], ["", ""])


def _matches_soft_format(text: str) -> bool:
    """Reasoning of one line, any white space, answer of one line, at the very start of the text."""
    if not text.startswith("<reasoning>"):
        return False
    # Where several closings stand on the first line, the first that an answer follows decides: the rest of its line
    # holds whatever the others could match.
    between = _BETWEEN_SECTIONS.search(text, len("<reasoning>"))
    if not between or "\n" in text[: between.start()]:
        return False
    return "</answer>" in text[between.end() :].split("\n", 1)[0]


@dataclass(frozen=True)
class D1Gsm8kCorrectness:
    """2 where the extracted string equals the gold string."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        answer = training_answer(text)
        return Verdict(2.0 if answer == example["answer"] else 0.0, parsed=answer)


@dataclass(frozen=True)
class D1Gsm8kInteger:
    """0.5 where the extracted string is made of characters that Unicode calls digits."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(lambda text, _: Verdict(0.5 * training_answer(text).isdigit()), completions, examples)


@dataclass(frozen=True)
class D1StrictFormat:
    """0.5 for tags on lines of their own around one line of reasoning and one of answer."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(lambda text, _: Verdict(0.5 * _matches_strict_format(text)), completions, examples)


@dataclass(frozen=True)
class D1SoftFormat:
    """0.5 for tags around one line of reasoning and one of answer."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(lambda text, _: Verdict(0.5 * _matches_soft_format(text)), completions, examples)


@dataclass(frozen=True)
class D1TagCount:
    """At most 0.5, and negative where much text follows the answer."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(lambda text, _: Verdict(tag_count(text)), completions, examples)


@dataclass(frozen=True)
class D1Gsm8kEvaluation:
    """The paper's evaluation: equality of floats. The gold number is read from `solution`, or from `answer`."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(self._judge, completions, examples)

    def _judge(self, text: str, example: Example) -> Verdict:
        answer = evaluation_answer(text)
        if answer is None:
            return Verdict(0.0, "unparsed")
        truth = evaluation_truth(example.get("solution") or f"#### {example['answer']}")
        return Verdict(float(answer == truth), parsed=str(answer))
