"""Any text through every reward: a verdict each time, in time, with no memory kept.

The quick form takes 1,000 completions; `pytest -m nightly` takes 100,000; D1LIT_FUZZ=1000000 makes it the nightly million.
The one reward that asks another process (math-verify, some milliseconds a question) takes a fifth of the first two;
D1LIT_FUZZ=100000 gives it all of them.
"""

import contextlib
import os
import random
import resource
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from d1lit.rewards import d1_countdown, d1_gsm8k, d1_math, d1_sudoku, formats
from d1lit.rewards.countdown import CountdownAttempt, CountdownSolved
from d1lit.rewards.math_answers import MathAnswer
from d1lit.rewards.math_process import MathVerify
from d1lit.rewards.number_answers import IntegerAnswer, NumberAnswer
from d1lit.rewards.sudoku import CellShare, GivensKept, SudokuSolved
from d1lit.types import Reward

SECONDS = 1.0
MARGIN = 0.2
BUSY = 10.0
"""How many times slower by the clock the machine may be while it does other things."""
MEMORY_GROWTH = 200 * 2**20

GSM8K = {"answer": "18", "question": "How many?", "solution": "9*2=18\n#### 18"}
MATH = {"answer": "x^2+\\frac{1}{2}", "question": "Find $x$."}
COUNTDOWN = {"numbers": [95, 88, 64], "target": 119, "answer": "119"}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324", "answer": "3142243142131324"}

REWARDS: dict[str, tuple[Reward, dict[str, Any]]] = {
    "number": (NumberAnswer(), GSM8K),
    "integer": (IntegerAnswer(), GSM8K),
    "strict_format": (formats.StrictFormat(""), GSM8K),
    "soft_format": (formats.SoftFormat(""), GSM8K),
    "tag_count": (formats.TagCount("", 0.004), GSM8K),
    "boxed_in_tags": (formats.BoxedInTags(1.0, 0.75, 0.5, 0.25), MATH),
    "math": (MathAnswer(MathVerify(SECONDS)), MATH),
    "countdown": (CountdownSolved(), COUNTDOWN),
    "countdown_attempt": (CountdownAttempt(CountdownSolved(), 0.1), COUNTDOWN),
    "sudoku": (SudokuSolved(), SUDOKU),
    "cell_share": (CellShare(), SUDOKU),
    "givens_kept": (GivensKept(), SUDOKU),
    "d1_gsm8k_correctness": (d1_gsm8k.D1Gsm8kCorrectness(), GSM8K),
    "d1_gsm8k_integer": (d1_gsm8k.D1Gsm8kInteger(), GSM8K),
    "d1_strict_format": (d1_gsm8k.D1StrictFormat(), GSM8K),
    "d1_soft_format": (d1_gsm8k.D1SoftFormat(), GSM8K),
    "d1_tag_count": (d1_gsm8k.D1TagCount(), GSM8K),
    "d1_gsm8k_evaluation": (d1_gsm8k.D1Gsm8kEvaluation(), GSM8K),
    "d1_math_correctness": (d1_math.D1MathCorrectness(), MATH),
    "d1_math_format": (d1_math.D1MathFormat(), MATH),
    "d1_math_evaluation": (d1_math.D1MathEvaluation(), MATH),
    "d1_countdown": (d1_countdown.D1CountdownReward(), COUNTDOWN),
    "d1_countdown_evaluation": (d1_countdown.D1CountdownEvaluation(), COUNTDOWN),
    "d1_sudoku": (d1_sudoku.D1SudokuReward(), SUDOKU),
    "d1_sudoku_evaluation": (d1_sudoku.D1SudokuEvaluation(), SUDOKU),
}

