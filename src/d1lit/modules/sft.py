"""Masked supervised fine-tuning (LLaDA, arXiv 2502.09992; d1, arXiv 2504.12216, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from d1lit.data import CompletionBatch, EncodedRow, Layout, completion_batch, moved
from d1lit.draws import CounterDraws
from d1lit.losses import MaskedCrossEntropy
from d1lit.masking import BlockMask, ExactCountMask, complementary_mask
from d1lit.models import Policy
from d1lit.modules.accounting import Meter, StageCost, UpdateMetrics, close_update
from d1lit.modules.optimizing import (
    OptimizerFactory,
    ScheduleFactory,
    configure,
    refit_counters,
    seed_dropout,
    trainable_state,
)
from d1lit.types import MaskRule, Metrics, NoisedRows, RowView, Schedule, TimeSampler


class MaskedSFT(L.LightningModule):
    """Learns demonstrations by predicting the completion tokens that the forward process hid.

    Schedule, times, masks and what the network sees of a row are separate choices. Validation uses a fixed grid of
    times and fixed masks, so that its loss can be compared from step to step.
    """

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        times: TimeSampler,
        validation_times: TimeSampler,
        mask: MaskRule,
        view: RowView,
        loss: MaskedCrossEntropy,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        num_updates: int,
        seed: int,
        validation_rows: Sequence[EncodedRow] = (),
        layout: Layout | None = None,
        token_weight: Callable[[Tensor], Tensor] | None = None,
        complementary: bool = False,
    ) -> None:
        super().__init__()
        self.check(schedule, mask, view, complementary)
        check_own_place(view, policy.network.config.shift)
        self.policy = policy
        self.schedule = schedule
        self.times = times
        self.validation_times = validation_times
        self.mask = mask
        self.view = view
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule_factory = lr_schedule
        self.num_updates = num_updates
        self.draws = CounterDraws(seed)
        self.validation_rows = validation_rows
        self.layout = layout
        self.token_weight = token_weight
        """From the mask to one weight a token, in the place of the schedule's (Dream's CART)."""
        self.complementary = complementary
        """Also learn each row under the complement of its mask, so that every token is hidden once a step."""
        self.row_names: Sequence[str] = ()
        """The ids of the rows of the latest micro-batch; the guard names them."""
        self._names_of_update: list[str] = []
        self._num_scored = torch.zeros(())
        """Tokens that were hidden and scored since the last optimizer step."""
        self.metrics = UpdateMetrics()
        self.meter = Meter(policy.work)
        self.cost = StageCost()
        self.strict_loading = False  # frozen weights are not in a checkpoint: the stage starts from them

    @staticmethod
    def check(schedule: Schedule, mask: MaskRule, view: RowView, complementary: bool = False, **others: Any) -> None:
        """Refuse what has no meaning, before there is a network.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        middle = torch.tensor([0.3])
        in_order = view.pattern is not None and view.pattern.kind == "order"
        if in_order and float(schedule.mask_prob(middle)) < 1:
            raise ValueError(
                f"module.schedule: {type(schedule).__name__} leaves tokens visible, and {type(view).__name__} learns "
                "each at its turn in a random order of all. Try: schedule=constant schedule.ratio=1.0"
            )
        if not complementary:
            return
        if abs(float(schedule.mask_prob(middle) + schedule.mask_prob(1 - middle)) - 1) > 0.01:
            raise ValueError(
                f"module.complementary: {type(schedule).__name__} does not hide at 1 - t what it shows at t, so the "
                "complement of a mask has no weight. Try: schedule=linear"
            )
        if isinstance(mask, BlockMask | ExactCountMask):
            raise ValueError(
                f"module.complementary: what {type(mask).__name__} leaves visible follows another law than what it "
                "hides. Try: module.mask._target_=d1lit.masking.BernoulliMask"
            )

    def training_step(self, batch: CompletionBatch, batch_idx: int) -> Tensor:
        """Hide, predict, weigh."""
        self.meter.start("update")  # until `optimizer_step` is over: the backward pass is part of it
        self.row_names = batch.names
        self._names_of_update += batch.names
        loss, metrics = self.masked_loss(batch, self.draws.at(step=batch.update), self.times)
        self._num_scored = self._num_scored.to(loss.device) + metrics.pop("num_scored")
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            num_scored, self._num_scored = self._num_scored, torch.zeros(())
            if self.trainer.world_size > 1:
                num_scored = self.trainer.strategy.reduce(num_scored, reduce_op="sum")
            # A loss of nan is no step (SkipNonFinite): also where no token of the whole update is hidden.
            names, self._names_of_update = self._names_of_update, []
            if not num_scored > 0:
                loss, self.row_names = loss * torch.nan, names
        self.metrics.add_update(loss, metrics)
        # The loss is this micro-batch's share of the global one; Lightning averages over micro-batches and ranks.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def masked_loss(self, batch: CompletionBatch, draws: CounterDraws, times: TimeSampler) -> tuple[Tensor, Metrics]:
        """Weighted cross-entropy of the hidden tokens; with complements, the mean over both masks of the pair."""
        t = times(draws, batch.row_ids, batch.row_ids, batch.num_rows)
        where = draws, batch.row_ids, self.schedule.mask_prob(t), batch.is_target
        is_masked, factor = self.mask(*where), self.mask.weight(*where)
        loss, metrics = self._view_loss(batch, is_masked, t, factor, draws)
        if not self.complementary:
            return loss, metrics
        # 1 - t = 0 hides nothing there, but its weight must stay finite
        rest, others = self._view_loss(
            batch, complementary_mask(is_masked, batch.is_target), (1 - t).clamp(min=1e-3), factor, draws
        )
        return (loss + rest) / 2, {**metrics, "num_scored": metrics["num_scored"] + others["num_scored"]}

    def _view_loss(
        self, batch: CompletionBatch, is_masked: Tensor, t: Tensor, factor: Tensor, draws: CounterDraws
    ) -> tuple[Tensor, Metrics]:
        """The loss under one mask; the head sees the positions that are hidden and scored."""
        mask_token_id = self.policy.mask_token_id
        rows = NoisedRows(batch.ids, is_masked, batch.is_target, batch.attention, batch.row_ids, mask_token_id)
        seen = self.view(rows, draws)
        hidden = self.policy.hidden(seen.ids, seen.attention, seen.position_ids)
        is_scored = is_masked & (factor > 0)
        row, column = is_scored.nonzero(as_tuple=True)
        logprobs = self.policy.logprobs(hidden[row, seen.slots[column]], batch.ids[row, column][:, None])[:, 0]
        nll = logprobs.new_zeros(batch.ids.shape).masked_scatter(is_scored, -logprobs)
        weight = (
            self.schedule.weight(t)[:, None] * factor if self.token_weight is None else self.token_weight(is_masked)
        )
        loss = self.loss(nll, weight, is_scored, batch.is_target, batch.num_targets, batch.num_rows)
        return loss, {
            "nll_per_masked_token": nll.detach().sum() / is_scored.sum().clamp(min=1),
            "masked_fraction": is_masked.sum() / batch.is_target.sum(),
            "num_scored": is_scored.sum().float(),
        }

    @torch.no_grad()
    def validation_loss(self, batch_size: int) -> float | None:
        """The loss on the validation demonstrations, over a fixed grid of times with fixed masks; None without any.

        Args:
            batch_size: rows that go through the network at a time.
        """
        rows, layout = self.validation_rows, self.layout
        if not rows or layout is None:
            return None
        was_training, total = self.policy.training, 0.0
        self.policy.eval()
        for start in range(0, len(rows), batch_size):
            part = slice(start, min(start + batch_size, len(rows)))
            batch = completion_batch(rows, part, 0, layout, self.policy.eos_token_id, self.policy.pad_token_id)
            loss, _ = self.masked_loss(moved(batch, self.device), CounterDraws(0, step=-1), self.validation_times)
            total += float(loss)
        self.policy.train(was_training)
        return total

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

    def on_train_batch_start(self, batch: CompletionBatch, batch_idx: int) -> None:
        """Dropout is the one reader of the global generator."""
        seed_dropout(self.policy, self.draws.at(step=batch.update).torch_seed(f"dropout.{int(batch.row_ids[0])}"))

    def on_train_batch_end(self, outputs: Any, batch: CompletionBatch, batch_idx: int) -> None:
        """Log once an optimizer step, over all its micro-batches."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            costs = close_update(self, self.meter, self.cost, self.policy.dtype)
            self.log_dict(self.metrics.finish() | costs, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights; keep the account."""
        checkpoint["state_dict"] = trainable_state(self.policy, checkpoint["state_dict"])
        checkpoint["cost"] = self.cost.record()
        checkpoint["num_micro"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the account, and count batches as this run cuts them."""
        refit_counters(checkpoint, self.trainer.accumulate_grad_batches)
        self.cost.load(checkpoint["cost"])


def check_own_place(view: RowView, is_shifted: bool) -> None:
    """Refuse a view in which a place sees another context than the one before it, on a network that predicts one on.

    Raises:
        ValueError: naming the view.
    """
    if view.pattern is not None and is_shifted:
        raise ValueError(
            f"module.view: {type(view).__name__} needs a network that predicts a token at its own place, not at the "
            "one before. Try: model=llada_8b, or view=whole [E207]"
        )
