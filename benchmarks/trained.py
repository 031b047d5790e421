"""What only a trained model can show: what the EOS stop saves, and what caches and parallel decoding cost in accuracy.

    python benchmarks/trained.py --run RUN_FOLDER [--quick] [--rounds N]

Without a run the tiny base model of the Countdown task is made first (some minutes; kept in the cache of base models).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import textbook
import torch
from measuring import Run, against, compare, publish, setup, table

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import Plan, decode, evaluation_rows
from d1lit.app.run_policy import policy_of_run
from d1lit.app.tiny_base import base_policy
from d1lit.data import EncodedRow, prompt_batch
from d1lit.draws import CounterDraws
from d1lit.evaluation import evaluate, summarise
from d1lit.models import Policy
from d1lit.models.cache import KVCache
from d1lit.quiet import quiet_libraries
from d1lit.sampling import BlockSampler, DualCache, Threshold, approximation_nats
from d1lit.stopping import StopFlag
from d1lit.types import PromptBatch, Rollout

ROWS_PER_FORWARD = 64


@dataclass(frozen=True)
class Trained:
    """A policy and what it was trained for."""

    plan: Plan
    policy: Policy
    tokenizer: Any
    name: str


def load(run: Path | None, quick: bool) -> Trained:
    """The final policy of a run; without one, the tiny base model."""
    quiet_libraries()
    words = ["task=countdown"] if run is None else json.loads((run / "overrides.json").read_text())
    if quick and run is None:
        words += ["debug=fast", "task.num_builtin.test=8", "task.val_rows=8", "task.num_builtin.train=64"]
    (config,) = compose_jobs("train", [word for word in words if not word.startswith("run_dir=")]).configs
    plan = plan_run(config)
    if run is not None:
        policy, tokenizer = policy_of_run(plan, run)
        return Trained(plan, policy.eval(), tokenizer, f"{plan.task.display_name}, recipe {config.recipe.name}")
    with tempfile.TemporaryDirectory() as folder:
        policy, tokenizer = base_policy(plan, Path(folder), StopFlag())
    return Trained(plan, policy.eval(), tokenizer, f"{plan.task.display_name}, base")


def split_arguments(arguments: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """`--run` apart from what all benchmarks take."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run", type=Path, default=None)
    known, rest = parser.parse_known_args(arguments)
    return known.run, rest


def samplers(base: BlockSampler, temperature: float) -> dict[str, BlockSampler]:
    """The exact sampler without and with EOS stop, and the approximate ones, all with it."""
    plainest = replace(
        base, temperature=temperature, stop_at_eos=False, record_trace=False, rows_per_forward=ROWS_PER_FORWARD
    )
    stopping = replace(plainest, stop_at_eos=True)
    cache, threshold = DualCache(KVCache), Threshold(0.9)
    return {
        "exact, to the end": plainest,
        "exact, EOS stop and refill": stopping,
        "exact, threshold 0.9": replace(stopping, commit=threshold),
        "dual cache": replace(stopping, cache=cache),
        "dual cache, threshold 0.9": replace(stopping, cache=cache, commit=threshold),
    }


def measure(trained: Trained, rows: Sequence[EncodedRow], temperature: float, rounds: int) -> list[list[Any]]:
    """One line a sampler."""
    policy, sampler = trained.policy, trained.plan.sampler
    prompts = prompt_batch(rows, range(len(rows)), policy.pad_token_id)
    made: dict[str, Rollout] = {}

    def run(name: str, one: BlockSampler, draws: CounterDraws) -> None:
        made[name] = one(policy, prompts, 1, draws)

    kinds = samplers(sampler, temperature)
    contenders: dict[str, Run] = {"textbook": partial(plainly, policy, prompts, sampler, temperature)}
    contenders |= {name: partial(run, name, one, CounterDraws(0)) for name, one in kinds.items()}
    measured = compare(contenders, rounds, "cpu")
    exact = measured["exact, to the end"].seconds
    lines = [[trained.name, temperature, "textbook", measured["textbook"].seconds, 1.0, "", "", "", "", ""]]
    for name, one in kinds.items():
        records = evaluate(
            policy,
            one,
            rows,
            partial(decode, trained.tokenizer, policy.eos_token_id),
            trained.plan.task.judges,
            CounterDraws(0),
            batch_size=len(rows),
            device=torch.device("cpu"),
        )
        summary = summarise(records, "strict")
        nats = approximation_nats(policy, made[name], temperature, one.guidance, 64)
        lines.append(
            [
                trained.name,
                temperature,
                name,
                measured[name].seconds,
                against(measured[name], None),
                exact / measured[name].seconds,
                made[name].num_tokens_forward,
                f"{float(nats):.1e}",
                f"{100 * summary.accuracy:.1f} ({100 * summary.interval[0]:.1f}-{100 * summary.interval[1]:.1f})",
                summary.effective_tokens,
            ]
        )
    return [*lines]


def plainly(policy: Policy, prompts: PromptBatch, sampler: BlockSampler, temperature: float) -> None:
    """The textbook sampler, which attends the padding of the prompts as the published code does."""
    for start in range(0, len(prompts.row_ids), ROWS_PER_FORWARD):
        some = prompts.prompt_ids[start : start + ROWS_PER_FORWARD]
        textbook.sample(policy, some, sampler.completion_length, sampler.num_steps, sampler.block_length, temperature)


HEADINGS = (
    "model", "T", "sampler", "s", "factor over the textbook (range)", "over exact to the end",
    "tokens through the body",
    "nats of error", "accuracy % (95 %)", "completion length",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    run, rest = split_arguments(arguments)
    chosen = setup("trained", rest, rounds=3)
    trained = load(run, chosen.quick)
    rows = evaluation_rows(trained.plan, trained.tokenizer)
    lines = []
    for temperature in (0.0, trained.plan.sampler.temperature):
        lines += measure(trained, rows, temperature, chosen.rounds)
    publish("trained", chosen, [table(HEADINGS, lines)], [{"headings": HEADINGS, "lines": lines}])


if __name__ == "__main__":
    main()
