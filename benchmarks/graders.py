r"""Completions a second of every reward, on ordinary and on hostile texts, beside a naive way where there is one.

    python benchmarks/graders.py [--quick] [--rounds N]

Naive: one regular expression with a lazy `.*?` for the answer (or the format), `eval` for Countdown, math-verify in
this process. The last two may never return from a hostile text, so they get none.
Seconds are of the processor, those of math-verify's worker included.
"""

from __future__ import annotations

import logging
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from measuring import publish, setup, table

from d1lit.rewards import formats
from d1lit.rewards.countdown import CountdownSolved
from d1lit.rewards.math_answers import MathAnswer
from d1lit.rewards.math_process import MathVerify
from d1lit.rewards.number_answers import IntegerAnswer, NumberAnswer
from d1lit.rewards.sudoku import CellShare, GivensKept, SudokuSolved
from d1lit.types import Example, Reward

Naive = Callable[[str, Example], float]
GSM8K: Example = {"answer": "18"}
MATH: Example = {"answer": "x^2+\\frac{1}{2}", "question": "Find it."}
COUNTDOWN: Example = {"numbers": [95, 88, 64], "target": 119}
SUDOKU: Example = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\s*$", re.DOTALL)
_SOFT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>\s*", re.DOTALL)
_ARITHMETIC = re.compile(r"[\d+\-*/() ]+")
_PIECES = (
    *(
        "<answer>",
        "</answer>",
        "<reasoning>",
        "</reasoning>",
        "\\boxed{",
        "}",
        "{",
        "\n",
        " ",
        "=",
        "\\frac{",
        "\\sqrt",
    ),
    *(
        "9**9**9**9",
        "x^{99}",
        "\\pm",
        "\\pi",
        "x",
        "18",
        "1,200",
        "-3",
        "0.5",
        "95",
        "+",
        "*",
        "(",
        ")",
        "1e309",
        "\x00",
    ),
)


def naive_answer(text: str) -> str:
    """The last pair of tags, as a regular expression finds it."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else ""


def naive_number(text: str, example: Example) -> float:
    """Python's float of the answer."""
    try:
        return float(float(naive_answer(text)) == float(example["answer"]))
    except ValueError:
        return 0.0


def naive_math(text: str, example: Example) -> float:
    """math-verify in this process, its alarm off."""
    from math_verify import parse, verify

    gold, answer = (parse(f"${side}$", parsing_timeout=0) for side in (example["answer"], naive_answer(text)))
    return float(verify(gold, answer, timeout_seconds=None))


def naive_countdown(text: str, example: Example) -> float:
    """`eval` after a look at the characters."""
    answer = naive_answer(text)
    used = sorted(map(int, re.findall(r"\d+", answer)))
    if used != sorted(example["numbers"]) or not _ARITHMETIC.fullmatch(answer):
        return 0.0
    return float(eval(answer, {"__builtins__": {}}) == example["target"])  # noqa: S307 - that is what is compared


def naive_sudoku(text: str, example: Example) -> float:
    """The digits of the answer against the one stored solution."""
    return float("".join(re.findall(r"\d", naive_answer(text))) == example["solution"])


@dataclass(frozen=True)
class Case:
    """A reward with a right answer of its row; the naive way, and whether hostile texts may be given to it."""

    name: str
    reward: Reward
    example: Example
    answers: tuple[str, ...]
    naive: Naive | None = None
    is_bounded: bool = True


def cases() -> list[Case]:
    """Every reward of ours that judges a text alone; d1's stand in the golden tests."""
    numbers, expressions, grids = (
        ("18", "$18.00", "17"),
        ("95+88-64", "95 + 88 - 64 = 119", "95*88"),
        ("3142243142131324",),
    )
    forms = ("x^2+0.5", "\\frac{2x^2+1}{2}", "x^2-\\frac12", "\\frac12+x^2")
    return [
        Case("number", NumberAnswer(), GSM8K, numbers, naive_number),
        Case("integer", IntegerAnswer(), GSM8K, numbers),
        Case(
            "math, by spelling", MathAnswer(MathVerify()), MATH, (MATH["answer"], "x^2 + \\dfrac12"), naive_math, False
        ),
        Case("math, by algebra", MathAnswer(MathVerify()), MATH, forms, naive_math, False),
        Case("countdown", CountdownSolved(), COUNTDOWN, expressions, naive_countdown, False),
        Case("sudoku", SudokuSolved(), SUDOKU, grids, naive_sudoku),
        Case("cell share", CellShare(), SUDOKU, grids),
        Case("givens kept", GivensKept(), SUDOKU, grids),
        Case("strict format", formats.StrictFormat(""), GSM8K, numbers, lambda t, _: float(bool(_STRICT.match(t)))),
        Case("soft format", formats.SoftFormat(""), GSM8K, numbers, lambda t, _: float(bool(_SOFT.fullmatch(t)))),
        Case("tag count", formats.TagCount("", 0.004), GSM8K, numbers),
        Case("boxed in tags", formats.BoxedInTags(1.0, 0.75, 0.5, 0.25), MATH, forms),
    ]


