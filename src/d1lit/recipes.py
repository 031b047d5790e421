"""Recipes: stages in order, each one Trainer.fit, with hand-over, resume and one closing table."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch

from d1lit.checkpoint import newest, write_json
from d1lit.models import LoraSettings, Policy, add_lora, load_weights, merge_lora, save_weights
from d1lit.modules import StageData


@dataclass(frozen=True)
class Stage:
    """One Trainer.fit: its module, its batches, its trainer, and what the network needs for it."""

    name: str
    lora: LoraSettings | None
    """None: all weights train."""
    keeps_reference: bool
    """The loss asks for the policy as it stood at the start of the stage."""
    make_module: Callable[[Policy], L.LightningModule]
    make_data: Callable[[], StageData]
    make_trainer: Callable[[Path], L.Trainer]


class Evaluator(Protocol):
    """Measures the policy between stages."""

    def __call__(self, policy: Policy, stage: str) -> list[dict[str, Any]]:
        """Entries of results.json's `evaluations`."""
        ...


@dataclass(frozen=True)
class RunFolder:
    """One run, one folder."""

    path: Path

    def stage(self, name: str) -> Path:
        """Everything of one stage."""
        return self.path / "stages" / name

    def checkpoints(self, name: str) -> Path:
        """Checkpoints of one stage, a folder each."""
        return self.stage(name) / "checkpoints"

    def weights(self, name: str) -> Path:
        """What a finished stage hands over; its presence says that the stage is finished."""
        return self.stage(name) / "model"

    @property
    def results(self) -> Path:
        """The closing table as JSON."""
        return self.path / "results.json"


Say = Callable[[str], None]


def run_recipe(
    folder: RunFolder, policy: Policy, stages: Sequence[Stage], evaluate: Evaluator | None, seed: int, say: Say
) -> tuple[Policy, list[dict[str, Any]]]:
    """Run the stages in order from `policy`; a stage whose weights are already in the folder is not run again.

    Returns:
        The policy after the last stage and the evaluations of the base and of every stage.
    """
    evaluations = list(evaluate(policy, "base")) if evaluate is not None else []
    for stage in stages:
        policy = run_stage(folder, policy, stage, seed, say)
        if evaluate is not None:
            evaluations += evaluate(policy, stage.name)
    return policy, evaluations


def run_stage(folder: RunFolder, policy: Policy, stage: Stage, seed: int, say: Say) -> Policy:
    """Fit one stage, from its newest good checkpoint where there is one, and hand its weights over.

    With LoRA the adapter is merged (in float32) before the next stage starts: d1's RL starts from the merged SFT model,
    so its reference is the SFT model and not the base.
    """
    weights = folder.weights(stage.name)
    if stage.lora is not None:
        policy = add_lora(policy, stage.lora, seed)
    if weights.exists():
        say(f"{stage.name}: finished earlier, taken from {weights}")
        load_weights(policy, weights)
    else:
        _fit(folder, policy, stage, say)
        if _is_first_process():
            save_weights(policy, weights)
        _barrier()
    return merge_lora(policy) if stage.lora is not None else policy


def _fit(folder: RunFolder, policy: Policy, stage: Stage, say: Say) -> None:
    if stage.keeps_reference and stage.lora is None:
        policy.keep_reference()
    module, data = stage.make_module(policy), stage.make_data()
    trainer = stage.make_trainer(folder.stage(stage.name))
    checkpoint, refused = newest(folder.checkpoints(stage.name))
    for path, reason in refused:
        say(f"{stage.name}: {path.name} is not used: {reason}")
    if checkpoint is not None:
        say(f"{stage.name}: goes on from {checkpoint.name}")
    started = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    say(f"{stage.name}: {trainer.global_step} updates in {time.perf_counter() - started:.0f} s")
    policy.drop_reference()
    del module, data, trainer
    gc.collect()


def _is_first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
