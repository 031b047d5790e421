"""The process that runs math-verify: started by its path, so that it never imports torch and is up in half a second.

    python -P math_worker.py SOCKET_FD SECONDS MEMORY_BYTES

The first process imports math-verify, warms its grammar and then only forks and waits. Its child serves requests, one
JSON line each, over the inherited socket, and tells its own pid in the first line, so that the client can kill it; the
next child is forked in milliseconds with everything imported. When the client goes away, child and parent end.

The deadline is the child's own processor time, kept by the kernel: a busy machine makes a comparison slower, never a
time-out. Its signal ends the child in the middle of any C call, because nothing handles it.
"""

import json
import mmap
import os
import resource
import signal
import socket
import sys

CLIENT_LEFT = 0
MOST_USELESS = 20
"""Children in a row that may die before they read a request, before the parent gives up."""

WARMING = (
    ("\\frac{1}{2}+\\sqrt{3}", "\\frac{1}{2}+\\sqrt{3}"),
    ("x^2+1", "1-x"),
    ("(-\\sqrt{3},\\pi]", "(-2,2)"),
    ("2x+3y-4=0", "x+y=1"),
    ("(a+1)(b+2)", "ab+2"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
)
"""Pairs whose comparison imports and builds what most others need: before the fork, once."""


class Unread(Exception):
    """A text that math-verify cannot read as mathematics; its side is the message."""


def compare(gold: str, answer: str) -> bool:
    """math-verify's opinion, with more digits than its default: 0.333333 is not 1/3.

    Raises:
        Unread: "gold" or "answer".
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Units were compared before; what math-verify takes for one may be a factor (it reads 6ab as 6).
    spelling = NormalizationConfig(units=False, malformed_operators=True, nits=True)

    def read(side: str, text: str) -> list:
        # No timeouts of math-verify's own: they are signals, which a long C call never sees. The client kills us.
        targets = [LatexExtractionConfig(normalization_config=spelling), ExprExtractionConfig()]
        try:
            found = parse(f"${text}$", targets, "no_fallback", parsing_timeout=0, raise_on_error=True)
        except (ValueError, SyntaxError) as error:  # a parser's own word that this is no mathematics (SympifyError)
            raise Unread(side) from error
        if not found:
            raise Unread(side)
        return found

    return bool(
        verify(
            read("gold", gold),
            read("answer", answer),
            float_rounding=12,
            numeric_precision=30,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def serve(link: socket.socket, seconds: float, memory: int, was_late: bool, served: mmap.mmap) -> None:
    """Answer requests until the client closes the socket.

    Args:
        link: the client's socket.
        seconds: processor time of one comparison.
        memory: address space, in bytes.
        was_late: whether the child before this one was ended by its deadline; the client learns it from us.
        served: set to 1 once a request was read.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # A child killed in the middle of a line leaves half of it behind: the newline first ends that.
    link.sendall(b"\n" + json.dumps({"pid": os.getpid(), "was_late": was_late}).encode() + b"\n")
    lines = link.makefile("rb")
    for line in lines:
        request = json.loads(line)
        served[0] = 1
        reply: dict[str, object] = {"id": request["id"]}
        broken = False
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply["equal"] = compare(request["gold"], request["answer"])
        except Unread as error:
            reply["unread"] = str(error)
        except (MemoryError, RecursionError) as error:
            reply["error"], broken = type(error).__name__, True
        except Exception as error:  # any judge failure is an outcome of its own, never a verdict
            reply["error"] = type(error).__name__
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        link.sendall(json.dumps(reply).encode() + b"\n")
        if broken:
            os._exit(1)  # start again from a clean fork


def main() -> None:
    """Import once, then keep one child serving."""
    descriptor, seconds, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    link = socket.socket(fileno=descriptor)
    import logging

    logging.disable(logging.CRITICAL)
    for pair in WARMING:
        compare(*pair)
    served, useless, was_late = mmap.mmap(-1, 1), 0, False
    while useless < MOST_USELESS:
        served[0] = 0
        child = os.fork()
        if child == 0:
            try:
                serve(link, seconds, memory, was_late, served)
            except OSError:  # the client closed the socket while we wrote
                os._exit(CLIENT_LEFT)
            except BaseException:
                os._exit(1)
            os._exit(CLIENT_LEFT)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == CLIENT_LEFT:
            return
        was_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        useless = 0 if served[0] else useless + 1


if __name__ == "__main__":
    main()
