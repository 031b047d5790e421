"""One process of the comparisons in test_distributed.py: trains stages as runs do and writes down what happened.

`python -m tests.end_to_end.distributed_worker FOLDER CASE...`; with `launch` one program in several processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import make_stage
from d1lit.app.trainer import make_trainer
from d1lit.models import Policy
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.models.sharding import shard, whole
from d1lit.modules import DiffuGRPO
from d1lit.processes import all_gather_objects, is_first, join_world, world
from d1lit.quiet import quiet_libraries
from d1lit.recipes import StageFolder, run_stage
from d1lit.rewards.parts import RewardParts
from d1lit.scoring import score
from d1lit.stopping import StopFlag
from d1lit.types import Corruption, Example, Rollout, Verdict

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
    """Overrides of a case such as `grpo-lora-fsdp-float64-20`: stage, what trains, strategy, dtype, updates.

    With `-val` at its end it looks at three validation rows before every second update, one at a time; with `-back` an
    alarm takes the weights of step 3 before update 6; with `-muon` matrices learn by Muon; with `-order` a head learns
    the order in which positions are fixed; with `-steps` what single denoising steps predicted is judged and trained.
    """
    stage, trains, strategy, dtype, updates = name.split("-")[:5]
    words = [*(SFT if stage == "sft" else GRPO), f"model.dtype={dtype}", f"strategy={strategy}"]
    words += [f"scale.{stage}.max_updates={updates}", f"scale.{stage}.micro_batch_size=1"]
    if trains == "lora":
        words.append(f"scale.{stage}.{LORA}")
    if name.endswith("-val"):
        words += ["task.val_rows=3", f"scale.{stage}.validate_every=2", "scale.evaluation.batch_size=1"]
    if name.endswith("-back"):
        alarm = (
            "_target_: d1lit.callbacks.Alarm, metric: cost/tokens, ratio: 0.0, warmup: 4, patience: 2, action: rollback"
        )
        words += [f"callbacks.alarms.alarms=[{{{alarm}}}]", f"stages.{stage}.module.num_inner_updates=2"]
    if name.endswith("-muon"):
        here = f"stages.{stage}.optimizer"
        words += [f"{here}._target_=d1lit.modules.muon.MuonWithAdamW", f"{here}.matrix_lr=0.02"]
    if name.endswith("-order"):
        words += ["estimator=learned_order", "sampler=order_head"]
    if name.endswith("-steps"):
        words += ["estimator=mdpo", "advantage=steps", "loss=mdpo", "estimator.num_steps=2"]
        words += [f"stages.{stage}.module.num_inner_updates=2"]
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
            self.rollouts[f"{batch.step:03d}.{name}"] = torch.cat(all_gather_objects(mine))


class Looks(DummyLogger):
    """Keeps what is logged of the validation rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        own = {name: value for name, value in metrics.items() if name.startswith("val/")}
        self.found += [{"step": step or 0, **own}] if own else []


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
    words = [*case(name), f"callbacks.save.every_n_steps={1 if name.endswith('-back') else 1000}"]
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
    if name.endswith("-val"):  # some rows end early and others late
        with torch.no_grad():
            policy.network.head_weight[policy.eos_token_id] *= 4
    recorder, looks, flag = Recorder(), Looks(), StopFlag()
    trainers: list[L.Trainer] = []

    def trainer(*arguments: Any) -> L.Trainer:
        trainers.append(make_trainer(plan, flag, tokenizer, *arguments))
        trainers[-1].callbacks.insert(0, recorder)
        trainers[-1].loggers = [looks]
        if stop_after is not None:
            trainers[-1].callbacks.insert(0, StopAfter(flag, stop_after))
        return trainers[-1]

    stage = make_stage(plan, parts, tokenizer, trainer)
    final = run_stage(StageFolder(folder / "stage"), policy, stage, plan.seed, lambda line: None)
    if is_first():
        (folder / "looks.json").write_text(json.dumps(looks.found))
        save_file(recorder.gradients, folder / "gradients.safetensors")
        save_file(recorder.rollouts, folder / "rollouts.safetensors")
        save_file(trained(final), folder / "weights.safetensors")


def score_unequally(folder: Path) -> None:
    """Gradients of a sharded policy of which the last process scores three views, one at a time, and others none."""
    here = world()
    config = tiny_config(23, 20, 21, 21, 16, 2, 2, 24, 100.0, 64, init_std=0.3)
    policy = Policy(fresh_network(config, seed=3))
    if here.world_size > 1:
        shard(policy, init_device_mesh("cpu", (here.world_size,)))
    ids = torch.arange(24).view(3, 8) % 20
    noised = torch.where(ids % 3 == 0, 20, ids)
    weight = torch.full((3, 1, 4), float(here.rank == here.world_size - 1))
    corruption = Corruption(noised, torch.arange(3)[:, None], ids[:, None, 4:], weight, 4)
    zeros, seen = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    order = torch.zeros(3, 4, dtype=torch.int64)
    rollout = Rollout(ids[:, :4], seen, ids[:, 4:], seen, torch.arange(3), 1, order, zeros, zeros, zeros)
    with torch.no_grad():
        policy_free = score(policy, rollout, corruption, views_per_chunk=2).logprobs
    logprobs = score(policy, rollout, corruption, want_entropy=True, views_per_chunk=1).logprobs
    torch.testing.assert_close(logprobs.detach(), policy_free)
    (logprobs.sum() * here.world_size).backward()  # FSDP takes the mean over processes
    grads = {name: whole(p.grad).clone() for name, p in policy.named_parameters() if p.grad is not None}
    if here.rank == 0:
        save_file(grads, folder / "grads.safetensors")


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
        if name == "unequal":
            score_unequally(own)
            continue
        try:
            train_case(own, name, int(stop) if stop else None)
        except SystemExit:
            assert stop, "nobody asked for a stop"
    if world().rank == 0:
        print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what is asked here is what was trained: gloo's threads may abort a process that takes itself apart
