"""A whole GRPO step: rollout, reward, old and reference log-probs, mu inner updates, for one prompt and its group.

LoRA on a frozen base, as d1 trains; the reference is the base with the adapter off. The textbook does what d1 does:
the adapter beside the matrices in rollouts, old and reference log-probs of all mu masks in one batch of mu * G rows,
one row a view. In the proportional case lengths are half of d1's (canvas 228 for 456, blocks of 16 for 32) at as many
steps, 128, so that rollout and updates stand in d1's proportion, and a block to the canvas as well. With the larger
vocabulary they are a quarter, at 64 steps, to end within the hour.

    python benchmarks/step.py [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import textbook
import torch
from measuring import (
    MIDDLE,
    TINY,
    Measured,
    Setup,
    Size,
    against,
    compare,
    fresh_policy,
    keep,
    plain,
    publish,
    random_prompts,
    setup,
    table,
)
from rollout import our_sampler
from scoring import textbook_scoring_flops
from update import BETA, EPSILON

from d1lit.advantages import group_mean
from d1lit.costs import (
    LLADA_8B,
    NetworkShape,
    RolloutPlan,
    body_backward_flops,
    dual_cache_rollout_flops,
    exact_rollout_flops,
    full,
    head_flops,
    scoring_flops,
    synchronise,
    textbook_rollout_flops,
    update_flops,
)
from d1lit.draws import CounterDraws
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.joint_scoring import likelihoods
from d1lit.models import LoraSettings, Policy, add_lora
from d1lit.scoring import score
from d1lit.types import Context, RewardBatch, Rollout

PROMPT_MASK_PROB = 0.15
HALF = Size(2048, 256, 8)
"""Half the proportional network in width and vocabulary: head to body as in LLaDA-8B."""


@dataclass(frozen=True)
class Case:
    """A step; the plan's rows are the group."""

    size: Size
    plan: RolloutPlan
    num_inner_updates: int
    rank: int
    exact_floor: float | None
    cached_floor: float | None


def cases(quick: bool) -> list[Case]:
    """The shapes whose factors are promised."""
    if quick:
        return [Case(TINY, RolloutPlan(2, 8, 16, 8, 4), 2, 2, None, None)]
    return [
        Case(HALF, RolloutPlan(6, 100, 128, 16, 16), 12, 8, 1.5, 7.0),
        Case(MIDDLE, RolloutPlan(6, 50, 64, 8, 8), 12, 8, 1.5, 7.0),
    ]


class Clock:
    """CPU (on a GPU: wall) seconds of the parts of a step, run by run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.parts: dict[str, list[float]] = {}

    def now(self) -> float:
        """When the device has done what it was asked."""
        synchronise(self.device)
        return time.process_time() if self.device == "cpu" else time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Note the seconds of the block."""
        start = self.now()
        yield
        self.parts.setdefault(name, []).append(self.now() - start)

    def medians(self) -> dict[str, float]:
        """Of every part."""
        return {name: statistics.median(seconds) for name, seconds in self.parts.items()}


def reward_of(completion_ids: torch.Tensor) -> torch.Tensor:
    """Something that differs within a group and costs about nothing."""
    return (completion_ids % 7 == 0).float().mean(1)


