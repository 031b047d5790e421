"""Rollouts of `gpu.py`: the textbook, exact and cached, with fused kernels and recorded forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import textbook
from gpu_session import HEADINGS, Contender, Session, free, lines, race
from measuring import random_prompts
from rollout import our_sampler

from d1lit.costs import (
    RolloutPlan,
    dual_cache_rollout_flops,
    exact_rollout_flops,
    textbook_rollout_flops,
)
from d1lit.draws import CounterDraws
from d1lit.models.graphs import ForwardGraphs
from d1lit.models.kernels import PLAIN, Kernels
from d1lit.sampling import BlockSampler, RandomOrder, Threshold


def one_block(plan: RolloutPlan, rows: int) -> RolloutPlan:
    """The last block of a rollout of some rows: the canvas is as long, and one block of it is open."""
    prompt = plan.length - plan.block_length
    return RolloutPlan(rows, prompt, plan.block_length, plan.block_length, plan.steps_per_block)


def threshold_sampler(plan: RolloutPlan, temperature: float) -> BlockSampler:
    """A threshold on confidences drawn at random, since random weights are never sure: about a third at a time."""
    cached = our_sampler(plan, temperature, cached=True)
    return replace(cached, confidence=RandomOrder(), commit=Threshold(0.67))


def rollout_contenders(session: Session, plan: RolloutPlan, temperature: float) -> dict[str, Contender]:
    """The textbook first."""
    policy, shape = session.policy, session.policy.shape
    prompts = random_prompts(plan.rows, plan.prompt_length, session.shape.vocab_size, session.device)
    steps = plan.num_blocks * plan.steps_per_block
    tokens = plan.rows * plan.completion_length
    base = textbook_rollout_flops(shape, plan)

    def ready(kernels: Kernels, graphs: ForwardGraphs | None) -> None:
        policy.network.use(kernels)
        policy.graphs = graphs

    def plainly() -> None:
        textbook.sample(policy, prompts.prompt_ids, plan.completion_length, steps, plan.block_length, temperature)

    def ours(sampler: BlockSampler) -> None:
        sampler(policy, prompts, 1, CounterDraws(0))

    def contender(sampler: BlockSampler, flops: float, kernels: Kernels, replays: bool) -> Contender:
        graphs = ForwardGraphs() if replays and session.is_cuda else None
        prepare = partial(ready, kernels, graphs)
        warm_ups = 3 if replays and sampler.cache is not None else 1  # an exact rollout's steps are all of one shape
        return Contender(partial(ours, sampler), prepare, warm_ups, flops, base / flops, tokens)

    exact, dual = our_sampler(plan, temperature, False), our_sampler(plan, temperature, True)
    work, less = exact_rollout_flops(shape, plan), dual_cache_rollout_flops(shape, plan)
    quick = session.fused()
    result = {
        "textbook": Contender(plainly, partial(ready, PLAIN, None), 1, base, 1.0, tokens),
        "exact": contender(exact, work, PLAIN, False),
        "exact, graphs": contender(exact, work, PLAIN, True),
        "exact, fused": contender(exact, work, quick, False),
        "exact, fused, graphs": contender(exact, work, quick, True),
        "dual cache": contender(dual, less, PLAIN, False),
        "dual cache, fused, graphs": contender(dual, less, quick, True),
    }
    parallel = threshold_sampler(plan, temperature)
    count = Contender(partial(ours, parallel), partial(ready, quick, None), 1, 0.0, None, tokens)
    return {**result, "dual cache, fused, threshold": count}


def release_graphs(session: Session) -> None:
    """Plain again."""
    session.policy.network.use(PLAIN)
    session.policy.graphs = None
    free(session)


FEW = ("textbook", "exact, fused, graphs", "dual cache, fused, graphs", "dual cache, fused, threshold")


def race_rollouts(
    session: Session, rows: int, temperature: float, rounds: int, names: Sequence[str] | None = None
) -> list[list[Any]]:
    """All contenders at one batch size, or some of them."""
    plan = one_block(session.shape.plan, rows)
    contenders = rollout_contenders(session, plan, temperature)
    contenders = {name: one for name, one in contenders.items() if names is None or name in names}
    measured = race(session, contenders, rounds)
    parallel = measured.get("dual cache, fused, threshold", {})
    if "seconds" in parallel:
        prompts = random_prompts(rows, plan.prompt_length, session.shape.vocab_size, session.device)
        sampler = threshold_sampler(plan, temperature)
        parallel["forwards"] = sampler(session.policy, prompts, 1, CounterDraws(0)).num_forwards
        parallel["arithmetic"] = None
    release_graphs(session)
    session.note(f"rollout B {rows} T {temperature}", measured)
    named = {
        name if "forwards" not in one else f"{name}: {one['forwards']} forwards for {plan.steps_per_block}": one
        for name, one in measured.items()
    }
    return lines(named, rows, temperature)


def measure_rollout(session: Session) -> None:
    """The batch size in the middle, at temperature 0.9."""
    session.without_adapter()
    rows = race_rollouts(session, session.shape.batches[0], 0.9, rounds=3)
    session.show("Rollout: one block of eight", ("B", "T", *HEADINGS), rows)


def measure_batches(session: Session) -> None:
    """The other batch sizes, and temperature 0."""
    session.without_adapter()
    rows = []
    first, *others = session.shape.batches
    for batch, temperature, rounds in [*((b, 0.9, 3 if b == 1 else 1) for b in others), (first, 0.0, 1), (1, 0.0, 3)]:
        if session.left < 0:
            break
        rows += race_rollouts(session, batch, temperature, rounds, FEW)
    session.show("Rollout over batch sizes: one block of eight", ("B", "T", *HEADINGS), rows)


def measure_whole_rollout(session: Session) -> None:
    """All eight blocks, once: what one block was multiplied for."""
    session.without_adapter()
    rows = []
    plan = replace(session.shape.plan, rows=session.shape.batches[0])
    contenders = rollout_contenders(session, plan, 0.9)
    for name, warm_ups in (("dual cache, fused, graphs", 3), ("exact, fused, graphs", 1)):
        measured = race(session, {name: replace(contenders[name], warm_ups=warm_ups, arithmetic=None)}, 1)
        session.note(f"whole {name}", measured)
        rows += lines(measured, plan.rows, 0.9)
    release_graphs(session)
    session.show("Whole rollouts", ("B", "T", *HEADINGS), rows)
