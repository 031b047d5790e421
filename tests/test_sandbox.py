"""Hostile programs behind the sandbox's walls: each stopped in time, paid nothing, and gone without a trace."""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from d1lit.rewards import sandbox_roles
from d1lit.rewards.sandbox import Job, Limits, Report, Sandbox, SandboxError

SECONDS = 1.0
LIMITS = Limits(seconds=SECONDS, memory=256 * 2**20)
RIGHT = "def f(x):\n    return x + 1\n"
TESTS = ("assert f(2) == 3", "assert f(-1) == 0")


def readable_python() -> str:
    """An interpreter that an unknown user can read; the tests' own where it is in nobody's home."""
    for python in (sys.executable, "/usr/bin/python3"):
        path = Path(os.path.realpath(python))
        if path.exists() and all(parent.stat().st_mode & 0o005 == 0o005 for parent in path.parents):
            return python
    pytest.skip("weak mode as root needs an interpreter that other users can read")


@pytest.fixture(scope="module", params=["walls", "limits only"])
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """The sandbox with all its walls, and with limits alone."""
    if request.param == "walls":
        sandbox = Sandbox(LIMITS, workers=2)
        try:
            print(sandbox.protection.line())
        except SandboxError as error:
            pytest.skip(str(error))
    else:
        sandbox = Sandbox(LIMITS, force_weak=True, workers=2, python=readable_python())
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def walls() -> Iterator[Sandbox]:
    """The sandbox with all its walls and room for eight processes a program."""
    sandbox = Sandbox(Limits(seconds=SECONDS, memory=256 * 2**20, processes=8), workers=1)
    try:
        _ = sandbox.protection
    except SandboxError as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.close()


def run(sandbox: Sandbox, program: str, tests: tuple[str, ...] = TESTS, prompt: str = "", setup: str = "") -> Report:
    """Run a program, and check that it was over in time and left no process behind."""
    _ = sandbox.protection  # the warden is up before the clock starts
    below = {p.pid for p in psutil.Process().children(recursive=True)}
    start = time.monotonic()
    report = sandbox.run(Job(program, prompt, setup, tests, "f"))
    took = time.monotonic() - start
    left = {p.pid for p in psutil.Process().children(recursive=True)} - below
    print(f"{report} after {took:.3f} s")
    assert took < SECONDS + 1.0
    assert not left
    return report


HOSTILE = {
    "forged verdict on stdout": 'print(\'{"passed": 2, "total": 2, "broken": null}\'); raise SystemExit',
    "exit 0": "import os\nos._exit(0)",
    "exit 0 when called": "import os\ndef f(x):\n    os._exit(0)",
    "system exit when called": "import sys\ndef f(x):\n    sys.exit(0)",
    "verdict to every descriptor": (
        "import os\n"
        "for d in range(64):\n"
        "    try:\n"
        '        os.write(d, b\'{"passed": 2, "total": 2, "broken": null, "failure": null}\\n\')\n'
        "    except OSError:\n"
        "        pass\n"
        "os._exit(0)"
    ),
    "an object equal to everything": "class E:\n    __eq__ = lambda s, o: True\ndef f(x):\n    return E()",
    "a number equal to everything": "class E(int):\n    __eq__ = lambda s, o: True\ndef f(x):\n    return E(99)",
    "text equal to everything": "class E(str):\n    __eq__ = lambda s, o: True\ndef f(x):\n    return E('x')",
    "patched builtins": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 9",
    "endless loop": "while True: pass",
    "endless loop when called": "def f(x):\n    while True: pass",
    "endless output": "while True: print('x' * 10_000)",
    "ignores signals and sleeps": (
        "import signal, time\n"
        "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: time.sleep(60)"
    ),
    "ten gigabytes": "x = bytearray(10 * 2**30)\n" + RIGHT,
    "ten gigabytes bit by bit": "x = []\nwhile True: x.append(bytearray(2**20))",
    "a huge file": "file = open('big', 'wb')\nwhile True: file.write(bytes(2**20))",
    "many files": "files = [open(str(i), 'w') for i in range(1000)]\n" + RIGHT,
    "forks": "import os\nos.fork()\n" + RIGHT,
    "forks without end": "import os\nfor _ in range(200):\n    os.fork()\n" + RIGHT,
    "starts a thread": "import threading\nthreading.Thread(target=print).start()\n" + RIGHT,
    "starts a program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)\n" + RIGHT,
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)\n" + RIGHT,
    "listens": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\n" + RIGHT,
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX)\n" + RIGHT,
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.abort()",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.abort()",
    "recursion": "def f(x):\n    import sys\n    sys.setrecursionlimit(10**9)\n    return f(x)",
    "a huge answer": "def f(x):\n    return 'x' * 20_000_000",
    "a nested answer": "def f(x):\n    y = []\n    for _ in range(100_000): y = [y]\n    return y",
    "an endless answer": "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "garbage to the tests": "import os\nos.write(4, b'\\xff' * 1000)\nimport time; time.sleep(5)",
    "a lie about its length": "import os\nos.write(4, b'\\x00\\x00\\x00\\x02{]')\n" + RIGHT,
    "null bytes": "\x00",
    "half a surrogate": "x = '\ud800'\n" + "\udfff",
    "deep brackets": "(" * 100_000,
    "nothing": "",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_program_is_stopped_in_time_paid_nothing_and_gone(box: Sandbox, name: str) -> None:
    if name == "kills everything" and not (box.protection.processes or box.protection.user):
        pytest.skip("with limits alone and no user of its own, a program may kill what its user may: docs/sandbox.md")
    report = run(box, HOSTILE[name])
    assert not report.all_passed
    assert report.outcome in ("finished", "late"), report
    assert run(box, RIGHT).all_passed, "the next program suffered"


