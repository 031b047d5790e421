"""Rollouts: exact against the textbook sampler, token for token; the dual cache at equal steps; what overhead is left.

python benchmarks/rollout.py [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import textbook
import torch
import torch.nn.functional as F
from measuring import (
    LARGE_VOCABULARY,
    MIDDLE,
    PROPORTIONAL,
    TINY,
    Run,
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

from d1lit.costs import (
    LLADA_8B,
    NetworkShape,
    RolloutPlan,
    dual_cache_rollout_flops,
    exact_rollout_flops,
    textbook_rollout_flops,
)
from d1lit.draws import CounterDraws
from d1lit.models import Policy
from d1lit.models.cache import KVCache
from d1lit.sampling import BlockSampler, DualCache, EvenSchedule, FixedQuota, InverseCDF, TokenProbability

PAPER = RolloutPlan(rows=8, prompt_length=200, completion_length=256, block_length=32, steps_per_block=16)
"""d1's rollouts, for arithmetic about the 8B model."""


@dataclass(frozen=True)
class Case:
    """A size, a plan and the least factors over the textbook at temperatures 0 and 0.9, and in memory."""

    size: Size
    plan: RolloutPlan
    floors: tuple[float | None, float | None]
    memory_floor: float | None
    cached: bool = False


def cases(quick: bool) -> list[Case]:
    """The shapes whose factors are promised."""
    if quick:
        plan = RolloutPlan(2, 8, 16, 8, 4)
        return [Case(TINY, plan, (None, None), None), Case(TINY, plan, (None, None), None, cached=True)]
    return [
        Case(PROPORTIONAL, RolloutPlan(1, 392, 64, 32, 4), (1.15, 1.25), None),
        Case(MIDDLE, RolloutPlan(4, 100, 128, 32, 4), (3.5, 7.0), 8.0),
        Case(LARGE_VOCABULARY, RolloutPlan(2, 100, 128, 32, 2), (5.0, 12.0), 8.0),
        Case(PROPORTIONAL, RolloutPlan(1, 392, 64, 32, 16), (4.0, None), None, cached=True),
        Case(MIDDLE, RolloutPlan(1, 392, 64, 32, 16), (10.0, None), None, cached=True),
    ]


def our_sampler(plan: RolloutPlan, temperature: float, cached: bool) -> BlockSampler:
    """Low-confidence remasking as the textbook does it."""
    return BlockSampler(
        completion_length=plan.completion_length,
        num_steps=plan.num_blocks * plan.steps_per_block,
        block_length=plan.block_length,
        temperature=temperature,
        guidance=0.0,
        proposal=InverseCDF(),
        confidence=TokenProbability(),
        commit=FixedQuota(EvenSchedule()),
        stop_at_eos=False,
        cache=DualCache(KVCache) if cached else None,
    )


