"""Scoring, updates, whole GRPO steps and SFT of `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import step
import textbook
import torch
import update
from gpu_rollouts import one_block
from gpu_session import GIB, HEADINGS, Contender, Session, first_line, free, lines, peak_gib, race, seconds_of
from measuring import random_prompts, relative_difference
from rollout import our_sampler
from scoring import random_rows, textbook_scoring_flops
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from d1lit.costs import (
    body_backward_flops,
    full,
    head_flops,
    scoring_flops,
    update_flops,
)
from d1lit.draws import CounterDraws
from d1lit.losses.supervised import MaskedCrossEntropy, per_target_token
from d1lit.masking import apply_mask
from d1lit.models import Policy
from d1lit.models.graphs import ForwardGraphs
from d1lit.models.head import DEFAULT_BUDGET
from d1lit.models.kernels import PLAIN, Kernels
from d1lit.scoring import score


def update_case(session: Session) -> update.Case:
    """One group on d1's canvas."""
    plan = session.shape.plan
    return update.Case(session.shape.size, 1, plan.rows, plan.prompt_length, plan.completion_length)


def warm_adapter(policy: Policy) -> list[torch.nn.Parameter]:
    """Trained parameters, moved off zero so that every gradient is one."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.01)
    return trained


def measure_update(session: Session) -> None:
    """Scoring without gradient and one inner update, by views of rows and of the group, against the textbook."""
    policy, case = session.adapted, update_case(session)
    warm_adapter(policy)
    rows = random_rows(policy, case, session.device)
    old, ref, advantages = update.constants(rows)
    completion = rows.rollout.completion_ids

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return textbook.clipped_loss(logprobs, old, ref, advantages, update.EPSILON, update.BETA)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "textbook": lambda: textbook.completion_logprobs(policy, rows.noised_ids, completion),
        "row": lambda: score(policy, rows.rollout, rows.corruption).logprobs[:, 0],
        "group": lambda: score(policy, rows.rollout, rows.shared).logprobs[:, 0],
        "textbook, the group's views": lambda: textbook.completion_logprobs(policy, rows.shared_noised_ids, completion),
    }

    def scored(name: str) -> torch.Tensor:
        with session.autocast(), torch.no_grad():
            return ways[name]()

    def updated(name: str) -> list[torch.Tensor]:
        with session.autocast():
            value = loss(ways[name]())
        return update.gradients(policy, value)

    shape, lengths = policy.shape, (case.prompt_length, case.completion_length)

    recorded = ForwardGraphs() if session.is_cuda else None

    def ready(kernels: Kernels = PLAIN, graphs: ForwardGraphs | None = None, budget: int | None = None) -> None:
        policy.network.use(kernels)
        policy.graphs, policy.head_budget = graphs, budget

    settings: dict[str, Callable[[], None]] = {
        "": ready,
        ", fused": partial(ready, session.fused()),
        ", fused, graphs": partial(ready, session.fused(), recorded),
        ", fused, graphs, 16 MiB tiles of the head": partial(ready, session.fused(), recorded, DEFAULT_BUDGET),
    }
    tokens, num_rows, length = completion.numel(), case.group_size, sum(lengths)
    views = {"row": num_rows, "group": 1}
    once = textbook_scoring_flops(shape, num_rows, length)
    base = once + body_backward_flops(shape, full(num_rows, length), False) + head_flops(shape, num_rows * length)

    def contenders(run: Callable[[str], object], whole: int, parts: Callable[..., int]) -> dict[str, Contender]:
        result = {"textbook": Contender(partial(run, "textbook"), ready, 1, whole, 1.0, tokens)}
        for name, count in views.items():
            work = parts(shape, count, *lengths)
            for label, prepare in settings.items():
                one = Contender(partial(run, name), prepare, 3 if "graphs" in label else 1, work, whole / work, tokens)
                result[name + label] = one
        return result

    measured = race(session, contenders(updated, base, update_flops), 5)
    session.note("update", measured)
    found = race(session, contenders(scored, once, scoring_flops), 5)
    session.note("scoring", found)
    session.show("Update", HEADINGS, lines(measured))
    session.show("Scoring", HEADINGS, lines(found))
    settings[", fused"]()
    fused_alone = updated("group")
    settings[", fused, graphs"]()
    replayed = updated("group")
    ready()
    del recorded, settings
    free(session)
    agreement = {
        "log-probs, row against textbook, largest": float((scored("row") - scored("textbook")).abs().max()),
        "log-probs, group against textbook of its views, largest": float(
            (scored("group") - scored("textbook, the group's views")).abs().max()
        ),
        "gradient, row against textbook, relative": relative_difference(updated("row"), updated("textbook")),
        "gradient, group against textbook of its views, relative": relative_difference(
            updated("group"), updated("textbook, the group's views")
        ),
        "gradient, group, replayed against plain, relative": relative_difference(replayed, fused_alone),
    }
    session.note("agreement", agreement)
    session.show("Agreement in bf16", ("what", "difference"), list(agreement.items()))
    launches = {}
    for name, run in (("update", updated), ("scoring", scored)):
        for way in ("textbook", "row", "group"):
            ready()
            launches[f"{name}, {way}"] = launched(partial(run, way), session.is_cuda)
    session.note("launches", launches)
    session.show(
        "Kernels of one pass", ("what", "kernels", "seconds of the device"), [[k, *v] for k, v in launches.items()]
    )


def launched(run: Callable[[], object], is_cuda: bool) -> tuple[int, float]:
    """Kernels that a run launches, and the seconds that they take by themselves."""
    if not is_cuda:
        return 0, 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return len(kernels), sum(event.time_range.elapsed_us() for event in kernels) / 1e6


def policy_flops(policy: Policy, run: Callable[[], object]) -> int:
    """As the policy counts them."""
    before = replace(policy.work)
    run()
    return policy.work.since(before).flops


def measure_step(session: Session) -> None:
    """A GRPO step of one group: the textbook's parts scaled up from fewer repetitions, ours in full."""
    plan, inners = session.shape.plan, session.shape.num_inner_updates
    policy = session.adapted
    case = step.Case(session.shape.size, plan, inners, session.shape.rank, None, None)
    trainer = step.Trainer(policy, case, session.device)
    found = {"textbook": _textbook_parts(session, trainer, case)}
    ways = {"dual cache, group, fused, graphs": True, "exact, group, fused, graphs": False}
    given = random_rows(policy, update_case(session), session.device).rollout
    for name, cached in ways.items():
        if session.left < 0:
            break
        policy.network.use(session.fused())
        policy.graphs = ForwardGraphs() if session.is_cuda else None
        with session.autocast():
            # Before the clock: compilation, and what the graphs of every shape are recorded from.
            for _ in range(2 if cached else 0):
                our_sampler(plan, 0.9, cached)(policy, trainer.prompts, plan.rows, CounterDraws(0))
            for _ in range(3):
                step.our_step(trainer, step.Clock(session.device), True, cached, given)
            clock, before = step.Clock(session.device), replace(policy.work)
            found_peak = peak_gib(partial(step.our_step, trainer, clock, True, cached), session.is_cuda)
        found[name] = {**clock.medians(), "flops": policy.work.since(before).flops, "peak": found_peak}
        if session.is_cuda:
            found[name]["reserved"] = torch.cuda.max_memory_reserved() / GIB
            found[name]["graphs"] = policy.graphs.num_graphs if policy.graphs else 0
        session.note("step", found)
    policy.network.use(PLAIN)
    policy.graphs = None
    free(session)
    parts = ("rollout", "reward", "scoring", "update")
    base = sum(found["textbook"][part] for part in parts)
    rows = []
    for name, one in found.items():
        total = sum(one[part] for part in parts)
        mfu = one["flops"] / total / session.peak if "flops" in one else ""
        arithmetic = step.step_flops(policy.shape, plan, inners, "textbook") / step.step_flops(
            policy.shape, plan, inners, name
        )
        rows.append([name, total, *(one[part] for part in parts), base / total, arithmetic, mfu, one.get("peak", "")])
    headings = ("step", "s", *(f"{part} s" for part in parts), "factor", "arithmetic", "MFU", "peak GiB above weights")
    session.show(f"GRPO step, G {plan.rows}, mu {inners}, LoRA rank {session.shape.rank}", headings, rows)


