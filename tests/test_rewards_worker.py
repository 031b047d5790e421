"""The math-verify worker: verdicts, deadlines, deaths, memory, forks."""

import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from d1lit.rewards import math_worker
from d1lit.rewards.math_answers import MathAnswer
from d1lit.rewards.math_process import MathVerify, _Gone, _Worker

SLOW = "9^{9^{9}}"
"""One C call of big integers that no signal interrupts (compare sympy#24187)."""
EQUAL = [("2\\sqrt{3}", "\\sqrt{12}"), ("x+1", "1+x"), ("\\frac{x+2}{7}", "\\frac{x}{7}+\\frac{2}{7}")]
UNEQUAL = [("2\\sqrt{3}", "\\sqrt{13}"), ("x+1", "1-x"), ("\\sqrt{2}", "1.414214")]


@pytest.fixture(scope="module")
def judge() -> Iterator[MathVerify]:
    judge = MathVerify(seconds=1.0)
    judge.start()
    yield judge
    judge.close()


def test_expressions_are_compared(judge: MathVerify) -> None:
    assert [judge(*pair).value for pair in EQUAL] == [1.0] * len(EQUAL)
    assert [judge(*pair).value for pair in UNEQUAL] == [0.0] * len(UNEQUAL)
    assert all(judge(*pair).outcome == "ok" for pair in (*EQUAL, *UNEQUAL))


@pytest.mark.parametrize("answer", ["\u0663x^2", "x=)f(x)=", "\\sqrt[3]{(x[", "\x00"])
def test_an_answer_that_is_no_mathematics_is_unparsed(judge: MathVerify, answer: str) -> None:
    verdict = judge("x+1", answer)
    assert (verdict.value, verdict.outcome) == (0.0, "unparsed")


def test_a_gold_answer_that_cannot_be_read_is_the_judges_failure(judge: MathVerify) -> None:
    """math-verify reads nothing in this gold answer of MATH; no answer is wrong because of that."""
    assert judge("\\frac\\pi4+2-\\sqrt{2}", "\\sqrt{3}").outcome == "error"


def test_a_fault_in_reading_is_an_error_and_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    math_verify = pytest.importorskip("math_verify")

    def fails(*arguments: object, **options: object) -> None:
        raise AttributeError("a fault of the judge")

    monkeypatch.setattr(math_verify, "parse", fails)
    with pytest.raises(AttributeError):
        math_worker.compare("x+1", "1+x")


def processor_seconds(judge: MathVerify) -> float:
    """What the worker's children have used so far, the serving one and those that ended."""
    parent, child = judge.pids
    ended = psutil.Process(parent).cpu_times()
    used = ended.children_user + ended.children_system
    with contextlib.suppress(psutil.NoSuchProcess):
        used += sum(psutil.Process(child).cpu_times()[:2])
    return used


def test_a_comparison_past_its_deadline_is_a_timeout_and_the_worker_is_back_at_once(judge: MathVerify) -> None:
    judge.start()
    before, start = processor_seconds(judge), time.monotonic()
    verdict = judge("9^{9}", SLOW)
    spent, took = processor_seconds(judge) - before, time.monotonic() - start
    assert (verdict.outcome, verdict.value) == ("timeout", 0.0)
    before, start = processor_seconds(judge), time.monotonic()
    assert judge("x+1", "1+x").value == 1.0
    again, back = processor_seconds(judge) - before, time.monotonic() - start
    print(
        f"deadline 1.0 s of processor time: {spent:.2f} s spent, {took:.3f} s by the clock; "
        f"the next verdict: {again:.2f} s spent, {back * 1e3:.0f} ms by the clock"
    )
    assert 0.9 < spent < 1.2
    assert again < 0.5
    assert took < judge.wall_seconds


def stop_for(judge: MathVerify, seconds: float) -> None:
    """Keep the serving child from running for a while, as a machine with other work does."""
    child = judge.pids[1]
    os.kill(child, signal.SIGSTOP)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGCONT)


def test_a_busy_machine_changes_no_verdict() -> None:
    """The worker gets no processor for three times its deadline, in the middle of a comparison."""
    judge = MathVerify(seconds=0.3)
    judge.start()
    pair = ("5x-7y+11z+4=0", "10x-14y+22z+8=0")
    try:
        thread = threading.Thread(target=stop_for, args=(judge, 0.9))
        thread.start()
        time.sleep(0.05)
        start = time.monotonic()
        verdict = judge(*pair)
        took = time.monotonic() - start
        thread.join()
        print(f"answered after {took:.2f} s by the clock with a deadline of 0.3 s")
        assert took > 0.7
        assert (verdict.value, verdict.outcome) == (1.0, "ok")
    finally:
        judge.close()