@dataclass
class Trainer:
    """A policy with an adapter that every run starts anew."""

    policy: Policy
    case: Case
    device: str

    def __post_init__(self) -> None:
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        self.start = [0.02 * torch.randn(p.shape, generator=generator).to(p.device) for p in self.trained]
        self.prompts = random_prompts(1, self.case.plan.prompt_length, self.case.size.vocab_size, self.device)

    def restart(self) -> torch.optim.Optimizer:
        """The adapter as it was at first, and a new optimizer."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)
        return torch.optim.AdamW(self.trained, lr=3e-6)

    def advantages(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Reward minus the group's mean."""
        value = reward_of(completion_ids)[:, None]
        batch = RewardBatch(value, torch.ones_like(value, dtype=torch.bool), torch.ones(1, device=value.device))
        return group_mean(batch, len(value))

    def learn(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        """One inner update."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def textbook_step(trainer: Trainer, clock: Clock) -> None:
    """As d1 does it."""
    case, policy = trainer.case, trainer.policy
    plan, inners = case.plan, case.num_inner_updates
    optimizer = trainer.restart()
    prompt_ids = trainer.prompts.prompt_ids.repeat(plan.rows, 1)
    with clock("rollout"):
        steps = plan.num_blocks * plan.steps_per_block
        ids = textbook.sample(policy, prompt_ids, plan.completion_length, steps, plan.block_length, 0.9)
        completion_ids = ids[:, plan.prompt_length :].clone()
    with clock("reward"):
        advantages = trainer.advantages(completion_ids)
    with clock("scoring"), torch.no_grad():
        views = [
            textbook.masked_prompts(prompt_ids, PROMPT_MASK_PROB, policy.mask_token_id, plan.completion_length, inner)
            for inner in range(inners)
        ]
        every = completion_ids.repeat(inners, 1)
        old = textbook.completion_logprobs(policy, torch.cat(views), every).view(inners, plan.rows, -1)
        with policy.reference():
            ref = textbook.completion_logprobs(policy, torch.cat(views), every).view(inners, plan.rows, -1)
    with clock("update"):
        for inner in range(inners):
            logprobs = textbook.completion_logprobs(policy, views[inner], completion_ids)
            loss = textbook.clipped_loss(logprobs, old[inner], ref[inner], advantages, EPSILON, BETA)
            trainer.learn(optimizer, loss)


def our_step(trainer: Trainer, clock: Clock, shared: bool, cached: bool, given: Rollout | None = None) -> None:
    """As DiffuGRPO does it, without Lightning around it; with a given rollout only what follows one."""
    case, policy = trainer.case, trainer.policy
    plan, inners = case.plan, case.num_inner_updates
    optimizer = trainer.restart()
    estimator = OneStepEstimator(PROMPT_MASK_PROB, num_masks=1, share_within_group=shared)
    with clock("rollout"), policy.merged() if policy.merges_exactly else nullcontext():
        sampler = our_sampler(plan, 0.9, cached)
        rollout = sampler(policy, trainer.prompts, plan.rows, CounterDraws(0)) if given is None else given
    with clock("reward"):
        advantages = trainer.advantages(rollout.completion_ids)
    # The textbook scores every token; these random weights know no end of a sequence either.
    rollout = replace(rollout, completion_mask=torch.ones_like(rollout.completion_mask))
    with clock("scoring"):
        contexts = [_context(trainer, rollout, advantages, inner) for inner in range(inners)]
        corruptions = [estimator.corrupt(context) for context in contexts]
        old = [None, *likelihoods(policy, estimator, contexts[1:], corruptions[1:])]
        with policy.reference():
            ref = likelihoods(policy, estimator, contexts, corruptions)
    with clock("update"):
        for inner in range(inners):
            logprobs = _likelihood(trainer, estimator, rollout, advantages, inner)
            before = old[inner]
            constant = logprobs.detach() if before is None else before.value
            loss = textbook.clipped_loss(logprobs, constant, ref[inner].value, advantages, EPSILON, BETA)
            trainer.learn(optimizer, loss)


def _context(trainer: Trainer, rollout: Rollout, advantages: torch.Tensor, inner: int) -> Context:
    inners, mask_id = trainer.case.num_inner_updates, trainer.policy.mask_token_id
    return Context(rollout, advantages, inner, inners, mask_id, CounterDraws(0, inner=inner))


def _likelihood(
    trainer: Trainer, estimator: OneStepEstimator, rollout: Rollout, advantages: torch.Tensor, inner: int
) -> torch.Tensor:
    context = _context(trainer, rollout, advantages, inner)
    corruption = estimator.corrupt(context)
    return estimator.combine(score(trainer.policy, rollout, corruption).logprobs, corruption, context).value


def step_flops(shape: NetworkShape, plan: RolloutPlan, inners: int, name: str) -> int:
    """By the formulas, the adapter's own work left out."""
    lengths = (plan.prompt_length, plan.completion_length)
    if name == "textbook":
        scoring = textbook_scoring_flops(shape, plan.rows, plan.length)
        backward = body_backward_flops(shape, full(plan.rows, plan.length), trains_weights=False)
        backward += head_flops(shape, plan.rows * plan.length)
        return textbook_rollout_flops(shape, plan) + inners * (2 * scoring + scoring + backward)
    views = plan.rows if name == "exact, row" else 1
    rollout = dual_cache_rollout_flops if name.startswith("dual") else exact_rollout_flops
    scoring = (2 * inners - 1) * scoring_flops(shape, views, *lengths)
    return rollout(shape, plan) + scoring + inners * update_flops(shape, views, *lengths)


def measure(case: Case, chosen: Setup) -> dict[str, Any]:
    """One shape."""
    policy = add_lora(fresh_policy(case.size, chosen.device), LoraSettings("paper", case.rank, 2.0 * case.rank, 0.0), 0)
    trainer = Trainer(policy.eval(), case, chosen.device)
    kinds = {"exact, row": (False, False), "exact, group": (True, False), "dual cache, group": (True, True)}
    clocks = {name: Clock(chosen.device) for name in ("textbook", *kinds)}
    contenders: dict[str, Any] = {"textbook": lambda: textbook_step(trainer, clocks["textbook"])}
    for name, (shared, cached) in kinds.items():
        contenders[name] = lambda name=name, shared=shared, cached=cached: our_step(
            trainer, clocks[name], shared, cached
        )
    measured = compare(contenders, chosen.rounds, chosen.device, warm_up=False)
    parts = {name: clock.medians() for name, clock in clocks.items()}
    return {
        "case": asdict(case),
        "measured": plain(measured),
        "parts": parts,
        "rows": [row(case, name, measured, parts[name], policy.shape) for name in measured],
    }


def row(
    case: Case, name: str, measured: dict[str, Measured], parts: dict[str, float], shape: NetworkShape
) -> list[Any]:
    """For the table."""
    one = measured[name]
    floor = {"exact, group": case.exact_floor, "dual cache, group": case.cached_floor}.get(name)
    paper = RolloutPlan(6, 200, 256, 32, 16)

    def promised(shape: NetworkShape, plan: RolloutPlan) -> float:
        textbook_flops = step_flops(shape, plan, case.num_inner_updates, "textbook")
        return textbook_flops / step_flops(shape, plan, case.num_inner_updates, name)

    return [
        str(case.size),
        name,
        one.seconds,
        *(parts[part] for part in ("rollout", "reward", "scoring", "update")),
        against(one, floor),
        promised(shape, case.plan),
        promised(LLADA_8B, paper),
    ]


HEADINGS = (
    "network", "step", "s", "rollout s", "reward s", "scoring s", "update s", "factor (range)", "FLOP ratio",
    "8B on a GPU, arithmetic",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    chosen = setup("step", arguments, rounds=2)
    records = []
    for case in cases(chosen.quick):
        records.append(measure(case, chosen))
        keep("step", chosen, [table(HEADINGS, [line for record in records for line in record["rows"]])], records)
    publish("step", chosen, [table(HEADINGS, [line for record in records for line in record["rows"]])], records)


if __name__ == "__main__":
    main()
