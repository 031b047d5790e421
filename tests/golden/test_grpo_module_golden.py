"""d1's whole rollout step through `DiffuGRPO` itself: sample, judge, advantages, masks, old and reference log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from d1lit.advantages import group_mean
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.terms import k3, token_mean
from d1lit.models import Policy, load_network
from d1lit.modules import DiffuGRPO
from d1lit.modules.optimizing import constant
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import BlockSampler, EvenSchedule, FixedQuota, InverseCDF, TokenProbability
from d1lit.types import Example, PromptBatch, Verdict
from tests.golden.reading import d1_entries, d1_model_folder, d1_tensors, entry_id, needs_golden
from tests.golden.replay import largest_difference, uniform_below

pytestmark = needs_golden


@dataclass(frozen=True)
class StoredMasks:
    """The prompt masks of every inner update, as uniforms; nothing else may be drawn at temperature 0."""

    masks: Tensor
    """[mu N P]"""
    mask_prob: float
    inner: int = 0

    def at(self, *, step: int | None = None, inner: int | None = None) -> StoredMasks:
        return StoredMasks(self.masks, self.mask_prob, self.inner if inner is None else inner)

    def uniform(self, stream: str, rows: Tensor, shape: tuple[int, ...], step: int = 0, dtype=torch.float32) -> Tensor:
        assert (stream, step) == ("prompt_mask", 0)
        # The estimator counts positions backward from the completion.
        return uniform_below(self.masks[self.inner][rows], self.mask_prob).flip(1)

    def batch(self, stream: str, shape: tuple[int, ...], step: int = 0) -> Tensor:
        raise AssertionError(f"{stream} was drawn for the whole batch")


@dataclass(frozen=True)
class StoredRewards:
    """The manifest's rewards; the text is not looked at."""

    values: Sequence[float]

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        assert len(completions) == len(self.values)
        return [Verdict(value) for value in self.values]


def module_of(policy: Policy, case: dict[str, Any], golden: dict[str, Tensor], mask_prob: float) -> DiffuGRPO:
    """A DiffuGRPO set up as the reference was, with the stored masks and rewards."""
    prompt_length = golden["prompt_ids"].shape[1]
    sampler = BlockSampler(
        completion_length=case["gen_length"],
        num_steps=case["steps"],
        block_length=case["block_length"],
        temperature=0.0,
        guidance=0.0,
        proposal=InverseCDF(),
        confidence=TokenProbability(),
        commit=FixedQuota(EvenSchedule()),
        stop_at_eos=False,  # the reference fills every canvas to its end
        rows_per_forward=case["generation_batch_size"],
    )
    module = DiffuGRPO(
        policy=policy,
        decode=lambda ids: " ".join(map(str, ids.tolist())),
        sampler=sampler,
        reward=RewardParts({"stored": StoredRewards(golden["rewards"].tolist())}, {"stored": 1.0}),
        advantage=group_mean,
        estimator=OneStepEstimator(prompt_mask_prob=mask_prob, num_masks=1, share_within_group=False),
        # Old and reference log-probs are computed only where the loss asks for them, so it asks whatever beta was.
        loss=ClippedPolicyLoss(0.5, 0.5, case["beta"] or 0.04, k3, token_mean),
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.0),
        lr_schedule=partial(constant, warmup_updates=0),
        group_size=case["num_generations"],
        num_inner_updates=case["num_iterations"],
        num_updates=case["num_iterations"],
        seed=0,
    )
    module.draws = StoredMasks(golden["mask"][:, :, :prompt_length], mask_prob)  # type: ignore[assignment]
    module.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return module


@pytest.mark.parametrize("entry", d1_entries("E2_rollout"), ids=entry_id)
def test_rollout_step_of_d1(entry: dict[str, Any]) -> None:
    tensors, settings, tolerance = d1_tensors(entry), entry["settings"], entry["tolerance"]
    assert {case["case"] for case in settings["cases"]} == {name.split(".")[0] for name in entry["tensors"]}
    for case in settings["cases"]:
        prefix = f"{case['case']}."
        golden = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        policy = Policy(load_network(str(d1_model_folder(entry))), attend_padding=True)
        policy.network.config.eos_token_id = case["eos_id_used"]
        policy.keep_reference()
        module = module_of(policy, case, golden, settings["p_mask_prompt"])
        experience = collected(module, golden["prompt_ids"][:: case["num_generations"]])
        rollout, completion = experience.rollout, golden["completion_mask"].bool()

        assert torch.equal(rollout.prompt_ids, golden["prompt_ids"])
        assert torch.equal(rollout.completion_ids, golden["completion_ids"])
        assert torch.equal(rollout.completion_mask, completion)
        torch.testing.assert_close(experience.rewards, golden["rewards"], rtol=0, atol=0)
        torch.testing.assert_close(experience.advantages, golden["advantages"], **tolerance["advantages"])

        # At inner update 0 the policy has not moved: the module takes the current log-probs for the old ones.
        first, _ = module._likelihood(rollout, experience.advantages, experience.step, 0)
        old = [first, *experience.old[1:]]
        assert len(old) == len(experience.ref) == len(golden["old_logps"]) == case["num_iterations"]
        largest = check_logprobs(old, golden["old_logps"], completion, tolerance["logps"])
        if "ref_logps" in golden:
            largest = max(largest, check_logprobs(experience.ref, golden["ref_logps"], completion, tolerance["logps"]))
        print(
            f"{entry_id(entry)} {case['case']}: ids equal; advantages off by at most "
            f"{largest_difference(experience.advantages, golden['advantages']):.1e}, log-probs by {largest:.2e}"
        )


def collected(module: DiffuGRPO, prompt_ids: Tensor) -> Any:
    """The one micro-batch that `collect` makes of these prompts."""
    prompts = PromptBatch(
        prompt_ids,
        torch.ones_like(prompt_ids, dtype=torch.bool),
        torch.arange(len(prompt_ids)),
        ({},) * len(prompt_ids),
    )
    (experience,) = module.collect(prompts, 0, 1)
    return experience


def check_logprobs(found: Sequence[Any], expected: Tensor, completion: Tensor, tolerance: dict[str, float]) -> float:
    """Every inner update's log-probs within tolerance on the completion; the largest difference."""
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.weight > 0, completion)
        value = ours.value.detach()[completion]
        torch.testing.assert_close(value, theirs[completion], **tolerance)
        largest = max(largest, largest_difference(value, theirs[completion]))
    return largest
