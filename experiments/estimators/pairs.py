"""Estimators, losses and advantages, paired as papers use them, at the papers' values where those scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from world import Setting

from d1lit import advantages as adv
from d1lit.estimators.elbo import ELBOEstimator, MaskwiseELBOEstimator, QuadratureEstimator, ReplicateEstimator
from d1lit.estimators.left_to_right import LeftToRightEstimator
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.paired import CoupledEstimator, ESPOEstimator, PairScoreEstimator
from d1lit.estimators.sampled_steps import EntropyStepsEstimator, SampledStepsEstimator, SurprisalStepsEstimator
from d1lit.estimators.spg import SPGEstimator, hide_in_block
from d1lit.estimators.step_merge import StepMergeEstimator, TraceEstimator
from d1lit.estimators.unigrpo import UniGRPOEstimator
from d1lit.estimators.views import completion_views
from d1lit.losses.clipped import ClippedPolicyLoss, SequenceClippedLoss
from d1lit.losses.policy_gradient import MaskwiseBoundLoss, ReinforceLoss, StableDRLLoss
from d1lit.losses.terms import canvas_length, k2, k3, sequence_mean, sequence_sum, token_mean, unit_length
from d1lit.losses.weighted import DMPOLoss, GDSDLoss, WD1Loss, mean_centering
from d1lit.sampling import InverseCDF
from d1lit.sampling.parts import Cells, Choice, Prediction
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class Pair:
    """What makes an update out of rollouts."""

    estimator: Any
    loss: Any
    advantage: Any = adv.group_mean
    predicts_mask: bool = False
    """Score with the mask token in the softmax."""


@dataclass
class Recorder:
    """A proposal that remembers every token it drew, those that are thrown away too."""

    inner: InverseCDF = field(default_factory=InverseCDF)
    drawn: list[Tensor] = field(default_factory=list)

    def uniforms(self, cells: Cells, vocabulary: int) -> Tensor:
        """As the inverse CDF."""
        return self.inner.uniforms(cells, vocabulary)

    def draw(self, prediction: Prediction, temperature: float, uniforms: Tensor) -> Choice:
        """As the inverse CDF, noted."""
        choice = self.inner.draw(prediction, temperature, uniforms)
        self.drawn.append(torch.tensor(choice.tokens.tolist()))
        return choice


@dataclass(frozen=True)
class AllProposals:
    """Every token drawn in every step, whether it was fixed or thrown away: the score function of the whole sampler.

    Given all draws, which positions are fixed does not depend on the weights (but where confidences tie), so REINFORCE
    with this likelihood has the exact gradient as its mean. It needs a record that no published method keeps.
    """

    recorder: Recorder
    setting: Setting
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("view")

    def corrupt(self, context: Context) -> Corruption:
        """One view a step: what was fixed before it is shown."""
        rollout, setting = context.rollout, self.setting
        n, c = rollout.completion_ids.shape
        block = torch.arange(c) // setting.block_length
        noised, targets, weights = [], [], []
        for step, drawn in enumerate(self.recorder.drawn):
            hidden = rollout.commit_step >= step
            current = block[(rollout.commit_step[0] == step).nonzero()[0, 0]]
            open_ = hidden & (block == current)
            noised.append(torch.where(hidden, context.mask_token_id, rollout.completion_ids))
            targets.append(torch.zeros(n, c, dtype=torch.int64).masked_scatter(open_, drawn))
            weights.append(open_.float())
        views = completion_views(
            rollout, torch.stack(noised, 1), torch.stack(weights, 1), temperature=setting.temperature
        )
        return Corruption(**{**vars(views), "target_ids": torch.stack(targets, 1)})

    def combine(self, view_logprobs: Tensor, corruption: Corruption, context: Context) -> LogProbs:
        """One unit a step."""
        value = (view_logprobs * corruption.weight).sum(2)
        return LogProbs(value, torch.ones_like(value))


def clipped(epsilon: float, aggregate: Any = token_mean) -> ClippedPolicyLoss:
    """Token-level clipping without a KL penalty."""
    return ClippedPolicyLoss(epsilon, epsilon, beta=0.0, kl=k3, aggregate=aggregate)


def pairs(setting: Setting, recorder: Recorder) -> dict[str, Pair]:
    """All pairs by name; the KL weights are 0, because the reference is the starting point."""
    t, b = setting.temperature, setting.block_length
    in_block = partial(hide_in_block, block_length=b)
    spg = SPGEstimator(in_block, 2, 0.15, eubo_beta=1.5, mix_weight=0.5)
    loo, reinforce = adv.leave_one_out, ReinforceLoss(sequence_sum)
    trace = TraceEstimator(1, t)
    return {
        "d1 (one step, row)": Pair(OneStepEstimator(0.15, 1, False), clipped(0.5)),
        "d1, shared masks": Pair(OneStepEstimator(0.15, 1, True), clipped(0.5)),
        "one step, clean prompt": Pair(OneStepEstimator(0.0, 1, True), clipped(0.5)),
        "one step, 4 row masks": Pair(OneStepEstimator(0.15, 4, False), clipped(0.5)),
        "one step, z-score": Pair(OneStepEstimator(0.0, 1, True), clipped(0.2, sequence_mean), adv.group_zscore),
        "wd1": Pair(OneStepEstimator(0.15, 1, False), WD1Loss(1.0, False)),
        "elbo 1 + reinforce": Pair(ELBOEstimator(1, True), reinforce, loo),
        "elbo 4 + reinforce": Pair(ELBOEstimator(4, True), reinforce, loo),
        "coupled": Pair(CoupledEstimator(0.2, 0.8), clipped(0.5), loo),
        "espo": Pair(ESPOEstimator(2, True, True), SequenceClippedLoss(0.2, 0.2, 0.0, k2, canvas_length), loo),
        "gdpo": Pair(QuadratureEstimator(3, True), SequenceClippedLoss(0.5, 0.5, 0.0, k2, unit_length)),
        "spg": Pair(spg, ReinforceLoss(token_mean)),
        "stable_drl": Pair(spg, StableDRLLoss(5.0)),
        "bgpo 4": Pair(MaskwiseELBOEstimator(4, True), MaskwiseBoundLoss(0.2, 0.2, sequence_mean)),
        "dmpo": Pair(ReplicateEstimator(4, 0.1, True, True), DMPOLoss(0.04, 0.5, mean_centering, canvas_length)),
        "gdsd": Pair(PairScoreEstimator(2, True), GDSDLoss(4e-4, 1.0, 0.0, k2, canvas_length), loo),
        "unigrpo": Pair(UniGRPOEstimator(), clipped(0.2)),
        "step merge, 2": Pair(StepMergeEstimator(2, t), clipped(0.2)),
        "trajectory": Pair(trace, clipped(0.2)),
        "trajectory, temperature 1": Pair(TraceEstimator(1, 1.0), clipped(0.2)),
        "trajectory, mask counted": Pair(trace, clipped(0.2), predicts_mask=True),
        "agrpo, 2 steps": Pair(SampledStepsEstimator(2, t), clipped(0.2)),
        "egspo, 2 steps": Pair(EntropyStepsEstimator(2, t), clipped(0.2)),
        "drift, 2 steps": Pair(SurprisalStepsEstimator(2, 1.0, 0.6), reinforce),
        "left to right": Pair(LeftToRightEstimator(1.0, t), clipped(0.2), adv.group_zscore),
        "all proposals": Pair(AllProposals(recorder, setting), reinforce, loo),
    }
