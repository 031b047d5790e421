"""What an optimizer step did and what it cost: means over micro-batches and ranks, seconds, work, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from d1lit.advantages import has_spread, judged_std
from d1lit.costs import SectionCost, Work, matmul_peak, utilisation
from d1lit.modules.experience import is_judged, whole_rows
from d1lit.types import Metrics, RewardBatch, Rollout

_MB = 2**20
_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Meter:
    """Seconds, network work and peak memory of named sections since the last reading; sections do not overlap.

    Args:
        work: the network's running count.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._sections: dict[str, SectionCost] = {}
        self._open: tuple[str, float, Work] | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Charge the block to `name`."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: str) -> None:
        """Charge what follows to `name`, until `stop`; on a GPU the queue is drained first."""
        self.stop()
        _drain()
        reset_peak_memory()
        self._open = (name, time.perf_counter(), Work().plus(self._work))

    def stop(self) -> None:
        """Close the open section, if there is one."""
        if self._open is None:
            return
        _drain()
        (name, started, before), self._open = self._open, None
        spent = SectionCost(time.perf_counter() - started, self._work.since(before), peak_memory_mb())
        self._sections.setdefault(name, SectionCost()).add(spent)

    def read(self) -> dict[str, SectionCost]:
        """What each section took, and start again."""
        self.stop()
        sections, self._sections = self._sections, {}
        return sections


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Let the next `peak_memory_mb` speak of what happens from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _RESET_PEAK.write_text("5")  # Linux: the high-water mark of resident memory falls to its present value
    except OSError:
        return  # then the mark is that of the whole process


def peak_memory_mb() -> float:
    """Most memory held since `reset_peak_memory`: torch's on a GPU, the process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _MB
    try:
        lines = _STATUS.read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource  # not everywhere, and only here

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest / _MB if sys.platform == "darwin" else largest / 1024


# ------------------------------------------------------------------------------------------------------ cost of a stage


@dataclass
class StageCost:
    """What a stage has taken so far, over all ranks and resumes; whole optimizer steps only."""

    updates: int = 0
    sections: dict[str, SectionCost] = field(default_factory=dict)

    def add(self, sections: Mapping[str, SectionCost]) -> None:
        """One more optimizer step."""
        self.updates += 1
        for name, spent in sections.items():
            self.sections.setdefault(name, SectionCost()).add(spent)

    def record(self) -> dict[str, Any]:
        """As plain numbers: sums first, then each section."""
        return {"updates": self.updates, **_plain(total(self.sections)), "sections": _plain_all(self.sections)}

    def load(self, record: Mapping[str, Any]) -> None:
        """Go on from what `record` gave."""
        self.updates = record["updates"]
        self.sections = {
            name: SectionCost(
                spent["seconds"], Work(spent["forwards"], spent["tokens"], spent["flops"]), spent["peak_memory_mb"]
            )
            for name, spent in record["sections"].items()
        }


@runtime_checkable
class Accounted(Protocol):
    """A module that knows what its stage has cost."""

    @property
    def cost(self) -> StageCost:
        """So far."""
        ...


def total(sections: Mapping[str, SectionCost]) -> SectionCost:
    """Sum over sections; of the memory, the most."""
    result = SectionCost()
    for spent in sections.values():
        result.add(spent)
    return result


def _plain(spent: SectionCost) -> dict[str, Any]:
    return {"seconds": spent.seconds, **asdict(spent.work), "peak_memory_mb": spent.peak_memory_mb}


def _plain_all(sections: Mapping[str, SectionCost]) -> dict[str, Any]:
    return {name: _plain(spent) for name, spent in sections.items()}


def over_ranks(sections: dict[str, SectionCost], strategy: Strategy, world_size: int) -> dict[str, SectionCost]:
    """Work summed over ranks; of seconds and memory, the slowest and the largest rank's."""
    if world_size == 1:
        return sections
    names = sorted(sections)
    device = strategy.root_device
    work = torch.tensor(
        [list(asdict(sections[name].work).values()) for name in names], dtype=torch.float64, device=device
    )
    most = torch.tensor(
        [[sections[name].seconds, sections[name].peak_memory_mb] for name in names], dtype=torch.float64, device=device
    )
    work, most = strategy.reduce(work, reduce_op="sum"), strategy.reduce(most, reduce_op="max")
    assert isinstance(work, Tensor)
    assert isinstance(most, Tensor)
    return {
        name: SectionCost(seconds, Work(*map(int, counts)), memory)
        for name, counts, (seconds, memory) in zip(names, work.tolist(), most.tolist(), strict=True)
    }


def cost_metrics(sections: Mapping[str, SectionCost], peak: float, known: Iterable[str] = ()) -> dict[str, float]:
    """The costs of an optimizer step under their fixed names.

    Args:
        sections: what it took.
        peak: FLOP/s that all devices together could do.
        known: sections of earlier steps; those without work now are 0, because Lightning would repeat their last value.
    """
    whole = total(sections)
    sections = {name: SectionCost() for name in known} | dict(sections)
    busy = sum((spent.seconds for spent in sections.values() if spent.work.flops), 0.0)
    metrics = {
        "cost/forwards": float(whole.work.forwards),
        "cost/tokens": float(whole.work.tokens),
        "cost/flops": float(whole.work.flops),
        "cost/mfu": utilisation(whole.work.flops, busy, peak),
        "cost/peak_memory_mb": whole.peak_memory_mb,
    }
    for name, spent in sections.items():
        metrics[f"time/{name}_s"] = spent.seconds
        metrics[f"cost/{name}_peak_memory_mb"] = spent.peak_memory_mb
        metrics[f"cost/{name}_flops"] = float(spent.work.flops)
    return metrics


