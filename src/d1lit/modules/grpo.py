"""diffu-GRPO (d1, arXiv 2504.12216, section 3.2): prompt -> rollout -> reward -> advantage -> log-prob -> loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import compress
from typing import Any

import lightning as L
import torch
from torch import Tensor

from d1lit.advantages import LengthPenalty, on_tokens, on_units, with_part
from d1lit.data import InnerUpdate
from d1lit.draws import CounterDraws
from d1lit.errors import RunError
from d1lit.joint_scoring import likelihoods
from d1lit.losses import check_place, of_steps, recording
from d1lit.losses.terms import KLEstimator, k1
from d1lit.models import Policy
from d1lit.models.sharding import gathered_parameters
from d1lit.modules.accounting import Meter, StageCost, UpdateMetrics, close_update
from d1lit.modules.experience import (
    Experience,
    all_finite,
    as_tree,
    dealt,
    detached,
    is_judged,
    neutral_totals,
    restored,
    reward_batch,
    whole_rows,
)
from d1lit.modules.inpainting import (
    INPAINTING,
    CompletingSampler,
    Inpainting,
    WorkedAnswer,
    prompts_of,
    replaced,
    with_verdicts,
)
from d1lit.modules.optimizing import (
    OptimizerFactory,
    ScheduleFactory,
    configure,
    refit_counters,
    seed_dropout,
    trainable_state,
)
from d1lit.modules.refilling import JudgedRollout, lacks_spread, refilled
from d1lit.modules.refusals import check_grpo
from d1lit.modules.step_rewards import step_rewards
from d1lit.processes import all_gather_objects, gathered_rows
from d1lit.rewards.parts import RewardParts, outcome_fraction
from d1lit.sampling import ApproximateSampler
from d1lit.sampling.prediction import evaluation_mode
from d1lit.scoring import score
from d1lit.types import (
    Advantage,
    AttendingSampler,
    Context,
    Corruption,
    LogProbEstimator,
    LogProbs,
    LossInputs,
    Outcome,
    PolicyLoss,
    PromptBatch,
    Reward,
    RewardBatch,
    Rollout,
    Sampler,
    Verdict,
)

MAX_FAILED_FRACTION = 0.5
"""A run whose judges fail (timeout, error) on more than this share of a rollout's completions stops."""
LOGGED_OUTCOMES: tuple[Outcome, ...] = ("timeout", "error", "unparsed", "refused")
REPLAYED_ROWS, REPLAYED_EVERY = 2, 10
"""An approximate sampler is compared with the exact network on two rows of every tenth rollout. That takes one
forward a step: of every rollout it would cost as much as a cached rollout itself."""