def matmuls_alone(policy: Policy, plan: RolloutPlan) -> Run:
    """The products of an exact rollout with nothing between them: the same weights, the same shapes, any numbers."""
    width, rows = policy.shape.width, plan.rows
    wide = torch.randn(rows * plan.length, policy.shape.mlp_width, device=policy.device)
    narrow = torch.randn(rows * plan.length, width, device=policy.device)
    attended = torch.randn(rows, width // 64, plan.length, 64, device=policy.device)

    @torch.inference_mode()
    def run() -> None:
        for masked in plan.masked * plan.num_blocks:
            for number, block in enumerate(policy.network.model.layers):
                queries = masked if number == policy.shape.num_layers - 1 else plan.length
                some, more = narrow[: rows * queries], wide[: rows * queries]
                F.linear(narrow, block.self_attn.k_proj.weight)
                F.linear(narrow, block.self_attn.v_proj.weight)
                F.linear(some, block.self_attn.q_proj.weight)
                F.scaled_dot_product_attention(attended[:, :, :queries], attended, attended)
                F.linear(some, block.self_attn.o_proj.weight)
                F.linear(some, block.mlp.gate_proj.weight)
                F.linear(some, block.mlp.up_proj.weight)
                F.linear(more, block.mlp.down_proj.weight)
            F.linear(narrow[: rows * masked], policy.network.head_weight)

    return run


def measure(case: Case, temperature: float, chosen: Setup) -> dict[str, Any]:
    """One shape at one temperature."""
    policy = fresh_policy(case.size, chosen.device)
    plan = case.plan
    prompts = random_prompts(plan.rows, plan.prompt_length, case.size.vocab_size, chosen.device)
    steps = plan.num_blocks * plan.steps_per_block
    sampler = our_sampler(plan, temperature, case.cached)

    def plainly() -> torch.Tensor:
        ids = textbook.sample(policy, prompts.prompt_ids, plan.completion_length, steps, plan.block_length, temperature)
        return ids[:, plan.prompt_length :]

    def ours() -> torch.Tensor:
        return sampler(policy, prompts, 1, CounterDraws(0)).completion_ids

    contenders: dict[str, Run] = {"textbook": plainly, "ours": ours}
    if not case.cached and temperature == 0:
        contenders["matmuls alone"] = matmuls_alone(policy, plan)
    measured = compare(contenders, chosen.rounds, chosen.device)
    equal = int((plainly() == ours()).sum()) if temperature == 0 else None
    formula = dual_cache_rollout_flops if case.cached else exact_rollout_flops
    return {
        "size": asdict(case.size),
        "plan": asdict(plan),
        "temperature": temperature,
        "cached": case.cached,
        "measured": plain(measured),
        "equal_tokens": equal,
        "tokens": plan.rows * plan.completion_length,
        "flops_factor": flops_factor(policy.shape, plan, case.cached),
        "flops_factor_8b": flops_factor(LLADA_8B, PAPER, case.cached),
        "rate_gflops": formula(policy.shape, plan) / measured["ours"].seconds / 1e9,
        "row": row(case, temperature, measured, policy.shape, equal),
    }


def flops_factor(shape: NetworkShape, plan: RolloutPlan, cached: bool) -> float:
    """What the formulas promise."""
    return textbook_rollout_flops(shape, plan) / (dual_cache_rollout_flops if cached else exact_rollout_flops)(
        shape, plan
    )


def row(case: Case, temperature: float, measured: dict[str, Any], shape: NetworkShape, equal: int | None) -> list[Any]:
    """For the table."""
    plan, ours = case.plan, measured["ours"]
    floor = case.floors[0] if temperature == 0 else case.floors[1]
    alone = measured.get("matmuls alone")
    tokens = plan.rows * plan.completion_length
    memory = f"{ours.memory_factor:.1f}" + ("" if case.memory_floor is None else f" (floor {case.memory_floor:g})")
    return [
        str(case.size),
        f"{plan.rows}, {plan.prompt_length}, {plan.completion_length}, {plan.num_blocks * plan.steps_per_block}",
        "dual cache" if case.cached else "exact",
        temperature,
        measured["textbook"].seconds,
        ours.seconds,
        against(ours, floor),
        flops_factor(shape, plan, case.cached),
        f"{measured['textbook'].peak_mb:.0f} -> {ours.peak_mb:.0f}",
        memory,
        "" if equal is None else f"{equal}/{tokens}",
        "" if alone is None else alone.seconds / ours.seconds,
        flops_factor(LLADA_8B, PAPER, case.cached),
    ]


HEADINGS = (
    "network", "B, P, C, steps", "sampler", "T", "textbook s", "ours s", "factor (range)", "FLOP ratio", "peak MB",
    "memory factor", "equal tokens", "share of the matmuls' rate (floor 0.75)", "8B on a GPU, arithmetic",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    chosen = setup("rollout", arguments)
    records = []
    for case in cases(chosen.quick):
        for temperature in (0.0,) if case.cached else (0.0, 0.9):
            records.append(measure(case, temperature, chosen))
            keep("rollout", chosen, [table(HEADINGS, [record["row"] for record in records])], records)
    publish("rollout", chosen, [table(HEADINGS, [record["row"] for record in records])], records)


if __name__ == "__main__":
    main()
