"""Peaks of memory of `gpu.py` beside what dry_run says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import textbook
import torch
import update
from gpu_rollouts import one_block
from gpu_session import GIB, Session, first_line, free, peak_gib
from gpu_training import recompute, sft_run, update_case
from measuring import random_prompts
from rollout import our_sampler
from scoring import random_rows

from d1lit.draws import CounterDraws
from d1lit.footprint import Counts, Workload, count_parameters, memory
from d1lit.models import LoraSettings
from d1lit.models.kernels import PLAIN
from d1lit.sampling import BlockSampler
from d1lit.scoring import score


def stage(session: Session, counts: Counts, views: int, length: int, scored: int, recomputes: bool) -> Workload:
    """A stage on one device without a rollout."""
    return Workload(
        config=session.shape.config(), counts=counts, itemsize=2 if session.is_cuda else 4, optimizer_slots=2.0,
        world_size=1, is_sharded=False, is_offloaded=False, recomputes_blocks=recomputes, num_micro=1, views=views,
        length=length, scored=scored, views_per_chunk=None, keeps_reference=False, on_gpu=session.is_cuda,
    )  # fmt: skip


class Comparison:
    """Measured peaks above weights and optimizer state beside estimated ones."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[list[Any]] = []

    def add(self, name: str, run: Callable[[], object], estimate: float) -> None:
        """One stage's; what does not fit is left out, and the log says so."""
        try:
            measured = peak_gib(run, self.session.is_cuda)
        except Exception as error:
            print(f"   {name}: {first_line(error)}", flush=True)
            free(self.session)
            return
        self.rows.append([name, measured, estimate / GIB, f"{estimate / GIB / measured - 1:+.0%}"])
        self.session.note("memory", self.rows)


def measure_memory(session: Session) -> None:
    """On d1's shapes: rollouts of several batch sizes, scoring and updates by rows and groups, SFT."""
    policy = session.adapted
    policy.network.use(PLAIN)
    policy.graphs = None
    settings = LoraSettings("paper", session.shape.rank, 0.5 * session.shape.rank, 0.0)
    counts = count_parameters(session.shape.config(), settings)
    compared = Comparison(session)
    compare_rollouts(session, counts, compared)
    compare_updates(session, counts, compared)
    compare_sft(session, counts, compared)
    recompute(policy, False)
    session.show("Memory", ("what", "measured GiB", "estimated GiB", "estimate off by"), compared.rows)


def compare_rollouts(session: Session, counts: Counts, compared: Comparison) -> None:
    """The adapter beside the matrices, as in a bf16 run."""
    plan = session.shape.plan
    for batch in session.shape.batches:
        small = one_block(plan, batch)
        prompts = random_prompts(batch, small.prompt_length, session.shape.vocab_size, session.device)
        work = replace(stage(session, counts, 1, plan.length, 1, False), rollout=small, rollout_rows=batch)
        for cached in (False, True):
            sampler = our_sampler(small, 0.9, cached)

            def rolled(sampler: BlockSampler = sampler, prompts: Any = prompts) -> None:
                with session.autocast():
                    sampler(session.adapted, prompts, 1, CounterDraws(0))

            name = f"rollout, B {batch}{', dual cache' if cached else ''}"
            compared.add(name, rolled, memory(replace(work, caches=cached)).rollout)


def compare_updates(session: Session, counts: Counts, compared: Comparison) -> None:
    """Forward and backward of a policy loss, and scoring without gradient."""
    policy, plan = session.adapted, session.shape.plan
    rows = random_rows(policy, update_case(session), session.device)
    old, ref, advantages = update.constants(rows)

    def learnt(corruption: Any) -> None:
        with session.autocast():
            value = score(policy, rows.rollout, corruption).logprobs[:, 0]
            loss = textbook.clipped_loss(value, old, ref, advantages, update.EPSILON, update.BETA)
        loss.backward()
        policy.zero_grad()

    def scored(corruption: Any) -> None:
        with session.autocast(), torch.no_grad():
            score(policy, rows.rollout, corruption)

    for name, corruption, views in (("group", rows.shared, 1), ("row", rows.corruption, plan.rows)):
        for recomputes in (False, True):
            recompute(policy, recomputes)
            work = replace(stage(session, counts, views, plan.length, plan.completion_length, recomputes), passes=1)
            sizes = memory(work)
            label = f"{name}, blocks {'recomputed' if recomputes else 'kept'}"
            compared.add(
                f"update, {label}", partial(learnt, corruption), max(sizes.update, sizes.gradients + sizes.update_end)
            )
            if not recomputes:
                compared.add(f"scoring, {name}", partial(scored, corruption), sizes.scoring)


def compare_sft(session: Session, counts: Counts, compared: Comparison) -> None:
    """A micro-batch with the optimizer's step."""
    for (count, length), recomputes in product(session.shape.sft, (True, False)):
        recompute(session.adapted, recomputes)
        sizes = memory(stage(session, counts, count, length, int(length * 0.375), recomputes))
        label = f"SFT, {count} x {length}, blocks {'recomputed' if recomputes else 'kept'}"
        try:
            run = sft_run(session, session.adapted, count, length)
        except RuntimeError as error:
            print(f"   {label}: {first_line(error)}", flush=True)
            free(session)
            continue
        compared.add(label, run, sizes.peak - sizes.fixed)
        del run
        free(session)