class DiffuGRPO(L.LightningModule):
    """Policy optimisation of a masked diffusion model on groups of rollouts.

    Differs from d1's code: the inner index comes from the data order (d1's advances per micro-batch), rollouts and old
    log-probs run without dropout, no global seed is touched, and text after the first end-of-sequence is not rewarded.
    `paper_compat=true` brings these back, the global seed apart (docs/paper-compat.md).
    """

    def __init__(
        self,
        policy: Policy,
        decode: Callable[[Tensor], str],
        sampler: Sampler,
        reward: RewardParts,
        advantage: Advantage,
        estimator: LogProbEstimator,
        loss: PolicyLoss,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        group_size: int,
        num_inner_updates: int,
        num_updates: int,
        seed: int,
        reference_sync_every: int | None = None,
        reference_sync_weight: float = 1.0,
        merge_for_rollouts: bool = False,
        views_per_chunk: int | None = None,
        allow_unsound_pair: bool = False,
        inner_index_by_micro_batch: bool = False,
        dropout_everywhere: bool = False,
        num_refills: int = 0,
        length_penalty: LengthPenalty | None = None,
        kl_in_reward: float = 0.0,
        kl_in_reward_estimator: KLEstimator = k1,
        inpainting: Inpainting | None = None,
        worked: WorkedAnswer | None = None,
        counted: Reward | None = None,
    ) -> None:
        super().__init__()
        check_place(estimator, policy.network.config.shift)
        self.policy = policy
        self.decode = decode
        self.sampler = recording(sampler, estimator, advantage)
        self.reward = reward
        self.advantage = advantage
        self.estimator = estimator
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule_factory = lr_schedule
        self.group_size = group_size
        self.num_inner_updates = num_inner_updates
        self.num_updates = num_updates
        self.draws = CounterDraws(seed)
        self.reference_sync_every = reference_sync_every
        self.reference_sync_weight = reference_sync_weight
        self.merge_for_rollouts = merge_for_rollouts
        self.views_per_chunk = views_per_chunk
        self.inner_index_by_micro_batch = inner_index_by_micro_batch
        self.dropout_everywhere = dropout_everywhere
        self.length_penalty = length_penalty
        self.kl_in_reward = kl_in_reward
        self.kl_in_reward_estimator = kl_in_reward_estimator
        self.inpainting = inpainting
        self.worked = worked
        """The ids of a row's worked answer; inpainting asks for them."""
        self.counted = counted
        """Whether a completion is right, whatever the reward is made of; inpainting asks it."""
        self.experience: list[Experience] = []
        self.row_names: Sequence[str] = ()
        """The ids of the rows of the latest micro-batch; the guard names them."""
        self.verdicts: dict[str, list[Verdict]] = {}
        """What the reward parts said of the latest rollout of this rank; the samples table reads it."""
        self.metrics = UpdateMetrics()
        self.meter = Meter(policy.work)
        self.cost = StageCost()
        self.reference_synced_at = -1
        """The rollout before which the reference moved last; a run stopped within that one does not move it again."""
        self.strict_loading = False  # frozen weights are not in a checkpoint: the stage starts from them

    check = staticmethod(check_grpo)

    # ------------------------------------------------------------------------------------------------------ the method

    def training_step(self, batch: InnerUpdate, batch_idx: int) -> Tensor:
        """One inner update of one micro-batch."""
        if batch.prompts is not None:
            self.experience = self.collect(batch.prompts, batch.step, batch.num_micro, batch.reserves)
        return self.update(self.experience[batch.micro], self.mask_index(batch), batch.num_micro)

    @torch.no_grad()
    def collect(
        self, prompts: PromptBatch, step: int, num_micro: int, reserves: Sequence[PromptBatch] = ()
    ) -> list[Experience]:
        """Sample, judge and freeze: everything that does not change over the inner updates of this rollout."""
        self._sync_reference(step)
        judged = self._helped(self._sample_and_judge(prompts, step), prompts, step)
        for reserve in reserves:
            if not lacks_spread(judged, self.group_size):
                break
            more = self._helped(self._sample_and_judge(reserve, step), reserve, step)
            judged = refilled(judged, more, self.group_size, self.global_rank, self.trainer.world_size)
        rollout, self.verdicts = judged.rollout, judged.verdicts
        if self.inpainting is not None:
            self.metrics.add_shares("rollout/replaced_fraction", rollout.given.any(1))
        rewards, names = self._with_penalties(judged, step)
        advantages = self.advantage(whole_rows(self._asked_rewards(rollout, rewards, step)), self.group_size)
        here = slice(self.global_rank * len(rollout.row_ids), (self.global_rank + 1) * len(rollout.row_ids))
        eos = self.policy.eos_token_id
        self.metrics.add_rollout(rollout, rewards, advantages, names, self.group_size, eos)
        self.metrics.add_outcomes({kind: outcome_fraction(self.verdicts, kind) for kind in LOGGED_OUTCOMES})
        if step % REPLAYED_EVERY == 0:
            self._measure_approximation(rollout)
        with self.meter("scoring"), nullcontext() if self.dropout_everywhere else evaluation_mode(self.policy):
            totals = neutral_totals(rewards, self.group_size)
            return self._freeze(rollout, totals[here], on_tokens(advantages[here], rollout), step, num_micro)

    def update(self, experience: Experience, inner: int, num_micro: int) -> Tensor:
        """The policy loss of one micro-batch under the corruption of this inner update."""
        self.meter.start("update")  # until `on_after_backward`
        self.row_names = list(dict.fromkeys(str(example.get("id")) for example in experience.rollout.examples))
        logprobs, entropy = self._likelihood(experience.rollout, experience.advantages, experience.step, inner)
        is_on_policy = inner == 0 and not self.inner_index_by_micro_batch
        old = detached(logprobs) if is_on_policy else experience.old[inner]
        inputs = LossInputs(
            logprobs=logprobs,
            old=old,
            ref=experience.ref[inner],
            advantages=on_units(experience.advantages, logprobs),
            rewards=experience.rewards,
            group_size=self.group_size,
            completion_mask=experience.rollout.completion_mask,
            entropy=entropy,
            given=experience.rollout.given,
            num_units=experience.num_units[inner],
            num_rollouts=experience.num_rollouts,
            progress=(experience.step * self.num_inner_updates + inner) / self.num_updates,
        )
        loss, metrics = self.loss(inputs)
        # A loss of nan is no step (SkipNonFinite): also where no token of the whole update is valid.
        loss = _nan_unless(all_finite(inputs) & (inputs.num_units > 0), loss)
        self.metrics.add_update(loss, metrics)
        # The loss is this micro-batch's share of the global one; Lightning averages over micro-batches and ranks.
        return loss * num_micro * self.trainer.world_size

    # ------------------------------------------------------------------------------------------------------ its pieces

    def mask_index(self, batch: InnerUpdate) -> int:
        """Whose masks an inner update sees: its own.

        With `inner_index_by_micro_batch` those that d1's code takes: it counts micro-batches, the present one included,
        so that with two of them and an even number of inner updates each sees half of the masks, twice.
        """
        if not self.inner_index_by_micro_batch:
            return batch.inner
        return (batch.inner * batch.num_micro + batch.micro + 1) % self.num_inner_updates

    def _sample_and_judge(self, prompts: PromptBatch, step: int) -> JudgedRollout:
        """Rollouts of some prompts, with what the judges say of them."""
        with self._sampling(step):
            rollout = self._with_text(self.sampler(self.policy, prompts, self.group_size, self.draws.at(step=step)))
        with self.meter("reward"):
            verdicts = self.reward.grade(rollout.completions, rollout.examples)
            return self._with_rewards(rollout, verdicts, step)

    def _helped(self, judged: JudgedRollout, prompts: PromptBatch, step: int) -> JudgedRollout:
        """With inpainting: groups that are all wrong are drawn again around given tokens; right ones replace some."""
        if self.inpainting is None:
            return judged
        assert self.worked is not None and self.counted is not None
        with self.meter("reward"):
            verdicts = self.counted(judged.rollout.completions, judged.rollout.examples)
            answers = [self.worked(example) for example in prompts.examples]
        helped = self.inpainting.helped(verdicts, answers, self.group_size, judged.rollout.completion_ids.shape[1])
        if any(all_gather_objects(bool(helped.any()))):  # then every rank takes part in what all gather
            judged = self._drawn_again(judged, prompts_of(prompts, helped), compress(answers, helped.tolist()), step)
        self.metrics.add_shares("rollout/inpainted_fraction", helped)
        return judged

    def _drawn_again(
        self, judged: JudgedRollout, prompts: PromptBatch, answers: Iterable[Sequence[int]], step: int
    ) -> JudgedRollout:
        """Rollouts of the given prompts (perhaps none on this rank) around pieces of their worked answers."""
        rule, rollout, verdicts, more = self.inpainting, judged.rollout, judged.verdicts, None
        assert rule is not None and self.counted is not None and isinstance(self.sampler, CompletingSampler)
        with self._sampling(step):
            if len(prompts.row_ids):
                draws, length = self.draws.at(step=step, inner=INPAINTING), rollout.completion_ids.shape[1]
                mask = self.policy.mask_token_id
                canvas = rule.canvas(prompts, list(answers), self.group_size, length, mask, draws)
                more = self._with_text(self.sampler.complete(self.policy, prompts, self.group_size, draws, canvas))
        with self.meter("reward"):
            if more is not None:
                rows = rule.replacements(self.counted(more.completions, more.examples), self.group_size)
                rollout, where = replaced(rollout, more, rows)
                graded = self.reward.grade([more.completions[n] for n in rows], [more.examples[n] for n in rows])
                verdicts = with_verdicts(verdicts, graded, where)
            return self._with_rewards(rollout, verdicts, step)

    def _with_text(self, rollout: Rollout) -> Rollout:
        """The rollout with its completions decoded."""
        return replace(rollout, completions=tuple(self.decode(ids) for ids in rollout.completion_ids))

    def _with_rewards(self, rollout: Rollout, verdicts: dict[str, list[Verdict]], step: int) -> JudgedRollout:
        """A rollout of this rank with the rewards of all ranks."""
        rewards = self._gathered(reward_batch(verdicts, self.reward.weights, rollout.device, step))
        self._refuse_failed(rewards, verdicts)
        return JudgedRollout(rollout, verdicts, rewards)

    def _with_penalties(self, judged: JudgedRollout, step: int) -> tuple[RewardBatch, list[str]]:
        """The rewards with what is judged by tokens and not by text as further parts, and the names of all parts."""
        rollout, rewards, names = judged.rollout, judged.rewards, list(judged.verdicts)
        if self.length_penalty is not None:
            rewards = with_part(rewards, gathered_rows(self.length_penalty(rollout)), 1.0)
            names.append("length_penalty")
        if self.kl_in_reward > 0:
            with self.meter("scoring"), evaluation_mode(self.policy):
                value = self._likelihood(rollout, rollout.entropy.new_zeros(len(rollout.row_ids)), step, 0)[0]
                with self.policy.reference():
                    ref = self._likelihood(rollout, rollout.entropy.new_zeros(len(rollout.row_ids)), step, 0)[0]
            ratio = torch.where(value.weight > 0, value.value - ref.value, 0.0)
            kl = (self.kl_in_reward_estimator(ratio) * value.weight).sum(1)
            rewards = with_part(rewards, gathered_rows(-kl), self.kl_in_reward)
            names.append("kl")
        return rewards, names

    def _asked_rewards(self, rollout: Rollout, rewards: RewardBatch, step: int) -> RewardBatch:
        """The rewards of the completions, or those of every step's prediction for an advantage that asks for them."""
        if not of_steps(self.advantage):
            return rewards
        with self.meter("reward"):
            return step_rewards(rollout, self.reward, self.decode, step)

    def _likelihood(
        self, rollout: Rollout, advantages: Tensor, step: int, inner: int
    ) -> tuple[LogProbs, Tensor | None]:
        """Log-probs of a rollout under the corruption of one inner update, the same views for old, ref and current.

        With the entropies of the predictions, where the loss reads them, brought to units as the log-probs are.
        """
        context = self._context(rollout, advantages, step, inner)
        corruption = self._views(context)
        wants_entropy = self.loss.traits.needs_entropy
        scores = score(self.policy, rollout, corruption, wants_entropy, views_per_chunk=self.views_per_chunk)
        logprobs = self.estimator.combine(scores.logprobs, corruption, context)
        if scores.entropy is None:
            return logprobs, None
        # What the estimator weighs views by (in all, not always 1) is to weigh entropies, not to scale them.
        entropy, scale = (
            self.estimator.combine(views, corruption, context).value.detach()
            for views in (scores.entropy, torch.ones_like(scores.entropy))
        )
        return logprobs, entropy / torch.where(scale == 0, 1.0, scale)

    def _views(self, context: Context) -> Corruption:
        """The estimator's views, attended as the sampler's canvases were."""
        corruption = self.estimator.corrupt(context)
        return self.sampler.attended(corruption) if isinstance(self.sampler, AttendingSampler) else corruption

    def _context(self, rollout: Rollout, advantages: Tensor, step: int, inner: int) -> Context:
        """What the estimator may know; its draws depend on the step, the inner update and the rows alone."""
        return Context(
            rollout=rollout,
            advantages=advantages,
            inner=inner,
            num_inner_updates=self.num_inner_updates,
            mask_token_id=self.policy.mask_token_id,
            draws=self.draws.at(step=step, inner=inner),
        )

    def _freeze(
        self, rollout: Rollout, rewards: Tensor, advantages: Tensor, step: int, num_micro: int
    ) -> list[Experience]:
        """Cut a rollout into micro-batches of whole groups, with old and reference log-probs where the loss asks."""
        rows = len(rollout.row_ids) // num_micro
        experience = []
        for micro in range(num_micro):
            cut = slice(micro * rows, (micro + 1) * rows)
            part, advantage = rollout.rows(cut.start, cut.stop), advantages[cut]
            inners = range(self.num_inner_updates)
            contexts = [self._context(part, advantage, step, inner) for inner in inners]
            corruptions = [self._views(context) for context in contexts]
            # At inner update 0 the policy is the old one.
            needs_old = [self.loss.traits.needs_old and (i > 0 or self.inner_index_by_micro_batch) for i in inners]
            found = iter(self._likelihoods(list(compress(contexts, needs_old)), list(compress(corruptions, needs_old))))
            old = tuple(next(found) if needs else None for needs in needs_old)
            ref: tuple[LogProbs | None, ...] = (None,) * self.num_inner_updates
            if self.loss.traits.needs_reference:
                with self.policy.reference():
                    ref = tuple(self._likelihoods(contexts, corruptions))
            units = tuple(self._unit_weight(c, context) for c, context in zip(corruptions, contexts, strict=True))
            experience.append(Experience(part, advantage, rewards[cut], old, ref, units, float(rows), step))
        return self._with_global_counts(experience)

    def _likelihoods(self, contexts: list[Context], corruptions: list[Corruption]) -> list[LogProbs]:
        """Of several inner updates, without gradients."""
        return likelihoods(self.policy, self.estimator, contexts, corruptions, self.views_per_chunk)

    def _unit_weight(self, corruption: Corruption, context: Context) -> float:
        """Unit weight of a micro-batch under the coming corruption; no network is needed to know it."""
        blank = torch.zeros_like(corruption.weight)
        return float(self.estimator.combine(blank, corruption, context).weight.sum())

    def _with_global_counts(self, experience: list[Experience]) -> list[Experience]:
        """Replace each micro-batch's own counts by those of the whole update, over micro-batches and ranks."""
        counts = torch.tensor([[*e.num_units, e.num_rollouts] for e in experience], dtype=torch.float64).sum(0)
        if self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts.to(self.device), reduce_op="sum").cpu()
        *units, rollouts = counts.tolist()
        return [replace(e, num_units=tuple(units), num_rollouts=rollouts) for e in experience]

    def _gathered(self, rewards: RewardBatch) -> RewardBatch:
        """Rewards of all ranks, in rank order: groups stay whole because a rank holds whole groups."""
        asked = None if rewards.asked is None else gathered_rows(rewards.asked)
        return replace(rewards, value=gathered_rows(rewards.value), valid=gathered_rows(rewards.valid), asked=asked)

    def _refuse_failed(self, rewards: RewardBatch, verdicts: Mapping[str, list[Verdict]]) -> None:
        """End the run where the judges of all ranks failed too often; the line tells this rank's share by outcome."""
        failed = 1.0 - float(is_judged(rewards).float().mean())
        if failed > MAX_FAILED_FRACTION:
            late, broken = (outcome_fraction(verdicts, kind) for kind in ("timeout", "error"))
            cause = (
                f"the judges failed on {failed:.0%} of a rollout's completions (here: time-out {late:.0%}, "
                f"error {broken:.0%}), so its rewards mean nothing"
            )
            raise RunError("reward", cause, "`d1lit doctor`, a longer reward deadline, or another reward", "E703")

    @contextmanager
    def _sampling(self, step: int) -> Iterator[None]:
        """What a sampler wants around it, charged to the rollout."""
        with (
            self.meter("rollout"),
            self._rollout_weights(),
            gathered_parameters(self.policy),
            self._rollout_dropout(step),
        ):
            yield

    def _rollout_weights(self) -> AbstractContextManager[None]:
        """The adapter folded into the base where that is exact enough, or asked for."""
        folds = (self.merge_for_rollouts or self.policy.merges_exactly) and not self.dropout_everywhere
        return self.policy.merged() if folds else nullcontext()

    def _rollout_dropout(self, step: int) -> AbstractContextManager[None]:
        """Off; or on, as in d1's code, seeded by rollout and rank (so it is not the same in another world)."""
        if not self.dropout_everywhere:
            return nullcontext()
        seed_dropout(self.policy, self.draws.at(step=step).torch_seed(f"dropout.rollout.{self.global_rank}"))
        return self.policy.keeping_dropout()

    def _measure_approximation(self, rollout: Rollout) -> None:
        """Where the sampler or its merged weights are not exact: by how much, on a few rows."""
        sampler = self.sampler
        if not isinstance(sampler, ApproximateSampler) or sampler.reviser is not None:
            return
        if sampler.is_approximate:
            with self.meter("replay"), self._rollout_weights(), gathered_parameters(self.policy):
                nats = sampler.replay(self.policy, rollout, REPLAYED_ROWS)
            self.metrics.add_approximation("approximation_nats", nats)
        if self.merge_for_rollouts and self.policy.is_adapted and not self.policy.merges_exactly:
            with self.meter("replay"), gathered_parameters(self.policy):
                nats = sampler.replay(self.policy, rollout, REPLAYED_ROWS)
            self.metrics.add_approximation("merge_nats", nats)

    def _sync_reference(self, step: int) -> None:
        """Move the reference to the policy every so many optimizer steps (d1's yaml says 64, which never acted)."""
        every = self.reference_sync_every
        if step == self.reference_synced_at:
            return
        done = step * self.num_inner_updates
        if every is not None and done and done // every > (done - self.num_inner_updates) // every:
            self.policy.sync_reference(self.reference_sync_weight)
            self.reference_synced_at = step

    # -------------------------------------------------------------------------------------------------- Lightning hooks

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule over the trainable parameters."""
        return configure(self.policy, self.optimizer_factory, self.schedule_factory, self.num_updates)

    def on_after_backward(self) -> None:
        """A micro-batch is done."""
        self.meter.stop()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clipping and the step itself belong to the update."""
        self.meter.start("update")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning does it, then close the update's account."""
        super().optimizer_step(*args, **kwargs)
        self.meter.stop()

    def on_train_batch_start(self, batch: InnerUpdate, batch_idx: int) -> None:
        """Dropout is the one reader of the global generator."""
        place = f"dropout.{self.global_rank * batch.num_micro + batch.micro}"  # the same rows in any world
        seed_dropout(self.policy, self.draws.at(step=batch.step, inner=batch.inner).torch_seed(place))

    def on_train_batch_end(self, outputs: Any, batch: InnerUpdate, batch_idx: int) -> None:
        """Log once an optimizer step, over all its micro-batches."""
        if batch.micro == batch.num_micro - 1:
            costs = close_update(self, self.meter, self.cost, self.policy.dtype)
            self.log_dict(self.metrics.finish() | costs, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the experience, so that a run stopped inside a cycle goes on inside it."""
        checkpoint["state_dict"] = trainable_state(self.policy, checkpoint["state_dict"])
        checkpoint["experience"] = all_gather_objects([as_tree(e) for e in self.experience])
        checkpoint["num_micro"] = self.trainer.accumulate_grad_batches
        checkpoint["cost"] = self.cost.record()
        checkpoint["latest_rollout"] = self.metrics.latest_rollout
        checkpoint["reference_synced_at"] = self.reference_synced_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the experience of this rank, however many wrote it, and the account."""
        num_micro, world_size = self.trainer.accumulate_grad_batches, self.trainer.world_size
        refit_counters(checkpoint, num_micro)
        saved = [[restored(tree, self.device) for tree in trees] for trees in checkpoint["experience"]]
        self.experience = dealt(saved, world_size, num_micro)[self.global_rank]
        self.cost.load(checkpoint["cost"])
        self.metrics.latest_rollout = dict(checkpoint["latest_rollout"])
        self.reference_synced_at = checkpoint["reference_synced_at"]


def _nan_unless(valid: Tensor, loss: Tensor) -> Tensor:
    """The loss, or nan; without a wait for the device."""
    return torch.where(valid, loss, torch.nan)
