"""Programs, judged by running their row's tests in the sandbox.

A row has `prompt` (code that comes first, such as the signature to complete; may be empty), `setup`, `tests` and
`entry_point`. A program that loops, crashes or breaks a limit is a wrong answer. Only a row whose own tests cannot be
run, or a sandbox that fails, is an `error`, which is no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from d1lit.rewards.extract import answer_block, pairs_between, until_end_of_text
from d1lit.rewards.parts import Grader
from d1lit.rewards.rows import judge_rows
from d1lit.rewards.sandbox import Job, Limits, Report, Sandbox
from d1lit.types import Example, Verdict

LONGEST_PROGRAM = 20_000
"""Characters; a longer one is no answer."""
_MOST_KNOWN = 4096
_FENCE = "```"


def program_of(completion: str) -> str | None:
    """The program a completion commits itself to: the last fenced block of its answer, or the whole answer.

    Without an answer block the last fenced block of the text counts; bare text is never taken for a program.
    """
    block = answer_block(completion)
    text = until_end_of_text(completion) if block is None else block
    fenced = list(pairs_between(text, _FENCE, _FENCE))
    if fenced:
        program = _without_language(fenced[-1])
    elif block is None:
        return None
    elif _FENCE in block:
        program = _without_language(block.split(_FENCE, 1)[1])  # cut off before the fence closed
    else:
        program = block
    return program.strip("\n") if program.strip() and len(program) <= LONGEST_PROGRAM else None


def first_python_block(completion: str) -> str | None:
    """The program that d1's code reward reads: the first block fenced as Python, wherever it stands."""
    program = next(pairs_between(until_end_of_text(completion), f"{_FENCE}python", _FENCE), None)
    return program if program and len(program) <= LONGEST_PROGRAM else None


def _without_language(fenced: str) -> str:
    first, newline, rest = fenced.partition("\n")
    return rest if newline and first.strip().isalnum() else fenced


class Runs:
    """Runs of programs in one sandbox; a program that several parts of a reward ask about is run once."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._known: dict[Job, Report] = {}

    def __call__(self, programs: Sequence[str | None], examples: Sequence[Example]) -> list[Report | None]:
        """The report of each program; None where there is none."""
        jobs = [None if p is None else _job(p, row) for p, row in zip(programs, examples, strict=True)]
        new = list(dict.fromkeys(job for job in jobs if job is not None and job not in self._known))
        found = dict(zip(new, self.sandbox.run_all(new), strict=True))
        while len(self._known) + len(found) > _MOST_KNOWN and self._known:
            del self._known[next(iter(self._known))]
        reports = [None if job is None else found.get(job) or self._known[job] for job in jobs]
        self._known |= {job: report for job, report in found.items() if report.outcome != "broken"}
        return reports


def _job(program: str, row: Example) -> Job:
    prompt = row["prompt"]
    return Job(f"{prompt}\n{program}\n", prompt, row["setup"], tuple(row["tests"]), row["entry_point"])


def sandbox_runs(seconds: float, memory_mb: int, allow_weak: bool, workers: int | None = None) -> Runs:
    """The runs of a sandbox; the same one for the same arguments, so that reward parts and grader share them.

    Args:
        seconds: wall clock of a program and all its tests.
        memory_mb: address space of each process.
        allow_weak: run with limits and filtered system calls alone where the machine allows no namespaces.
        workers: programs at a time; None for one a processor core.
    """
    return _shared_runs(seconds, memory_mb, allow_weak, workers)


@lru_cache(maxsize=8)
def _shared_runs(seconds: float, memory_mb: int, allow_weak: bool, workers: int | None) -> Runs:
    return Runs(Sandbox(Limits(seconds=seconds, memory=memory_mb * 2**20), allow_weak, workers=workers))


def _verdict(program: str | None, report: Report | None, value: Callable[[Report], float]) -> Verdict:
    if report is None:
        return Verdict(0.0, "unparsed")
    return Verdict(0.0, "error", program) if report.outcome == "broken" else Verdict(value(report), "ok", program)


@dataclass(frozen=True)
class TestsPassed:
    """1 where the program passes every test, else 0.

    Args:
        runs: where programs are run.
        read: finds the program in a completion.
    """

    __test__ = False  # pytest: a reward, not a test
    runs: Runs
    read: Callable[[str], str | None] = program_of

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        programs = [self.read(text) for text in completions]
        reports = self.runs(programs, examples)
        return [_verdict(p, r, lambda r: float(r.all_passed)) for p, r in zip(programs, reports, strict=True)]


@dataclass(frozen=True)
class TestsShare:
    """Share of the tests that the program passes (d1, arXiv 2504.12216, pays this for code)."""

    __test__ = False
    runs: Runs

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        programs = [program_of(text) for text in completions]
        reports = self.runs(programs, examples)
        return [_verdict(p, r, lambda r: r.passed / r.total) for p, r in zip(programs, reports, strict=True)]


@dataclass(frozen=True)
class StoppedAtLimit:
    """1 where the program was stopped at its time limit: a measure, not a reward."""

    runs: Runs

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        programs = [program_of(text) for text in completions]
        reports = self.runs(programs, examples)
        return [_verdict(p, r, lambda r: float(r.outcome == "late")) for p, r in zip(programs, reports, strict=True)]


@dataclass(frozen=True)
class FencedInTags:
    """1 where the answer tags are closed and hold exactly one fenced block (d1's format bonus for code)."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return judge_rows(lambda text, row: Verdict(float(_is_fenced(text))), completions, examples)


def _is_fenced(completion: str) -> bool:
    block = answer_block(completion)
    closed = "</answer>" in until_end_of_text(completion).rpartition("<answer>")[2]
    return block is not None and closed and block.count(_FENCE) == 2


def code_grader(seconds: float = 3.0, memory_mb: int = 512, allow_weak: bool = False) -> Grader:
    """Grader of programs; the second verdict reads the program as d1's reward does, and runs it in our sandbox.

    Args:
        seconds: wall clock of a program and all its tests.
        memory_mb: address space of each process.
        allow_weak: see `sandbox_runs`.
    """
    runs = sandbox_runs(seconds, memory_mb, allow_weak)
    measures = {"tests_passed": TestsShare(runs), "stopped": StoppedAtLimit(runs)}
    return Grader(TestsPassed(runs), TestsPassed(runs, first_python_block), measures)