def _textbook_parts(session: Session, trainer: step.Trainer, case: step.Case) -> dict[str, float]:
    """One block, one mask and two updates, multiplied."""
    policy, plan, inners = trainer.policy, case.plan, case.num_inner_updates
    policy.network.use(PLAIN)
    policy.graphs = None
    optimizer = trainer.restart()
    block = one_block(plan, plan.rows)
    ids = random_prompts(1, block.prompt_length, session.shape.vocab_size, session.device).prompt_ids
    ids = ids.repeat(plan.rows, 1)

    def rolled() -> None:
        textbook.sample(policy, ids, block.completion_length, block.steps_per_block, block.block_length, 0.9)

    rows = random_rows(policy, update_case(session), session.device)
    old, ref, advantages = update.constants(rows)

    def scored() -> None:
        with torch.no_grad():
            textbook.completion_logprobs(policy, rows.noised_ids, rows.rollout.completion_ids)

    def learnt() -> None:
        logprobs = textbook.completion_logprobs(policy, rows.noised_ids, rows.rollout.completion_ids)
        trainer.learn(optimizer, textbook.clipped_loss(logprobs, old, ref, advantages, step.EPSILON, step.BETA))

    result = {"reward": 0.0}
    with session.autocast():
        parts = {"rollout": (rolled, plan.num_blocks), "scoring": (scored, 2 * inners), "update": (learnt, inners)}
        for name, (run, times) in parts.items():
            run()
            result[name] = times * min(seconds_of(run, session.device) for _ in range(2))
    optimizer.zero_grad()
    return result