def test_a_worker_that_waits_for_ever_is_ended_by_the_clock() -> None:
    judge = MathVerify(seconds=0.3, wall_seconds=0.6)
    judge.start()
    try:
        os.kill(judge.pids[1], signal.SIGSTOP)
        start = time.monotonic()
        verdict = judge("x+1", "1+x")
        took = time.monotonic() - start
        assert (verdict.value, verdict.outcome) == (0.0, "timeout")
        assert 0.6 <= took < 0.6 + 0.2
        judge.wall_seconds = 60.0
        assert judge("x+1", "1+x").value == 1.0
    finally:
        judge.close()


def test_children_that_never_serve_end_the_worker_instead_of_being_forked_for_ever() -> None:
    start = time.monotonic()
    with pytest.raises(_Gone):
        _Worker(seconds=1.0, memory=2**70)  # no such limit can be set: each child ends at once
    print(f"given up after {time.monotonic() - start:.1f} s")


@pytest.mark.parametrize(("seconds", "wall_seconds"), [(0.0, None), (-1.0, None), (2.0, 1.0)])
def test_limits_that_cannot_hold_are_refused(seconds: float, wall_seconds: float | None) -> None:
    with pytest.raises(ValueError, match="processor time"):
        MathVerify(seconds, wall_seconds=wall_seconds)


@pytest.mark.parametrize("victim", ["child", "whole worker"])
def test_a_worker_killed_in_the_middle_of_a_batch_costs_no_verdict(judge: MathVerify, victim: str) -> None:
    judge.start()
    pairs = [(f"x+{i}", f"{i + (i % 3 == 0)}+x") for i in range(1, 65)]
    rows = [{"answer": gold, "question": ""} for gold, _ in pairs]
    texts = [f"<answer>{answer}</answer>" for _, answer in pairs]
    reward = MathAnswer(judge)
    wanted = [float(i % 3 != 0) for i in range(1, 65)]
    assert [v.value for v in reward(texts, rows)] == wanted
    parent, child = judge.pids

    def kill() -> None:
        time.sleep(0.05)
        os.kill(parent if victim == "whole worker" else child, signal.SIGKILL)
        if victim == "whole worker":
            os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    verdicts = []
    while killer.is_alive() or not verdicts:
        verdicts = reward(texts, rows)
        assert [v.value for v in verdicts] == wanted
        assert all(v.outcome == "ok" for v in verdicts)
    killer.join()
    assert [v.value for v in reward(texts, rows)] == wanted
    assert judge.pids != (parent, child)


def test_the_workers_memory_stays_below_its_limit() -> None:
    limit = 400 * 2**20
    judge = MathVerify(seconds=1.0, memory=limit)
    judge.start()
    largest = 0
    assert psutil.Process(judge.pids[1]).rlimit(psutil.RLIMIT_AS) == (limit, limit)
    try:
        thread = threading.Thread(target=judge, args=("9^{9}", SLOW))
        thread.start()
        while thread.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                largest = max(largest, psutil.Process(judge.pids[1]).memory_info().vms)
            time.sleep(0.005)
        thread.join()
        print(f"largest address space seen {largest / 2**20:.0f} MB of {limit / 2**20:.0f} MB")
        assert 0 < largest <= limit
        assert judge("x+1", "1+x").value == 1.0
    finally:
        judge.close()


def test_closing_leaves_nothing_behind_and_the_next_call_starts_again() -> None:
    judge = MathVerify()
    judge.start()
    first = judge.pids
    judge.close()
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in first) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(psutil.pid_exists(pid) for pid in first)
    assert judge("x+1", "1+x").value == 1.0
    judge.close()


def test_the_worker_ends_when_its_client_dies() -> None:
    """A trainer killed with SIGKILL runs no clean-up; the closed socket ends the worker."""
    reader, writer = os.pipe()
    client = os.fork()
    if client == 0:
        judge = MathVerify()
        judge.start()
        os.write(writer, f"{judge.pids[0]} {judge.pids[1]}".encode())
        time.sleep(60)
        os._exit(0)
    pids = [int(pid) for pid in os.read(reader, 100).split()]
    os.kill(client, signal.SIGKILL)
    os.waitpid(client, 0)
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids):
        assert time.monotonic() < deadline, "the worker outlived its client"
        time.sleep(0.02)


def test_a_forked_process_gets_a_worker_of_its_own(judge: MathVerify) -> None:
    judge.start()
    before = judge.pids
    child = os.fork()
    if child == 0:
        right = judge("x+1", "1+x").value == 1.0 and judge.pids[0] != before[0]
        judge.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert judge("x+1", "1+x").value == 1.0
    assert judge.pids == before


def test_it_works_in_threads_and_survives_pickling(judge: MathVerify) -> None:
    copy = pickle.loads(pickle.dumps(judge))  # noqa: S301 - our own object
    assert copy.__getstate__() == judge.__getstate__() and copy.pids == ()
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(judge("x+1", "1+x").value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0] * 8
