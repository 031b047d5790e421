"""Prompts as data: a template is a short text file, and its sha256 stands beside every number made with it.

A template file has sections, each opened by a line `--- NAME`; text before the first is a comment:

    --- system      (optional) the system turn
    --- shot        (optional, repeatable) worked examples, put before the question in the user turn
    --- user        (required) the question; {{field}} is replaced by that field of the example
    --- prefill     (optional) the beginning of the assistant turn, given to the model
    --- graded      (optional) `prefill and completion` (default) or `completion`: what the graders read

A prefill is part of the prompt, so a completion does not contain it. Format rewards would then miss an opening tag that
the model was never asked to write: graders read prefill + completion unless the template says otherwise. d1 trains
without prefill, and evaluates with `<reasoning>` prefilled and the completion alone graded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from d1lit.models.tokenizers import encode_prompt
from d1lit.types import Example

_SECTION = re.compile(r"--- ?([a-z]+)\s*")
_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_NAMES = ("system", "shot", "user", "prefill", "graded")
_GRADED = ("prefill and completion", "completion")


@dataclass(frozen=True)
class Template:
    """A parsed prompt template."""

    name: str
    system: str
    shots: tuple[str, ...]
    user: str
    prefill: str
    graded: Literal["prefill and completion", "completion"]
    sha256: str
    """Of the file's text with LF line ends."""


def load_template(name: str) -> Template:
    """A template of the package by name, or any file by path.

    Raises:
        ValueError: one line naming the file and line.
    """
    if name in builtin_templates():
        raw = (resources.files("d1lit.tasks") / "prompts" / f"{name}.txt").read_bytes()
    elif Path(name).is_file():
        raw = Path(name).read_bytes()
    else:
        raise ValueError(
            f"task.prompt: no template or file {name!r}. Try: one of {', '.join(builtin_templates())} [E308]"
        )
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as failure:
        line = raw[: failure.start].count(b"\n") + 1
        raise ValueError(f"task.prompt: {name}:{line}: not UTF-8. Try: save the file as UTF-8 [E308]") from None
    return parse_template(text, name)


def builtin_templates() -> list[str]:
    """Names of the templates that come with the package."""
    folder = resources.files("d1lit.tasks") / "prompts"
    return sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))


def parse_template(text: str, name: str) -> Template:
    """The template that `text` spells.

    Raises:
        ValueError: for an unknown, repeated or missing section.
    """
    sections: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        heading = _SECTION.fullmatch(line)
        if heading is None:
            if sections:
                sections[-1][1].append(line)
            continue
        section = heading[1]
        if section not in _NAMES:
            raise ValueError(
                f"task.prompt: {name}:{number}: no section {section!r}. Try: one of {', '.join(_NAMES)} [E308]"
            )
        if section != "shot" and any(section == earlier for earlier, _ in sections):
            raise ValueError(
                f"task.prompt: {name}:{number}: section {section!r} stands twice. Try: join the two [E308]"
            )
        sections.append((section, []))
    bodies = {section: "\n".join(lines).strip("\n") for section, lines in sections}
    if not bodies.get("user"):
        raise ValueError(f"task.prompt: {name}:1: no section 'user'. Try: a line `--- user` before the question [E308]")
    graded = bodies.get("graded", _GRADED[0])
    if graded not in _GRADED:
        raise ValueError(f"task.prompt: {name}: graded is {graded!r}. Try: {' or '.join(_GRADED)} [E308]")
    return Template(
        name=name,
        system=bodies.get("system", ""),
        shots=tuple("\n".join(lines).strip("\n") for section, lines in sections if section == "shot"),
        user=bodies["user"],
        prefill=bodies.get("prefill", ""),
        graded="completion" if graded == "completion" else "prefill and completion",
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def render(template: Template, example: Example) -> tuple[str, str, str]:
    """System turn, user turn and prefill of an example; a field's own text is never searched for placeholders.

    Raises:
        ValueError: where the template names a field that the example lacks.
    """

    def fill(match: re.Match[str]) -> str:
        field = match[1]
        if field not in example:
            raise ValueError(
                f"task.prompt: {template.name} asks for {{{{{field}}}}}, which row {example.get('id')} lacks. "
                f"Try: one of {', '.join(sorted(example))} [E308]"
            )
        value = example[field]
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    user = "\n\n".join((*template.shots, _FIELD.sub(fill, template.user)))
    return _FIELD.sub(fill, template.system), user, template.prefill


def graded_text(template: Template, completion: str) -> str:
    """What the graders read of a completion: with the prefill before it, or alone."""
    return completion if template.graded == "completion" else template.prefill + completion


def encode_prompts(
    rows: Sequence[Example],
    template: Template,
    tokenizer: Any,
    max_prompt_length: int,
    overlong: str,
    key: str = "task.max_prompt_length",
) -> tuple[list[list[int]], list[Example], int]:
    """Token ids of each row's prompt, the rows kept, and how many were dropped for being too long.

    Args:
        rows: examples of one task.
        template: how a row is put.
        tokenizer: anything that d1lit.models.tokenizers.encode_prompt takes.
        max_prompt_length: most tokens a prompt may have, template and chat tokens included.
        overlong: `error` refuses the first longer prompt, `drop` leaves longer ones out, `cut_left` takes their head
            off, as d1's training does.
        key: the configuration key of the limit, for messages.

    Raises:
        ValueError: for a prompt that is too long, or if all were dropped.
    """
    encoded: list[list[int]] = []
    kept: list[Example] = []
    longest = 0
    for row in rows:
        ids = encode_prompt(tokenizer, *render(template, row))
        longest = max(longest, len(ids))
        if overlong == "cut_left":
            ids = ids[-max_prompt_length:]
        if len(ids) <= max_prompt_length:
            encoded.append(ids)
            kept.append(row)
        elif overlong == "error":
            drop = f"{key.split('.')[0]}.overlong=drop"
            raise ValueError(
                f"{key}: row {row.get('id')} has a prompt of {len(ids)} tokens, more than "
                f"{max_prompt_length}. Try: {key}={len(ids)}, or {drop} for training rows [E307]"
            )
    if rows and not kept:
        raise ValueError(
            f"{key}: all {len(rows)} prompts are longer than {max_prompt_length} tokens. Try: {key}={longest} [E307]"
        )
    return encoded, kept, len(rows) - len(kept)


def prompt_protocol(template: Template) -> Mapping[str, str]:
    """What of the prompt stands in every result."""
    return {"prompt": template.name, "prompt_sha256": template.sha256, "graded": template.graded}
