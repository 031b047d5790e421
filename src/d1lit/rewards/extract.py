r"""Finding the answer in a completion, in time linear in its length whatever a model writes.

Regular expressions with a lazy `.*?` between two marks are quadratic when the opening mark repeats and the closing one
never comes; a policy that learns to repeat itself would stall the run. So marks are found with `str.find`, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

END_OF_TEXT = ("<|eot_id|>", "<|endoftext|>", "<|im_end|>")
"""Marks of the model families that end a completion; stored generations keep them."""

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
LONGEST_TEXT = 100_000
"""Characters of a completion that are looked at, counted from its end."""
LONGEST_ANSWER = 400
"""An answer longer than this is no answer; every parser below may rely on it."""

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def pairs_between(text: str, opening: str, closing: str) -> Iterator[str]:
    """What stands between successive marks, as `opening(.*?)closing` finds it with newlines allowed."""
    start = text.find(opening)
    while start >= 0:
        stop = text.find(closing, start + len(opening))
        if stop < 0:
            return
        yield text[start + len(opening) : stop]
        start = text.find(opening, stop + len(closing))


def pairs_on_one_line(text: str, opening: str, closing: str) -> Iterator[str]:
    """What stands between successive marks, as `opening(.*?)closing` finds it when `.` stops at a newline."""
    start, stop, line_end = text.find(opening), -1, -1
    while start >= 0:
        body = start + len(opening)
        # Both are searched again only once they lie behind, so a mark far away is walked to once.
        stop = text.find(closing, body) if stop < body else stop
        if stop < 0:
            return
        line_end = _find_or_end(text, "\n", body) if line_end < body else line_end
        if stop > line_end:
            start = text.find(opening, line_end)
        else:
            yield text[body:stop]
            start = text.find(opening, stop + len(closing))


def _find_or_end(text: str, mark: str, start: int) -> int:
    at = text.find(mark, start)
    return len(text) if at < 0 else at


def first_between(text: str, opening: str, closing: str) -> str | None:
    """The first pair, or None."""
    return next(pairs_between(text, opening, closing), None)


def last_between(text: str, opening: str, closing: str) -> str | None:
    """The last of the successive pairs, or None."""
    last = None
    for last in pairs_between(text, opening, closing):  # noqa: B007 - the last one is what is wanted
        pass
    return last


def boxes(text: str) -> list[str]:
    r"""Contents of every balanced `\boxed{...}` or `\fbox{...}`, in order of their openings; one pass with a stack."""
    open_braces: list[tuple[int, bool]] = []
    found: list[tuple[int, str]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, is_box = open_braces.pop()
                if is_box:
                    # Nested boxes would make the copies quadratic; past the cap only the length matters.
                    found.append((start, text[start : min(match.start(), start + LONGEST_ANSWER + 1)]))
        elif token == "{":
            open_braces.append((match.end(), False))
        elif token.endswith("{") and len(token) > 2:
            open_braces.append((match.end(), True))
    return [content for _, content in sorted(found)]


def until_end_of_text(completion: str) -> str:
    """The completion up to the first end-of-text mark, and of that no more than the last `LONGEST_TEXT` characters."""
    stops = [at for mark in END_OF_TEXT if (at := completion.find(mark)) >= 0]
    return completion[: min(stops, default=len(completion))][-LONGEST_TEXT:]


def answer_block(completion: str) -> str | None:
    """Text after the last `<answer>`, up to its closing tag or, in a truncated completion, to the end."""
    text = until_end_of_text(completion)
    start = text.rfind(ANSWER_OPEN)
    return None if start < 0 else text[start + len(ANSWER_OPEN) :].split(ANSWER_CLOSE, 1)[0]


def _is_closed(completion: str) -> bool:
    text = until_end_of_text(completion)
    return text.rfind(ANSWER_CLOSE) > text.rfind(ANSWER_OPEN)


def _without_open_box(block: str, is_closed: bool) -> str:
    r"""The block less a leading `\boxed{` whose brace was forgotten.

    Only where the closing tag shows that the answer was finished: `\boxed{20` at the end of a truncated text may have
    been about to become 200.
    """
    inside = block.strip().removeprefix("\\boxed{")
    return inside if is_closed and not set("{}\\") & set(inside) else block


def final_answer(completion: str) -> str | None:
    r"""The one answer a completion commits itself to, or None.

    The last `<answer>` block decides; a box inside it is the answer, and boxes that differ are two answers, hence none.
    Without a block the last balanced box of the text counts. Bare text is never searched for something that fits.
    """
    block = answer_block(completion)
    if block is None:
        found = boxes(until_end_of_text(completion))
        answer = found[-1] if found else None
    else:
        found = list(dict.fromkeys(content.strip() for content in boxes(block)))
        # `\boxed{\boxed{5}}` lists its inner box too: the innermost of nested boxes is the answer.
        innermost = [content for content in found if "\\boxed" not in content and "\\fbox" not in content]
        if len(innermost) > 1:
            return None
        answer = innermost[0] if innermost else _without_open_box(block, _is_closed(completion))
    if answer is None or not answer.strip() or len(answer) > LONGEST_ANSWER:
        return None
    return answer.strip()
