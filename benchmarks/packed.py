"""Block diffusion: the update of a rollout with every denoising step in one pass, against a pass of the canvas a step.

Both score the same tokens in the same states and have the same gradient (its difference is shown).

    python benchmarks/packed.py [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measuring import (
    MIDDLE,
    PROPORTIONAL,
    TINY,
    Setup,
    Size,
    against,
    compare,
    fresh_policy,
    plain,
    publish,
    random_prompts,
    relative_difference,
    setup,
    table,
)

from d1lit.draws import CounterDraws
from d1lit.estimators.packed_trace import PackedTraceEstimator
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.sampling import BlockSampler, EvenSchedule, FixedQuota, InverseCDF, TokenProbability
from d1lit.scoring import score
from d1lit.types import Context


@dataclass(frozen=True)
class Case:
    """One shape."""

    size: Size
    prompt_length: int
    completion_length: int
    block_length: int
    num_steps: int
    rollouts: int = 2


def cases(quick: bool) -> list[Case]:
    """Two tokens a step, as d1 decodes, and four."""
    if quick:
        return [Case(TINY, 8, 8, 4, 4)]
    return [
        Case(MIDDLE, 64, 64, 16, 32),
        Case(PROPORTIONAL, 64, 64, 16, 32),
        Case(PROPORTIONAL, 64, 64, 16, 16),
    ]


def measure(case: Case, chosen: Setup) -> dict[str, Any]:
    """One shape."""
    policy = fresh_policy(case.size, chosen.device, train_body=True)
    sampler = BlockSampler(
        case.completion_length, case.num_steps, case.block_length, 1.0, 0.0, InverseCDF(), TokenProbability(),
        FixedQuota(EvenSchedule()), stop_at_eos=False, block_causal=True,
    )  # fmt: skip
    prompts = random_prompts(case.rollouts, case.prompt_length, case.size.vocab_size, chosen.device)
    rollout = sampler(policy, prompts, 1, CounterDraws(0))
    context = Context(rollout, torch.zeros(case.rollouts), 0, 1, policy.mask_token_id, CounterDraws(0))
    signs = torch.linspace(-1, 1, rollout.completion_ids.numel(), device=chosen.device).view_as(rollout.completion_ids)
    trained = [p for p in policy.parameters() if p.requires_grad]
    estimators = {"apart": TraceEstimator(1, 1.0, True), "packed": PackedTraceEstimator(case.block_length, 1.0, True)}
    tokens = {}

    def update(name: str) -> Callable[[], list[torch.Tensor]]:
        estimator = estimators[name]
        views = sampler.attended(estimator.corrupt(context))
        tokens[name] = views.noised_ids.numel()

        def run() -> list[torch.Tensor]:
            logprobs = estimator.combine(score(policy, rollout, views).logprobs, views, context)
            return list(torch.autograd.grad((logprobs.value * signs).sum(), trained))

        return run

    runs = {name: update(name) for name in estimators}
    measured = compare(dict(runs), chosen.rounds, chosen.device)
    error = relative_difference(runs["packed"](), runs["apart"]())
    both = measured["packed"]
    shape = f"{case.size}, P {case.prompt_length}, C {case.completion_length}, blocks of {case.block_length}"
    row = [shape, case.num_steps, tokens["apart"] / tokens["packed"], against(both, None), both.memory_factor, error]
    return {"case": asdict(case), "measured": plain(measured), "gradient_difference": error, "row": row}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    chosen = setup("packed", arguments, rounds=3)
    records = [measure(case, chosen) for case in cases(chosen.quick)]
    head = ["network, shape", "steps", "fewer tokens", "faster", "less memory", "gradient differs by"]
    publish("packed", chosen, [table(head, [record["row"] for record in records])], records)


if __name__ == "__main__":
    main()