OUTSIDE = {
    "reads /etc/passwd": "open('/etc/passwd').read()",
    "reads this test": f"open({str(Path(__file__).resolve())!r}).read()",
    "reads process tables": "open('/proc/self/status').read()",
    "reads the interpreter's packages": "import numpy",
    "leaves by dots": "open('../../../../../../etc/hostname').read()",
    "writes outside": "open('/usr/lib/x', 'w')",
    "writes beside": "open('/x', 'w')",
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/box', b'tmpfs', 0, None) == 0",
    "leaves the root": "import os\nos.chroot('/box')",
    "looks for other processes": "import os\nassert any(os.path.exists(f'/proc/{n}') for n in range(1, 500))",
}


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_nothing_outside_the_box_can_be_read_or_changed(walls: Sandbox, name: str) -> None:
    assert not run(walls, f"{OUTSIDE[name]}\n{RIGHT}").all_passed


def test_what_exists_inside_is_libraries_devices_and_the_empty_box(walls: Sandbox) -> None:
    program = "import os\ndef f(x):\n    return sorted(os.listdir(x))"
    outside = {"etc", "proc", "sys", "home", "work", "var", "run", "bin"}
    tests = (
        f"assert not set(f('/')) & {outside!r}, f('/')",
        "assert f('.') == []",
        "assert f('/dev') == ['null', 'urandom', 'zero']",
    )
    assert run(walls, program, tests).all_passed
    assert run(walls, "open('note', 'w').write('x')\n" + program, ("assert f('.') == ['note']",)).all_passed
    assert run(walls, program, ("assert f('.') == []",)).all_passed, "the box was not emptied"


SEARCH = """
import gc, sys
def f(x):
    seen = [repr(o)[:10_000] for o in gc.get_objects()]
    frame = sys._getframe()
    while frame:
        seen += [repr(v)[:10_000] for v in {**frame.f_locals, **frame.f_globals}.values()]
        frame = frame.f_back
    return [s for s in seen if ''.join(['kumq', 'uat']) in s]
"""


def test_a_program_that_searches_its_memory_finds_nothing_of_the_tests(box: Sandbox) -> None:
    """Not of its own tests, and not of those of the runs before it."""
    for _ in range(2):
        assert run(box, SEARCH, ("expected = 'kumquat'\nassert f(expected[:0]) == []",)).all_passed


NAME = f"left-{os.getpid()}"
"""What /proc calls the program below and its children; a test beside this one has another."""
CHILDREN = """
import ctypes, os, signal, time
assert ctypes.CDLL(None).prctl(15, NAME, 0, 0, 0) == 0
def spawn(depth):
    if os.fork() == 0:
        os.setsid()
        for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
        if depth: spawn(depth - 1)
        time.sleep(600)
        os._exit(0)
spawn(2)
""".replace("NAME", f"b'{NAME}'")


def leftovers() -> list[psutil.Process]:
    """What of CHILDREN runs; a process that ended and waits for its parent runs no more."""
    named = [p for p in psutil.process_iter(["name", "status"]) if p.info["name"] == NAME]
    return [p for p in named if p.info["status"] != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("ending", ["while True: time.sleep(1)", "os._exit(0)", RIGHT])
def test_children_of_children_in_sessions_of_their_own_end_with_the_run(walls: Sandbox, ending: str) -> None:
    started, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            started.extend(leftovers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    report = run(walls, CHILDREN + ending)
    left = leftovers()
    done.set()
    watcher.join()
    assert not left
    if "while" in ending:  # the others are over before anybody can look
        assert started
    assert report.all_passed == (ending == RIGHT)


def test_a_fork_bomb_ends_at_its_limit_and_with_the_run(walls: Sandbox) -> None:
    """Bounded twice: by the limit of eight processes, and by its own count, should that limit not hold."""
    most = 0
    warden = psutil.Process(walls.pids[0])
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, len(warden.children(recursive=True)))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bomb = (
        "import os, time\nfor _ in range(60):\n    try: os.fork()\n    except OSError: pass\nwhile True: time.sleep(1)"
    )
    report = run(walls, bomb)
    done.set()
    watcher.join()
    print(f"at most {most} processes below the warden's shell: itself, the tests and the bomb's")
    assert report.outcome == "late"
    assert 8 <= most <= 8 + 2


def test_memory_written_is_bounded_by_the_limit_not_by_the_machine(walls: Sandbox) -> None:
    report = run(walls, "import os\nd = os.memfd_create('x')\nwhile True: os.write(d, bytes(2**20))")
    assert report.detail == "the program ended (OSError)"


def test_a_warden_that_is_killed_costs_no_verdict_and_takes_its_programs_along(walls: Sandbox) -> None:
    _ = walls.protection
    (pid,) = [p for p in walls.pids if psutil.pid_exists(p)]
    below = psutil.Process(pid).children(recursive=True)

    def kill() -> None:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = walls.run(Job("while True: pass", "", "", TESTS, "f"))
    killer.join()
    assert report.outcome == "late"
    psutil.wait_procs(below, timeout=5)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below)
    assert run(walls, RIGHT).all_passed