def texts_of(case: Case, count: int) -> dict[str, list[str]]:
    """Ordinary completions of about 250 tokens, random rubbish, and marks repeated up to 20,000 characters."""
    generator = random.Random(f"texts {case.name}")
    reasoning = "So we take what is given and compute step by step. " * 20
    ordinary = [
        f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{generator.choice(case.answers)}\n</answer>"
        for _ in range(count)
    ]
    rubbish = ["".join(generator.choices(_PIECES, k=generator.randint(0, 24))) for _ in range(count)]
    rubbish = [f"<answer>{text}</answer>" if n % 2 else text for n, text in enumerate(rubbish)]
    marks = ("<answer>", "<reasoning>", "\\boxed{", "<reasoning></reasoning><answer>", "{", "(", "\n</answer>")
    repeated = [mark * (20_000 // len(mark)) for mark in marks]
    return {"ordinary": ordinary, "random": rubbish, "repeated marks": repeated}


def used(worker: MathVerify | None) -> float:
    """Processor seconds of this process and of the worker's, ended ones too."""
    total = time.process_time()
    if worker is not None:
        parent, child = map(psutil.Process, worker.pids)
        ended = parent.cpu_times()
        total += ended.children_user + ended.children_system + sum(child.cpu_times()[:2])
    return total


def rate(run: Callable[[], object], count: int, rounds: int, worker: MathVerify | None = None) -> tuple[float, float]:
    """Texts a second of processor time, and by the clock: medians over rounds, after a run that warms up."""
    run()
    taken = []
    for _ in range(rounds):
        clock, processor = time.perf_counter(), used(worker)
        run()
        taken.append((used(worker) - processor, time.perf_counter() - clock))
    return tuple(count / max(statistics.median(column), 1e-9) for column in zip(*taken, strict=True))  # type: ignore[return-value]


def measure(case: Case, kind: str, texts: list[str], rounds: int) -> dict[str, Any]:
    """One reward on one kind of texts."""
    worker = case.reward.equivalence if isinstance(case.reward, MathAnswer) else None
    if isinstance(worker, MathVerify):
        worker.start()
    examples = [case.example] * len(texts)
    by_processor, by_clock = rate(lambda: case.reward(texts, examples), len(texts), rounds, worker)  # type: ignore[arg-type]
    found: dict[str, Any] = {"reward": case.name, "texts": kind, "ours": by_processor, "ours_by_clock": by_clock}
    found |= {"naive": None, "ours_paid": sum(v.value for v in case.reward(texts, examples)), "naive_paid": None}
    naive = case.naive
    if naive is not None and (case.is_bounded or kind == "ordinary"):
        found["naive"], _ = rate(lambda: [naive(text, case.example) for text in texts], len(texts), rounds)
        found["naive_paid"] = sum(naive(text, case.example) for text in texts)
    if isinstance(worker, MathVerify):
        worker.close()
    return found


HEADINGS = ("reward", "texts", "ours, a second", "by the clock", "naive, a second", "ours / naive", "paid: ours, naive")


def line(found: dict[str, Any]) -> list[Any]:
    """For the table."""
    naive, paid = found["naive"], [found["ours_paid"], found["naive_paid"]]
    columns = [f"{found['ours']:,.0f}", f"{found['ours_by_clock']:,.0f}", "" if naive is None else f"{naive:,.0f}"]
    ratio = "" if naive is None else found["ours"] / naive
    return [found["reward"], found["texts"], *columns, ratio, ", ".join("-" if p is None else f"{p:g}" for p in paid)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    chosen = setup("graders", arguments, rounds=3)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every comparison without its alarm
    count = 5 if chosen.quick else 300
    records = [
        measure(case, kind, texts, chosen.rounds) for case in cases() for kind, texts in texts_of(case, count).items()
    ]
    publish("graders", chosen, [table(HEADINGS, [line(record) for record in records])], records)


if __name__ == "__main__":
    main()