def sft_loss(policy: Policy, ids: torch.Tensor, is_masked: torch.Tensor, start: int) -> torch.Tensor:
    """As MaskedSFT computes it."""
    hidden = policy.hidden(apply_mask(ids, is_masked, policy.mask_token_id))
    logprobs = policy.logprobs(hidden[is_masked], ids[is_masked][:, None])[:, 0]
    nll = logprobs.new_zeros(ids.shape).masked_scatter(is_masked, -logprobs)
    weight = torch.full((len(ids),), 2.0, device=ids.device)
    is_target = torch.zeros_like(is_masked)
    is_target[:, start:] = True
    return MaskedCrossEntropy(per_target_token)(nll, weight, is_masked, is_target, int(is_target.sum()), len(ids))


def sft_run(session: Session, policy: Policy, rows: int, length: int) -> Callable[[], object]:
    """Forward, backward and optimizer step of one micro-batch at t = 1/2."""
    ids = random_prompts(rows, length, session.shape.vocab_size, session.device).prompt_ids
    start = length // 4
    is_masked = CounterDraws(1).uniform("mask", torch.arange(rows, device=ids.device), (length,)) < 0.5
    is_masked[:, :start] = False
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)

    def run() -> None:
        with session.autocast():
            loss = sft_loss(policy, ids, is_masked, start)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run()  # the optimizer's state is there from now on
    return run


def measure_sft(session: Session) -> None:
    """Blocks recomputed, as the 8B models are configured, and not."""
    policy = session.adapted
    rows = []
    for count, length in session.shape.sft:
        for recomputes in (True, False):
            recompute(policy, recomputes)
            contenders = {}
            for name, kernels in (("plain", PLAIN), ("fused", session.fused())):
                policy.network.use(kernels)
                try:
                    run = sft_run(session, policy, count, length)
                except RuntimeError as error:
                    print(f"   SFT {count} x {length}: {first_line(error)}", flush=True)
                    free(session)
                    continue
                flops = policy_flops(policy, run)
                contenders[name] = Contender(run, partial(policy.network.use, kernels), 1, flops, None, count * length)
            measured = race(session, contenders, 2) if contenders else {}
            label = f"{count} x {length}, blocks {'recomputed' if recomputes else 'kept'}"
            session.note(f"sft {label}", measured)
            rows += lines(measured, label)
            del contenders
            free(session)
    recompute(policy, False)
    policy.network.use(PLAIN)
    session.show("SFT micro-batch with optimizer step", ("rows x length", *HEADINGS), rows)


def recompute(policy: Policy, wanted: bool) -> None:
    network = policy.network
    policy.train(wanted)  # transformers recomputes in training mode only
    if wanted:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        network.gradient_checkpointing_disable()