def close_update(module: L.LightningModule, meter: Meter, cost: StageCost, dtype: torch.dtype) -> dict[str, float]:
    """Charge what the meter has read to the stage; what the optimizer step cost, over ranks, under fixed names."""
    spent = over_ranks(meter.read(), module.trainer.strategy, module.trainer.world_size)
    cost.add(spent)
    return cost_metrics(spent, machine_peak(module, dtype), cost.sections)


def machine_peak(module: L.LightningModule, dtype: torch.dtype) -> float:
    """FLOP/s of all devices together, in the number type that products are taken in here."""
    device = module.device.type
    with module.trainer.precision_plugin.forward_context():
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    return matmul_peak(device, dtype) * module.trainer.world_size


# ------------------------------------------------------------------------------------------------------------- metrics


def repeated_fraction(ids: Int[Tensor, "N C"], mask: Bool[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Share of each completion's runs of three tokens that have stood in it before; 0 where there is no such run.

    Args:
        ids: below 2**21, so that three fit into one integer.
        mask: which tokens are the completion's, from its first on.
    """
    runs = (ids[:, :-2] << 42) | (ids[:, 1:-1] << 21) | ids[:, 2:]
    valid = mask[:, 2:]
    unlike = -1 - torch.arange(runs.shape[1], device=ids.device)
    ordered = torch.where(valid, runs, unlike).sort(dim=1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return repeats / valid.sum(1).clamp(min=1)


class UpdateMetrics(nn.Module):
    """Collects the numbers of one optimizer step; `finish` gives them under their fixed names."""

    def __init__(self) -> None:
        super().__init__()
        self._mean = nn.ModuleDict()
        self._rollout: dict[str, Tensor] = {}
        self._loss = SumMetric()
        self.latest_rollout: dict[str, float] = {}
        """Numbers of the latest rollout, which hold for all its inner updates. Lightning would repeat them by itself,
        but not in a run that was resumed: so they are part of a checkpoint."""

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
        """A rollout of this rank, with the rewards of all ranks; what no judge could judge is in no mean."""
        total, counts = (value.view(-1, group_size) for value in (rewards.total, is_judged(rewards)))
        spread = has_spread(whole_rows(rewards), group_size)
        self._rollout = {
            "rollout/reward": (total * counts).sum() / counts.sum().clamp(min=1),
            "rollout/reward_std": judged_std(total, counts).mean(),  # of n - 1, as in the advantages
            "rollout/zero_std_fraction": 1 - spread.float().mean(),
            "rollout/advantage_abs": advantages.abs().mean(),
            "rollout/failed_judge_fraction": 1 - counts.float().mean(),
        }
        for column, name in enumerate(names):
            asked = rewards.valid[:, column]
            if rewards.asked is not None:
                asked = asked & rewards.asked[:, column]
            if rewards.asked is None or bool(rewards.asked[:, column].any()):
                # A task of a mixture that this rollout did not meet keeps its last number.
                self._rollout[f"rollout/reward/{name}"] = rewards.value[asked, column].sum() / asked.sum().clamp(min=1)
        lengths = rollout.completion_mask.sum(1).float()
        self._mean_of("rollout/length", lengths)
        ended = (rollout.completion_ids == eos_token_id).any(dim=1)
        self._mean_of("rollout/truncated_fraction", ~ended)
        drawn = rollout.completion_mask & ~rollout.given
        self._mean_of("rollout/entropy", rollout.entropy[drawn])
        self._mean_of("rollout/repeated_fraction", repeated_fraction(rollout.completion_ids, rollout.completion_mask))

    def add_outcomes(self, shares: Mapping[str, float]) -> None:
        """Shares of this rank's latest rollout where a judge's outcome was another than a verdict, by outcome."""
        device = self._rollout["rollout/reward"].device
        for outcome, share in shares.items():
            self._mean_of(f"reward/{outcome}_fraction", torch.tensor(share, device=device))

    def add_shares(self, name: str, befallen: Tensor) -> None:
        """The share of True, over this rank's groups or rollouts."""
        self._mean_of(name, befallen.to(self._loss.device))

    def add_approximation(self, name: str, nats: Tensor) -> None:
        """How far the sampler's own log-probs lie from the network's, in nats."""
        self._mean_of(f"rollout/{name}", nats)

    def finish(self) -> dict[str, float]:
        """All numbers of the step, reduced over ranks, and start again."""
        numbers = {"train/loss": float(self._loss.compute())}
        numbers |= {name: float(value) for name, value in self._rollout.items()}
        for name in sorted(self._mean):
            metric = self._mean[name]
            assert isinstance(metric, MeanMetric)
            if metric.update_called:
                numbers[name] = float(metric.compute())
                metric.reset()
        self._loss.reset()
        self._rollout = {}
        here = {name: value for name, value in numbers.items() if name.startswith(("rollout/", "reward/"))}
        self.latest_rollout |= here
        return self.latest_rollout | numbers

    def _mean_of(self, name: str, value: Tensor) -> None:
        if name not in self._mean:
            self._mean[name] = MeanMetric(nan_strategy="ignore")
        metric = self._mean[name].to(value.device)
        assert isinstance(metric, MeanMetric)
        metric.update(value.detach().float())