def test_everything_ends_when_the_client_dies(box: Sandbox) -> None:
    reader, writer = os.pipe()
    client = os.fork()
    if client == 0:
        sandbox = pickle.loads(pickle.dumps(box))  # noqa: S301 - our own object
        _ = sandbox.protection
        os.write(writer, str(sandbox.pids[0]).encode())
        sandbox.run(Job("while True: pass", "", "", TESTS, "f"))
        os._exit(0)
    shell = psutil.Process(int(os.read(reader, 20)))
    time.sleep(0.3)
    everyone = [shell, *shell.children(recursive=True)]
    assert len(everyone) >= 3
    os.kill(client, signal.SIGKILL)
    os.waitpid(client, 0)
    deadline = time.monotonic() + 5
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in everyone):
        assert time.monotonic() < deadline, "a process outlived its client"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------ honest programs


def test_honest_programs_pass_and_wrong_ones_do_not(box: Sandbox) -> None:
    assert run(box, RIGHT) == Report("finished", 2, 2)
    half = run(box, "def f(x):\n    return 3")
    assert (half.outcome, half.passed, half.total, half.detail) == ("finished", 1, 2, "AssertionError")
    assert run(box, "def f(x: return").detail == "the program ended (SyntaxError)"
    assert run(box, "def g(x): return x").passed == 0


def test_a_prompt_may_be_completed_by_its_body_and_bring_helpers(box: Sandbox) -> None:
    prompt = (
        'from typing import List\n\ndef double(x):\n    return 2 * x\n\ndef f(x: List[int]):\n    """Twice each."""\n'
    )
    check = "def check(candidate):\n    assert candidate([1, 2]) == [double(1), double(2)] == [2, 4]\n"
    assert run(box, prompt + "    return [double(i) for i in x]\n", (check,), prompt).all_passed
    assert run(box, prompt + "\ndef f(x):\n    return [2 * i for i in x]\n", (check,), prompt).all_passed
    assert not run(box, prompt + "    return x\n", (check,), prompt).all_passed


def test_every_kind_of_plain_value_crosses_unchanged(box: Sandbox) -> None:
    values = [
        None,
        True,
        0,
        -(2**200),
        1.5,
        -0.0,
        1e308,
        "",
        "é\ud800\x00",
        b"\xff",
        [],
        (1, [2]),
        {1, 2},
        {"a": (1,)},
        2j,
    ]
    tests = tuple(f"assert repr(f({value!r})) == repr({value!r})" for value in values)
    report = run(
        box, "def f(x): return x", (*tests, "assert f(float('inf')) > 1e308", "assert f(frozenset([1])) == {1}")
    )
    assert report.all_passed, report


def test_exceptions_of_the_program_can_be_tested_and_broken_tests_are_told_apart(box: Sandbox) -> None:
    raises = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    raise AssertionError"
    assert run(box, "def f(x): return 1 / x", (raises,)).all_passed
    assert not run(box, "def f(x): return 1", (raises,)).all_passed
    assert run(box, RIGHT, ("assert g(2) == 3",)).outcome == "broken"
    assert run(box, RIGHT, ("assert f(2) ==",)).outcome == "broken"
    assert run(box, RIGHT, ("import os\nos._exit(0)",)).outcome == "broken"
    assert run(box, "def f(x): return undefined", ("assert f(2) == 3",)).outcome == "finished"


def test_many_runs_in_parallel_keep_their_order(box: Sandbox) -> None:
    jobs = [Job(f"def f(x): return x + {n % 3}", "", "", TESTS, "f") for n in range(24)]
    start = time.monotonic()
    reports = box.run_all(jobs)
    print(f"{(time.monotonic() - start) / 24 * 1e3:.1f} ms a program")
    assert [report.all_passed for report in reports] == [n % 3 == 1 for n in range(24)]


def test_values_of_other_kinds_are_refused_and_malformed_ones_never_run_anything() -> None:
    for value in (object(), print, iter([]), [object()], {1: print}):
        with pytest.raises(sandbox_roles.NotPlain):
            sandbox_roles.encode(value)
    for data in ({"q": []}, {}, {"i": "zz"}, {"d": [[1]]}, {"e": [{"l": []}]}, [1], {"l": 5}):
        with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):
            sandbox_roles.decode(data)


@pytest.mark.parametrize("values", [{"seconds": 0.0}, {"memory": 1}, {"processes": 0}, {"files": 1}])
def test_limits_that_cannot_work_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Limits(**values)  # type: ignore[arg-type]