PIECES = [
    "<answer>",
    "</answer>",
    "<reasoning>",
    "</reasoning>",
    "\\boxed{",
    "\\boxed ",
    "\\fbox{",
    "}",
    "{",
    "\n",
    " ",
    "=",
    "####",
    "\\frac{",
    "\\frac",
    "\\sqrt",
    "\\sqrt[3]{",
    "\\text{ cm}",
    "\\text{",
    "^",
    "_",
    "9**9**9**9",
    "95**88**64",
    "5^{5^{5^{5^5}}}",
    "2^{30^5}",
    "10!",
    "9999!",
    "\\int_0^1",
    "\\sum_{n=1}^{\\infty}",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    "\\left(",
    "\\right)",
    "\\pm",
    "\\infty",
    "\\cup",
    "x",
    "y",
    "\\pi",
    "\u0663",
    "\uff11",
    "\u00b2",
    "\u2460",
    "\x00",
    "\ud800",
    "\udfff",
    "\u202e",
    "\U0001f600",
    "18",
    "1,200",
    "-3",
    "0.5",
    ".",
    ",",
    ";",
    "$",
    "%",
    "95",
    "88",
    "64",
    "119",
    "+",
    "-",
    "*",
    "/",
    "//",
    "**",
    "(",
    ")",
    "[",
    "]",
    "1e309",
    "nan",
    "inf",
    "3142243142131324",
    "0000",
    "```",
    "|",
    "<|eot_id|>",
    "<|endoftext|>",
    "\\",
    "\\\\",
    "a",
    "and",
    "or",
    "not",
    "\r\n",
    "\t",
    "<",
    ">",
    "\\leq",
    "x=",
    "f(x)=",
    "1_000",
    "0x",
    "j",
    "'",
    '"',
    "#",
    "\\!",
    "{,}",
]

LARGE = [
    "<answer>" * 10_000,
    "</answer>" * 10_000,
    "<answer></answer>" * 10_000,
    "\\boxed{" * 10_000,
    "\\boxed{" * 5_000 + "}" * 5_000,
    "a" * 1_000_000,
    "1" * 1_000_000,
    "(" * 100_000,
    "<answer>" + "(" * 100_000,
    "<answer>" + "-" * 100_000 + "1</answer>",
    "<answer>" + "9" * 100_000 + "</answer>",
    "<answer>95+88-64" + " " * 1_000_000 + "</answer>",
    "\\frac{" * 20_000 + "1",
    "<answer>" + "\\frac{1}{" * 40 + "1" + "}" * 40 + "</answer>",
    "<answer>" + "{" * 380 + "</answer>",
    "=" * 1_000_000,
    "0123456789+-*/() " * 60_000,
    ("1+" * 500_000) + "=",
    "\n" * 1_000_000,
    "```" * 300_000,
    "<answer>" + "```1" * 200_000,
    "<reasoning>\n" * 80_000,
    "<reasoning>" + "</reasoning>" * 80_000,
    "\n</answer>\n" * 90_000,
    "<answer>" + "aa " * 130 + "!</answer>",
    "<answer>1 " + "aaaaaaaaaa." * 35 + "!</answer>",
    "<answer>" + "9**9**" * 40 + "9</answer>",
    "<answer>95**88**64</answer>",
    "<answer>" + "2^{" * 100 + "2" + "}" * 100 + "</answer>",
    "<answer>x^{9999999}+\\frac12</answer>",
    "<answer>" + "x+" * 190 + "x</answer>",
    "<answer>(x+1)^{500}</answer>",
    "<answer>\\sum_{n=1}^{999999} n^n</answer>",
    "<answer>\\int \\frac{1}{x^{17}+x^3+1} dx</answer>",
    "<answer>10^{10^{10}}x</answer>",
    "<answer>\\sin(\\sin(\\sin(\\sin(x^{99}))))</answer>",
    "<answer>999999!x</answer>",
    "<answer>" + "\\sqrt{" * 60 + "x" + "}" * 60 + "</answer>",
    "\\boxed" * 150_000,
    "\\boxed " * 100_000,
    "#### " * 200_000,
    "<answer>" + ",".join(["1"] * 190) + "</answer>",
    "<answer>" + "1," * 190 + "</answer>",
    "\ud800" * 100_000,
    "\x00" * 1_000_000,
    "<answer>x" + "!" * 300 + "</answer>",
    "1234123412341234" * 60_000,
    "5 = " * 200_000,
    "." * 1_000_000,
    "\\boxed{.}" * 100_000,
]


