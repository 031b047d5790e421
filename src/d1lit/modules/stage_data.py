"""The batches of a stage as Lightning wants them, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from d1lit.data import BatchPlan, batch_loader


class StageData(L.LightningDataModule):
    """Builds the stage's data set for this rank and counts the batches done; nothing else need be remembered."""

    def __init__(
        self,
        make_dataset: Callable[[BatchPlan], Dataset],
        batch_size: int,
        micro_batch_size: int,
    ) -> None:
        super().__init__()
        self.make_dataset = make_dataset
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.batches_done = 0

    def plan(self, world_size: int, rank: int) -> BatchPlan:
        """How the global batch is cut for this world."""
        return BatchPlan(self.batch_size, self.micro_batch_size, world_size, rank)

    def train_dataloader(self) -> DataLoader:
        """All batches of the stage, from the first one not yet done."""
        assert self.trainer is not None
        dataset = self.make_dataset(self.plan(self.trainer.world_size, self.trainer.global_rank))
        return batch_loader(dataset, len(dataset), self.batches_done)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps done, so that another world size can count its own batches."""
        assert self.trainer is not None
        return {"updates_done": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last finished optimizer step."""
        assert self.trainer is not None
        plan = self.plan(self.trainer.world_size, self.trainer.global_rank)
        self.batches_done = state_dict["updates_done"] * plan.num_micro
