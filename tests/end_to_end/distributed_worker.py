"""One process of the comparisons in test_distributed.py: trains stages as runs do and writes down what happened.

`python -m tests.end_to_end.distributed_worker FOLDER CASE...`; with `launch` one program in several processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from d1lit.build import plan_run
from d1lit.callbacks import StopFlag
from d1lit.composing import compose_jobs
from d1lit.fitting import make_trainer
from d1lit.models import Policy
from d1lit.models.sharding import whole
from d1lit.modules import DiffuGRPO
from d1lit.plan import make_stage
from d1lit.processes import gathered, join_world, world
from d1lit.quiet import quiet_libraries
from d1lit.recipes import StageFolder, is_first_process, run_stage
from d1lit.rewards.parts import RewardParts
from d1lit.types import Example, Verdict

SMALL = (
    "task=sudoku",
    "model.tiny.width=16",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.mlp_width=24",
    "model.tiny.init_std=0.3",
    "trainer.accelerator=cpu",
    "sampler.completion_length=8",
    "sampler.block_length=4",
    "sampler.num_steps=4",
    "task.num_builtin.train=200",
    "task.val_rows=0",
    "logger=none",
    "callbacks.samples=null",
)
LORA = "lora={targets: all_linear, rank: 2, alpha: 4, dropout: 0.0}"
SFT = (
    *SMALL,
    "recipe=sft",
    "scale.sft.batch_size=8",
    "scale.sft.num_demonstrations=60",
    "scale.sft.layout.completion_length=40",
)
GRPO = (
    *SMALL,
    "recipe=grpo",
    "scale.grpo.batch_size=4",
    "scale.grpo.group_size=3",
    "scale.grpo.beta=0.04",
    "scale.grpo.lr=0.001",
)


def case(name: str) -> tuple[str, ...]:
    """Overrides of a case such as `grpo-lora-fsdp-float64-20`: stage, what trains, strategy, dtype, updates."""
    stage, trains, strategy, dtype, updates = name.split("-")[:5]
    words = [*(SFT if stage == "sft" else GRPO), f"model.dtype={dtype}", f"strategy={strategy}"]
    words += [f"scale.{stage}.max_updates={updates}", f"scale.{stage}.micro_batch_size=1"]
    if trains == "lora":
        words.append(f"scale.{stage}.{LORA}")
    return tuple(words)


class Wordy:
    """Share of letters and digits in a completion: random policies earn different rewards."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        return [Verdict(sum(c.isalnum() for c in text) / max(1, len(text))) for text in completions]


class Recorder(L.Callback):
    """Keeps the gradients of every update, whole, and the rows of every rollout."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.rollouts: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"{trainer.global_step:03d}.{name}"] = whole(parameter.grad).clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(pl_module, DiffuGRPO) or batch.prompts is None:
            return
        parts = [
            torch.cat([getattr(e.rollout, name) for e in pl_module.experience])
            for name in ("row_ids", "completion_ids")
        ]
        numbers = [torch.cat([getattr(e, name) for e in pl_module.experience]) for name in ("rewards", "advantages")]
        for name, mine in zip(("row_ids", "completion_ids", "rewards", "advantages"), [*parts, *numbers], strict=True):
            self.rollouts[f"{batch.step:03d}.{name}"] = torch.cat(gathered(mine))


@dataclass(frozen=True)
class Record:
    """What a case left behind."""

    gradients: dict[str, Tensor]
    rollouts: dict[str, Tensor]
    weights: dict[str, Tensor]


def read(folder: Path) -> Record:
    """The record that `train_case` wrote into a case's folder."""
    return Record(*(load_file(folder / f"{name}.safetensors") for name in ("gradients", "rollouts", "weights")))


def train_case(folder: Path, name: str, stop_after: int | None = None) -> None:
    """Train the case's stage in its own folder, from its newest checkpoint where there is one.

    Args:
        folder: of the run.
        name: see `case`.
        stop_after: end with a checkpoint after so many updates, as a signal would.
    """
    words = [*case(name), "callbacks.save.every_n_steps=1000"]
    (config,) = compose_jobs("train", [word for word in words if "." not in word.split("=")[0]]).configs
    for word in words:  # one by one, because checking each on the command line composes again
        key, _, value = word.partition("=")
        if "." in key:
            OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    plan = plan_run(config)
    (parts,) = plan.stages
    if isinstance(parts.module, partial) and "reward" in parts.module.keywords:
        reward = RewardParts({"wordy": Wordy()}, {"wordy": 1.0})
        parts = replace(parts, module=partial(parts.module.func, **{**parts.module.keywords, "reward": reward}))
    policy, tokenizer = plan.make_policy()
    recorder, flag = Recorder(), StopFlag()
    trainers: list[L.Trainer] = []

    def trainer(*arguments: Any) -> L.Trainer:
        trainers.append(make_trainer(plan, flag, tokenizer, *arguments))
        trainers[-1].callbacks.insert(0, recorder)
        if stop_after is not None:
            trainers[-1].callbacks.insert(0, StopAfter(flag, stop_after))
        return trainers[-1]

    stage = make_stage(plan, parts, tokenizer, trainer)
    final = run_stage(StageFolder(folder / "stage"), policy, stage, plan.seed, lambda line: None)
    if is_first_process():
        save_file(recorder.gradients, folder / "gradients.safetensors")
        save_file(recorder.rollouts, folder / "rollouts.safetensors")
        save_file(trained(final), folder / "weights.safetensors")


def trained(policy: Policy) -> dict[str, Tensor]:
    """The weights that a stage may have changed."""
    named = policy.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad and ".reference." not in name}


class StopAfter(L.Callback):
    """Raises the flag that a signal would raise."""

    def __init__(self, flag: StopFlag, updates: int) -> None:
        self.flag = flag
        self.updates = updates

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.updates:
            self.flag.received = 15


def main(folder: Path, names: Sequence[str]) -> None:
    """Train all cases one after the other; `NAME@N` stops after N updates."""
    quiet_libraries()
    torch.set_num_threads(1)
    join_world("cpu")
    for word in names:
        name, _, stop = word.partition("@")
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        try:
            train_case(own, name, int(stop) if stop else None)
        except SystemExit:
            assert stop, "nobody asked for a stop"
    if world().rank == 0:
        print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