def how_many(name: str, total: int) -> int:
    """Texts for a reward: a fifth where each may cost a question to math-verify's process."""
    return total // 5 if name == "math" else total


def completion(generator: random.Random) -> str:
    """A random text of marks, mathematics and rubbish; half of them have an answer block."""
    text = "".join(generator.choices(PIECES, k=generator.randint(0, 24)))
    return f"<reasoning>\nr\n</reasoning>\n<answer>\n{text}\n</answer>" if generator.random() < 0.5 else text


def peak_memory() -> int:
    """The most memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker_of(reward: Reward) -> MathVerify | None:
    """The process that a reward asks, if it asks one."""
    return reward.equivalence if isinstance(reward, MathAnswer) and isinstance(reward.equivalence, MathVerify) else None


def processor_seconds(worker: MathVerify | None) -> float:
    """What this process and the worker's children have used so far."""
    used = time.process_time()
    if worker is not None:
        parent, child = worker.pids
        ended = psutil.Process(parent).cpu_times()
        used += ended.children_user + ended.children_system
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(psutil.Process(child).cpu_times()[:2])
    return used


def worker_memory(worker: MathVerify | None) -> dict[int, int]:
    """Resident bytes of the worker's processes, by their ids."""
    found = {}
    for pid in worker.pids if worker is not None else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[pid] = psutil.Process(pid).memory_info().rss
    return found


def check(name: str, texts: list[str], memory_growth: int = MEMORY_GROWTH) -> None:
    """Run the texts one at a time; bound the longest, the failures and the memory.

    A deadline is processor time, so that a busy machine fails no test; by the clock there is the worker's own limit.
    """
    reward, row = REWARDS[name]
    worker = worker_of(reward)
    if worker is not None:
        worker.start()
    before, outcomes, slowest = peak_memory(), Counter[str](), ""
    longest = longest_by_clock = 0.0
    first, kept = worker_memory(worker), 0
    for text in texts:
        start, used = time.perf_counter(), processor_seconds(worker)
        (verdict,) = reward([text], [row])
        seconds, clock = processor_seconds(worker) - used, time.perf_counter() - start
        outcomes[verdict.outcome] += 1
        assert -len(text) - 1 <= verdict.value <= verdict.out_of or name.startswith("d1_")
        longest_by_clock = max(longest_by_clock, clock)
        for pid, held in worker_memory(worker).items():
            kept = max(kept, held - first.setdefault(pid, held))
        if seconds > longest:
            longest, slowest = seconds, text[:60]
    grown = peak_memory() - before
    print(
        f"{name}: {len(texts)} texts {dict(outcomes)}, longest {longest * 1e3:.1f} ms of processor "
        f"({longest_by_clock * 1e3:.1f} ms by the clock) {slowest!r}, +{grown >> 20} MB, "
        f"worker +{kept >> 20} MB"
    )
    assert longest < SECONDS + MARGIN
    assert longest_by_clock < ((SECONDS + MARGIN) * BUSY if worker is None else worker.wall_seconds + MARGIN)
    assert grown < memory_growth
    assert kept < memory_growth


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_hostile_texts_of_any_size_get_a_verdict_in_time(name: str) -> None:
    check(name, LARGE)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_random_texts_get_a_verdict_in_time(name: str) -> None:
    generator = random.Random(f"fuzz {name}")
    check(name, [completion(generator) for _ in range(how_many(name, 1_000))])


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(REWARDS))
def test_very_many_random_texts_get_a_verdict_in_time(name: str) -> None:
    generator = random.Random(f"long fuzz {name}")
    asked = os.environ.get("D1LIT_FUZZ")
    total = how_many(name, 100_000) if asked is None else int(asked)
    for start in range(0, total, 10_000):
        check(name, [completion(generator) for _ in range(min(10_000, total - start))])
