"""How noisy the policy gradient is because prompt masks are drawn: one mask a row, one a group, K a group.

A trained model writes groups of rollouts, the task's reward judges them, and under these fixed rollouts the gradient of
the policy loss (at ratio 1) is taken for many draws of the prompt masks. Noise is the trace of the covariance over the
draws divided by the squared length of the mean, the latter freed of its own noise. All estimators have the same mean.

    python benchmarks/gradient_noise.py --run RUN_FOLDER [--quick] [--draws N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measuring import publish, setup, table
from torch import Tensor
from trained import Trained, load, split_arguments

from d1lit.advantages import group_mean
from d1lit.app.plan import decode
from d1lit.data import prompt_batch
from d1lit.draws import CounterDraws
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.modules.experience import reward_batch
from d1lit.modules.stage_data import prompt_rows
from d1lit.scoring import score
from d1lit.types import Context, Rollout

PROMPT_MASK_PROB = 0.15


def judged_rollout(
    trained: Trained, groups: int, group_size: int, num_prompts: int, pretend: bool
) -> tuple[Rollout, Tensor, int]:
    """Groups whose rewards differ, with their advantages; and how many groups were looked at.

    Args:
        trained: the model.
        groups: most groups taken.
        group_size: rollouts of a prompt.
        num_prompts: groups looked at.
        pretend: random rewards instead of the task's, for a model that has learnt nothing.
    """
    policy, plan = trained.policy, trained.plan
    (parts,) = [stage for stage in plan.stages if stage.name == "grpo"] or [None]
    assert parts is not None, "the run's recipe has no stage grpo, whose reward is read"
    rows = prompt_rows(plan.task, "train", trained.tokenizer)[:num_prompts]
    prompts = prompt_batch(rows, range(len(rows)), policy.pad_token_id)
    rollout = plan.sampler(policy, prompts, group_size, CounterDraws(0))
    text = [decode(trained.tokenizer, policy.eos_token_id, ids) for ids in rollout.completion_ids]
    reward = parts.module.keywords["reward"]  # type: ignore[attr-defined]
    rewards = reward_batch(reward.grade(text, rollout.examples), reward.weights, rollout.device, 0)
    if pretend:
        rewards = replace(rewards, value=torch.rand(rewards.value.shape, generator=torch.Generator().manual_seed(0)))
    advantages = group_mean(rewards, group_size)
    differing = advantages.view(-1, group_size).abs().amax(1) > 1e-6
    chosen = differing.nonzero()[:groups, 0]
    if len(chosen) == 0:
        raise SystemExit("no group has differing rewards: the model has learnt too little for this measurement")
    index = (chosen[:, None] * group_size + torch.arange(group_size)).flatten()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "row_ids", "commit_step",
             "sampled_logprobs", "confidence", "entropy")  # fmt: skip
    picked = replace(
        rollout, **{name: vars(rollout)[name][index] for name in names}, trace=None, completions=(), examples=()
    )
    return picked, advantages[index], len(rows)


def gradient(trained: Trained, estimator: OneStepEstimator, rollout: Rollout, advantages: Tensor, draw: int) -> Tensor:
    """Of -sum A log p / tokens, as one vector."""
    policy = trained.policy
    context = Context(rollout, advantages, draw, 1, policy.mask_token_id, CounterDraws(1, inner=draw))
    corruption = estimator.corrupt(context)
    logprobs = estimator.combine(score(policy, rollout, corruption).logprobs, corruption, context)
    loss = -(logprobs.value * logprobs.weight * advantages[:, None]).sum() / logprobs.weight.sum()
    trained_weights = [p for p in policy.parameters() if p.requires_grad]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, trained_weights)])


def noise(gradients: Tensor) -> tuple[float, Tensor]:
    """Trace of the covariance over the squared mean, both unbiased; and the mean."""
    count = len(gradients)
    mean = gradients.mean(0)
    variance = float((gradients - mean).square().sum()) / (count - 1)
    return variance / max(float(mean.square().sum()) - variance / count, 1e-300), mean


def estimators(group_size: int) -> dict[str, tuple[OneStepEstimator, str]]:
    """By name, with the views a group costs."""
    make = partial(OneStepEstimator, PROMPT_MASK_PROB)
    kinds = {"row (d1)": (make(1, False), str(group_size)), "group": (make(1, True), "1")}
    for masks in sorted({2, 4, group_size}):
        kinds[f"group, K = {masks}"] = (make(masks, True), str(masks))
    return kinds


HEADINGS = ("model", "masks", "views a group", "tr Cov / |mean|^2", "less than row by", "cosine of the mean with row's")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--draws", type=int, default=None)
    own, rest = parser.parse_known_args(arguments)
    run, rest = split_arguments(rest)
    chosen = setup("gradient_noise", rest)
    draws = own.draws or (3 if chosen.quick else 60)
    trained = load(run, chosen.quick)
    trained.policy.requires_grad_(True)
    group_size = 2 if chosen.quick else 6
    rollout, advantages, looked_at = judged_rollout(trained, 8, group_size, 8 if chosen.quick else 256, chosen.quick)
    lines: list[list[Any]] = []
    first: tuple[float, Tensor] | None = None
    for name, (estimator, views) in estimators(group_size).items():
        vectors = torch.stack([gradient(trained, estimator, rollout, advantages, draw) for draw in range(draws)])
        value, mean = noise(vectors)
        first = first or (value, mean)
        cosine = float(torch.nn.functional.cosine_similarity(mean, first[1], dim=0))
        lines.append([trained.name, name, views, value, first[0] / value, cosine])
    groups = len(advantages) // group_size
    note = (
        f"{groups} groups of {group_size} with differing rewards among {looked_at} prompts, {draws} draws of masks; "
        f"prompt mask probability {PROMPT_MASK_PROB}."
    )
    publish("gradient_noise", chosen, [f"{table(HEADINGS, lines)}\n\n{note}"], [{"headings": HEADINGS, "lines": lines}])


if __name__ == "__main__":
    main()
