"""The policy of a run, put together again from what its base and its stages handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d1lit.app.plan import Plan
from d1lit.errors import ConfigError
from d1lit.models import Policy, add_lora, load_weights, merge_lora


def kept_base(run: Path) -> Path:
    """Where a run keeps the built-in base that it began with."""
    return run / "stages" / "base" / "model"


def trains_adapters(plan: Plan) -> bool:
    """Whether any stage leaves the weights it began with as they are, so that its result needs them."""
    return any(parts.lora is not None for parts in plan.stages)


def policy_of_run(plan: Plan, run: Path, start_of: str | None = None) -> tuple[Policy, Any]:
    """The final policy of a run and its tokenizer, or the policy as the stage `start_of` began, its own adapter fresh.

    Raises:
        ConfigError: if the run trained adapters on a built-in base that it did not keep.
    """
    if start_of is None and not trains_adapters(plan):
        return plan.make_policy(run / "model")
    base = None
    if plan.base is not None and trains_adapters(plan):
        base = kept_base(run)
        if not base.is_dir():
            cause = f"{run} does not hold the built-in base that its adapters stand on ({base})"
            raise ConfigError("run", cause, "a run made anew, which keeps it", "E508")
    policy, tokenizer = plan.make_policy(base)
    for parts in plan.stages:
        policy = merge_lora(policy)
        if parts.lora is not None:
            policy = add_lora(policy, parts.lora, plan.seed)
        policy.train_order_head(parts.trains_order_head, plan.seed)
        if parts.name == start_of:
            break
        load_weights(policy, run / "stages" / parts.name / "model")
    return policy, tokenizer
