"""Talking to a trained model in the terminal, watching it unmask."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import TextIOBase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from d1lit.app.config_errors import as_config_error
from d1lit.app.open_run import OpenRun, open_run
from d1lit.app.plan import decode
from d1lit.data import EncodedRow, prompt_batch
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.models import Policy, encode_prompt
from d1lit.report.markup import visible
from d1lit.tasks.prompting import render
from d1lit.types import Draws

HELP = "Type a question and press Enter. /raw TEXT sends TEXT as it stands, /again asks once more, /quit ends."


@dataclass(frozen=True)
class Watched:
    """A policy that shows every canvas it is given before it looks at it."""

    policy: Policy
    show: Callable[[Tensor], None]

    @property
    def mask_token_id(self) -> int:
        """Id of [MASK]."""
        return self.policy.mask_token_id

    @property
    def eos_token_id(self) -> int:
        """Id that ends a completion."""
        return self.policy.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Id that fills prompts on the left."""
        return self.policy.pad_token_id

    def hidden(
        self,
        ids: Tensor,
        attention: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """The policy's, after the canvas was shown."""
        self.show(whole_canvas(ids, cache))
        return self.policy.hidden(ids, attention, position_ids, keep, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """The policy's."""
        return self.policy.head(hidden)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, exclude_mask: bool = False) -> Tensor:
        """The policy's."""
        return self.policy.logprobs(hidden, targets, temperature, exclude_mask)

    def reference(self) -> Any:
        """The policy's."""
        return self.policy.reference()


def whole_canvas(ids: Tensor, cache: Any) -> Tensor:
    """The canvas of a forward that was given a span of it only, the rest as the cache remembers it."""
    span = getattr(cache, "span", None)
    if span is None:
        return ids
    canvas = cache.canvas["ids"].clone()
    canvas[:, span[0] : span[1]] = ids
    return canvas


def chat(
    folder: Path,
    *,
    temperature: float | None = None,
    words: Sequence[str] = (),
    trusted: Sequence[str] = (),
    lines: TextIOBase | None = None,
    console: Console | None = None,
) -> int:
    """`d1lit chat`: answer every line; live on a terminal, one answer a line elsewhere.

    Args:
        folder: of the run.
        temperature: of the answers; None for the evaluation's.
        words: KEY=VALUE that override the run's.
        trusted: packages whose components the run may name.
        lines: where questions come from; None for the terminal or pipe.
        console: where answers go.

    Returns:
        Exit status: 1 if a line could not be answered and nobody was there to see it.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    source = lines or sys.stdin
    run = open_run(folder, words, trusted)
    interactive = source.isatty() and console.is_terminal
    if interactive:
        console.print(f"{run.plan.config.recipe.name} on {run.plan.task.display_name}. {HELP}", markup=False)
    last, turn, failed = "", 0, False
    while True:
        if interactive:
            console.print("> ", end="")
        line = source.readline()
        text = line.strip()
        if not line or text == "/quit":
            return 1 if failed and not interactive else 0
        text = last if text == "/again" else text
        if not text:
            continue
        last, turn = text, turn + 1
        try:
            answer(run, text, turn, temperature, console, live=interactive)
        except ValueError as error:
            failed = True
            print(f"error: {as_config_error(error, 'chat')}", file=sys.stderr)


def answer(run: OpenRun, text: str, turn: int, temperature: float | None, console: Console, live: bool) -> str:
    """Sample one completion of a question and print it; with `live`, the canvas is drawn before every forward."""
    prompt = prompt_ids(run, text)
    heat = run.plan.config.evaluation.temperature if temperature is None else temperature
    recorded = {"record_trace": False, "record_predictions": False}
    sampler = replace(run.plan.sampler, temperature=heat, tree=None, **recorded)
    batch = prompt_batch([EncodedRow(prompt, {"id": f"chat-{turn}"})], [turn], run.policy.pad_token_id)
    batch = batch.to(run.plan.device)
    draws: Draws = CounterDraws(run.plan.seed, step=turn)
    if not live:
        rollout = sampler(run.policy, batch, 1, draws)
        said = decode(run.tokenizer, run.policy.eos_token_id, rollout.completion_ids[0].cpu())
        console.print(visible(said).replace("\n", " ⏎ "), markup=False)
        return said
    with Live(console=console, auto_refresh=False) as screen:

        def show(ids: Tensor) -> None:
            screen.update(drawn(run, ids[0, -sampler.completion_length :].tolist()), refresh=True)

        rollout = sampler(Watched(run.policy, show), batch, 1, draws)
        said = decode(run.tokenizer, run.policy.eos_token_id, rollout.completion_ids[0].cpu())
        screen.update(Text(visible(said)), refresh=True)
    return said


def prompt_ids(run: OpenRun, text: str) -> list[int]:
    """The question in the task's own prompt where it fits one, else as it stands.

    Raises:
        ConfigError: if the task's prompt needs more than a question.
    """
    raw = text.removeprefix("/raw ") if text.startswith("/raw ") else None
    if raw is not None:
        return encode_prompt(run.tokenizer, None, raw)
    template = run.plan.task.template
    fields = set(re.findall(r"\{\{(\w+)\}\}", template.system + template.user))
    if len(fields) != 1:
        example = next(iter(run.plan.task.rows("test")))
        cure = f"/raw and the whole prompt, such as /raw {' '.join(render(template, example)[1].split())}"
        raise ConfigError("chat", f"the prompt of {run.plan.task.name} needs more than a question", cure, "E805")
    turns = render(template, {"id": "chat", fields.pop(): text})
    return encode_prompt(run.tokenizer, *turns)


def drawn(run: OpenRun, canvas: Sequence[int]) -> Text:
    """A canvas with its masks as faint blocks; nothing after the end is drawn."""
    shown = Text()
    mask, eos = run.policy.mask_token_id, run.policy.eos_token_id
    end = canvas.index(eos) if eos in canvas else len(canvas)
    run_of: list[int] = []

    def flush() -> None:
        if run_of:
            shown.append(visible(run.tokenizer.decode(run_of, skip_special_tokens=True)))
            run_of.clear()

    for token in canvas[:end]:
        if token == mask:
            flush()
            shown.append("░", style="dim")
        else:
            run_of.append(token)
    flush()
    return shown
