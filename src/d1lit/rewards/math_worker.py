"""The process that runs math-verify: started by its path, so that it never imports torch and is up in half a second.

    python -P math_worker.py SOCKET_FD SECONDS MEMORY_BYTES

The first process imports math-verify, warms its grammar and then only forks and waits. Its child serves requests, one
JSON line each, over the inherited socket, and tells its own pid in the first line, so that the client can kill it; the
next child is forked in milliseconds with everything imported. When the client goes away, child and parent end.
"""

import contextlib
import json
import math
import os
import resource
import socket
import sys

CLIENT_LEFT = 0
FASTEST_DEATHS = 20
"""Children that may die in a row without an answer before the parent gives up."""


def compare(gold: str, answer: str) -> bool:
    """math-verify's opinion, with more digits than its default: 0.333333 is not 1/3."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        # No timeouts of math-verify's own: they are signals, which a long C call never sees. The client kills us.
        targets = [LatexExtractionConfig(), ExprExtractionConfig()]
        try:
            return parse(f"${text}$", targets, "no_fallback", parsing_timeout=0, raise_on_error=True)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # not mathematics: no verdict of the judge's failure, just no match
            return []

    parsed_gold, parsed_answer = read(gold), read(answer)
    if not parsed_gold or not parsed_answer:
        return False
    return bool(
        verify(
            parsed_gold,
            parsed_answer,
            float_rounding=12,
            numeric_precision=30,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def serve(link: socket.socket, seconds: float, memory: int) -> None:
    """Answer requests until the client closes the socket."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A child killed in the middle of a line leaves half of it behind: the newline first ends that.
    link.sendall(b"\n" + json.dumps({"pid": os.getpid()}).encode() + b"\n")
    lines = link.makefile("rb")
    for line in lines:
        request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        reply: dict[str, object] = {"id": request["id"]}
        broken = False
        try:
            reply["equal"] = compare(request["gold"], request["answer"])
        except (MemoryError, RecursionError) as error:
            reply["error"], broken = type(error).__name__, True
        except Exception as error:  # any judge failure is an outcome of its own, never a verdict
            reply["error"] = type(error).__name__
        link.sendall(json.dumps(reply).encode() + b"\n")
        if broken:
            os._exit(1)  # start again from a clean fork


def main() -> None:
    """Import once, then keep one child serving."""
    descriptor, seconds, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    link = socket.socket(fileno=descriptor)
    import logging

    logging.disable(logging.CRITICAL)
    for sample in ("\\frac{1}{2}+\\sqrt{3}", "x^2+1", "(1,2]"):
        compare(sample, sample)  # the parser builds its tables on first use: before the fork, once
    deaths = 0
    while deaths < FASTEST_DEATHS:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(OSError):  # the client closed the socket while we wrote
                serve(link, seconds, memory)
            os._exit(CLIENT_LEFT)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == CLIENT_LEFT:
            return
        deaths = deaths + 1 if resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == 0 else 0


if __name__ == "__main__":
    main()
