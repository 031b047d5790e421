"""Optimizers, learning-rate schedules, and the step that refuses gradients that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from d1lit.modules.masters import HALF, MasterWeights

OptimizerFactory = Callable[[Iterable[tuple[str, Tensor]]], Optimizer]
"""Builds an optimizer from named parameters."""


ScheduleFactory = Callable[[Optimizer, int], LRScheduler]
"""Builds a learning-rate schedule for a number of optimizer steps; it moves once a step."""


def constant(optimizer: Optimizer, num_updates: int, warmup_updates: int) -> LRScheduler:
    """Linear warm-up, then the full rate."""
    return LambdaLR(optimizer, partial(_warmup, warmup_updates=warmup_updates))


def linear_decay(optimizer: Optimizer, num_updates: int, warmup_updates: int) -> LRScheduler:
    """Linear warm-up, then linearly to zero at the last update."""
    return LambdaLR(optimizer, partial(_linear, num_updates=num_updates, warmup_updates=warmup_updates))


def cosine_decay(optimizer: Optimizer, num_updates: int, warmup_updates: int, final_fraction: float) -> LRScheduler:
    """Linear warm-up, then half a cosine down to `final_fraction` of the full rate."""
    shape = partial(_cosine, num_updates=num_updates, warmup_updates=warmup_updates, final_fraction=final_fraction)
    return LambdaLR(optimizer, shape)


def _warmup(update: int, warmup_updates: int) -> float:
    return min(1.0, (update + 1) / (warmup_updates + 1))


def _progress(update: int, num_updates: int, warmup_updates: int) -> float:
    return min(1.0, max(0.0, (update - warmup_updates) / max(1, num_updates - warmup_updates)))


def _linear(update: int, num_updates: int, warmup_updates: int) -> float:
    return min(_warmup(update, warmup_updates), 1.0 - _progress(update, num_updates, warmup_updates))


def _cosine(update: int, num_updates: int, warmup_updates: int, final_fraction: float) -> float:
    wave = torch.cos(torch.tensor(torch.pi * _progress(update, num_updates, warmup_updates), dtype=torch.float64))
    decayed = final_fraction + (1 - final_fraction) * 0.5 * (1 + float(wave))
    return min(_warmup(update, warmup_updates), decayed)


def configure(
    module: torch.nn.Module, optimizer: OptimizerFactory, lr_schedule: ScheduleFactory, num_updates: int
) -> dict[str, Any]:
    """What Lightning wants of `configure_optimizers`: trainable parameters only; the schedule moves every update."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    is_half = any(p.dtype in HALF for _, p in named)
    built = MasterWeights(named, optimizer) if is_half else optimizer(named)
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_schedule(built, num_updates), "interval": "step"}}


def seed_dropout(policy: torch.nn.Module, seed: int) -> None:
    """Seed the global generator where the network has dropout, which knows no other: else leave it alone.

    So the masks of a micro-batch depend on which one it is, not on what ran before it, and a resumed run repeats them.
    """
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in policy.modules()):
        torch.manual_seed(seed)


def trainable_state(policy: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the frozen base: the stage's start already holds it. A kept reference stays in."""
    base = {f"policy.{name}" for name, p in policy.named_parameters() if not p.requires_grad}

    def is_base(name: str) -> bool:  # weights in four bits have their scales beside them, as NAME.weight.absmax
        return name in base or name.split(".weight.")[0] + ".weight" in base

    return {name: value for name, value in state.items() if not is_base(name) or "reference" in name}


def refit_counters(checkpoint: dict[str, Any], num_micro: int) -> None:
    """Let Lightning's counters of batches say what they would if every update had had `num_micro` micro-batches.

    A checkpoint stands between two updates, whose number is the same in any world; the batches of an update are not.
    """
    shift = checkpoint["global_step"] * (num_micro - checkpoint["num_micro"])
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            for name in counts:
                counts[name] += shift
