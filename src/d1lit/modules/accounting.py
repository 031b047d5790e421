"""What an optimizer step did and what it cost: means over micro-batches and ranks, seconds, forwards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from d1lit.types import Metrics, RewardBatch, Rollout


class Stopwatch:
    """Seconds spent in named sections since the last reading."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`; on a GPU the queue is drained first and last."""
        self._drain()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._drain()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds by name, and start again."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    @staticmethod
    def _drain() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class UpdateMetrics(nn.Module):
    """Collects the numbers of one optimizer step; `finish` gives them under their fixed names."""

    def __init__(self) -> None:
        super().__init__()
        self._mean = nn.ModuleDict()
        self._rollout: dict[str, Tensor] = {}
        self._loss = SumMetric()

    def add_update(self, loss: Tensor, metrics: Metrics) -> None:
        """The share of one micro-batch: losses add up to the global loss, metrics are averaged."""
        self._loss.to(loss.device)
        self._loss.update(loss.detach())
        for name, value in metrics.items():
            self._mean_of(f"train/{name}", value)

    def add_rollout(
        self,
        rollout: Rollout,
        rewards: RewardBatch,
        advantages: Tensor,
        names: Sequence[str],
        group_size: int,
        eos_token_id: int,
    ) -> None:
        """A rollout of this rank, with the rewards of all ranks."""
        total = rewards.total.reshape(-1, group_size)
        self._rollout = {
            "rollout/reward": total.mean(),
            "rollout/reward_std": total.std(dim=1, correction=0).mean(),
            "rollout/zero_std_fraction": (total.std(dim=1, correction=0) < 1e-6).float().mean(),
            "rollout/advantage_abs": advantages.abs().mean(),
            "rollout/failed_judge_fraction": 1 - rewards.valid.float().mean(),
        }
        for column, name in enumerate(names):
            self._rollout[f"rollout/reward/{name}"] = rewards.value[:, column].mean()
        lengths = rollout.completion_mask.sum(1).float()
        self._mean_of("rollout/length", lengths)
        ended = (rollout.completion_ids == eos_token_id).any(dim=1)
        self._mean_of("rollout/truncated_fraction", ~ended)
        self._mean_of("rollout/entropy", rollout.entropy[rollout.completion_mask])

    def finish(self, stopwatch: Stopwatch) -> dict[str, float]:
        """All numbers of the step, reduced over ranks, and start again."""
        numbers = {"train/loss": float(self._loss.compute())}
        numbers |= {name: float(value) for name, value in self._rollout.items()}
        for name in sorted(self._mean):
            metric = self._mean[name]
            assert isinstance(metric, MeanMetric)
            if metric.update_called:
                numbers[name] = float(metric.compute())
                metric.reset()
        numbers |= {f"time/{name}_s": seconds for name, seconds in stopwatch.read().items()}
        self._loss.reset()
        self._rollout = {}
        return numbers

    def _mean_of(self, name: str, value: Tensor) -> None:
        if name not in self._mean:
            self._mean[name] = MeanMetric(nan_strategy="ignore")
        self._mean[name].to(value.device).update(value.detach().float())
