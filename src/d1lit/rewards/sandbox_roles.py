"""The two processes of a sandboxed run: one holds the program, the other its tests. Standard library only.

Values cross between them as plain data (None, booleans, numbers, text, bytes, lists, tuples, sets and dictionaries of
these), so an object whose `__eq__` always says yes arrives as nothing or not at all.
"""

import builtins
import importlib
import json
import os
import socket
import sys
from typing import Any

LONGEST_MESSAGE = 8 * 2**20
COMMON = [
    *("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq"),
    *("itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing"),
]
"""Imported before the fork, so that no program pays for them."""


def import_common_modules():
    """Import what most programs import."""
    for name in COMMON:
        importlib.import_module(name)


class NotPlain(TypeError):
    """A value that is not plain data."""


def encode(value: Any) -> Any:
    """A value as something that JSON can write without loss.

    Raises:
        NotPlain: for any other object.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return {"s": [ord(character) for character in value]} if _has_surrogates(value) else str(value)
    if isinstance(value, int):
        return {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    for kind, letter in ((list, "l"), (tuple, "t"), (set, "e"), (frozenset, "z")):
        if isinstance(value, kind):
            return {letter: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"d": [[encode(key), encode(item)] for key, item in value.items()]}
    raise NotPlain(f"{type(value).__name__} is not plain data")


def _has_surrogates(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def decode(data: Any) -> Any:
    """What `encode` wrote. Raises whatever malformed data provokes; nothing in it is ever executed."""
    if data is None or data is True or data is False or isinstance(data, str):
        return data
    ((letter, inner),) = data.items()
    if letter == "i":
        return int(inner, 16)
    if letter == "f":
        return float.fromhex(inner)
    if letter == "c":
        return complex(float.fromhex(inner[0]), float.fromhex(inner[1]))
    if letter == "s":
        return "".join(chr(code) for code in inner)
    if letter == "b":
        return bytes.fromhex(inner)
    if letter == "d":
        return {decode(key): decode(item) for key, item in inner}
    return {"l": list, "t": tuple, "e": set, "z": frozenset}[letter](decode(item) for item in inner)


def send(link, message):
    """One message: its length, then JSON."""
    data = json.dumps(message).encode()
    link.sendall(len(data).to_bytes(4, "big") + data)


def receive(link):
    """The next message, or an EOFError. Raises ValueError for one that is too long."""
    size = int.from_bytes(_exactly(link, 4), "big")
    if size > LONGEST_MESSAGE:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(_exactly(link, size))


def _exactly(link, size):
    parts = []
    while size:
        part = link.recv(min(size, 65536))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _read(descriptor):
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


# ---------------------------------------------------------------------------------------------------------- the program


def serve_program(program, link_descriptor):
    """Run the program, then answer calls of its functions until the link closes."""
    source = _read(program).decode("utf-8", "surrogatepass")
    link = socket.socket(fileno=link_descriptor)
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(source, "program", "exec"), namespace)  # noqa: S102 - the walled-off process exists for this
    except BaseException as error:  # SystemExit too: the program is over, and the tests shall hear why
        send(link, {"raised": type(error).__name__})
        return
    send(link, {"ready": True})
    while True:
        name, arguments, keywords = decode(receive(link))
        try:
            reply = {"value": encode(namespace[name](*arguments, **keywords))}
        except BaseException as error:
            reply = {"raised": type(error).__name__}
        send(link, reply)


# ------------------------------------------------------------------------------------------------------------ the tests


class ProgramGone(BaseException):
    """The program ended, or does not speak the protocol. No test can catch it with `except Exception`."""


class ProgramError(Exception):
    """The program raised something that is not a built-in exception."""


class Candidate:
    """Stands in the tests for a function of the program."""

    def __init__(self, link, name):
        self._link, self.__name__ = link, name

    def __call__(self, *arguments, **keywords):
        request = encode((self.__name__, arguments, keywords))
        try:
            send(self._link, request)
            reply = receive(self._link)
            value, raised = decode(reply.get("value")), reply.get("raised")
        except Exception as error:
            raise ProgramGone(type(error).__name__) from None
        if raised is None:
            return value
        kind = getattr(builtins, str(raised), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind("raised by the program")
        raise ProgramError(str(raised))


def run_tests(tests, link_descriptor, verdict):
    """Run every test against the program and write how many passed, as one JSON line.

    The tests name the function under test, or `candidate`; a test that defines `check` has it called with the
    candidate (HumanEval's form).
    """
    job = json.loads(_read(tests))
    link = socket.socket(fileno=link_descriptor)
    result = {"passed": 0, "total": len(job["tests"]), "broken": None, "failure": None}
    try:
        ready = receive(link)
        if ready.get("ready") is not True:
            raise ProgramGone(str(ready.get("raised")))
        for test in job["tests"]:
            _run_test(test, job, link, result)
    except ProgramGone as gone:
        result["failure"] = result["failure"] or f"the program ended ({gone})"
    except Exception as error:  # a first message that is not one
        result["failure"] = f"the program ended ({type(error).__name__})"
    with os.fdopen(verdict, "wb") as file:
        file.write(json.dumps(result).encode() + b"\n")


def _run_test(test, job, link, result):
    namespace: dict[str, Any] = {"__name__": "tests"}
    candidate = Candidate(link, job["entry_point"])
    try:
        for part in (job["prompt"], job["setup"]):
            exec(compile(part, "setup", "exec"), namespace)  # noqa: S102 - dataset code, in its own walled-off process
        namespace[job["entry_point"]] = namespace["candidate"] = candidate
        exec(compile(test, "test", "exec"), namespace)  # noqa: S102
        if callable(namespace.get("check")):
            namespace["check"](candidate)
    except (NameError, SyntaxError, ImportError, NotPlain) as error:
        # Nothing the program returns can cause these: the row's own code is at fault.
        if "raised by the program" in str(error):
            result["failure"] = result["failure"] or type(error).__name__
        else:
            result["broken"] = f"{type(error).__name__}: {error}"
    except Exception as error:
        result["failure"] = result["failure"] or type(error).__name__
    else:
        result["passed"] += 1


if sys.flags.optimize:
    raise SystemExit("asserts are the tests: never run this with -O")
