"""Recipes: stages in order, each one Trainer.fit, with hand-over, resume and evaluation between them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from peft import PeftModel

from d1lit.checkpoint import MANIFEST, broken, newest, put_whole, read_facts, settle
from d1lit.errors import ConfigError
from d1lit.evaluation import write_whole
from d1lit.models import LoraSettings, Policy, add_lora, load_weights, merge_lora, save_weights
from d1lit.models.lora import report
from d1lit.models.sharding import unsharded
from d1lit.modules import StageData
from d1lit.modules.accounting import Accounted
from d1lit.processes import first_decides, is_first, wait_for_all

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One Trainer.fit: its module, its batches, its trainer, and what the network needs for it."""

    name: str
    lora: LoraSettings | None
    """None: all weights train."""
    keeps_reference: bool
    """The loss asks for the policy as it stood at the start of the stage, and switching an adapter off is not it."""
    selects_best: bool
    """Hand over the weights that were best on the validation rows, not the last ones."""
    make_module: Callable[[Policy], L.LightningModule]
    make_data: Callable[[], StageData]
    make_trainer: Callable[[Path, int], L.Trainer]
    """From the stage's folder and the optimizer step it starts at."""
    trains_order_head: bool = False
    """The estimator scores the order in which positions are fixed by a head of the network, new where there is none."""


Evaluator = Callable[[Policy, str], list[dict[str, Any]]]
"""Measures the policy after a stage; gives entries of results.json's `evaluations`."""


@dataclass(frozen=True)
class StageFolder:
    """Where a stage keeps what it needs to go on, and what it hands over."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights that were best on the validation rows so far."""
        return self.path / "best"

    @property
    def weights(self) -> Path:
        """The stage's result: a model folder, or an adapter's; there once the stage is finished."""
        return self.path / "model"

    @property
    def cost(self) -> Path:
        """What the stage took, in numbers; there before `weights` is."""
        return self.path / "cost.json"


def write_cost(folder: StageFolder, record: dict[str, Any]) -> None:
    """Keep a stage's account, whole or not at all."""
    # Nothing else has made it where neither checkpoints nor logs are kept.
    folder.path.mkdir(parents=True, exist_ok=True)
    write_whole(folder.cost, json.dumps(record, indent=2))


def read_costs(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """The accounts of the stages of a run, and their sums: what recipes are compared at."""
    files = {name: StageFolder(folder / "stages" / name).cost for name in stages}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    sums = {key: sum(record[key] for record in found.values()) for key in ("forwards", "tokens", "flops")}
    return {**sums, "stages": found}


def run_recipe(
    folder: Path,
    policy: Policy,
    stages: Sequence[Stage],
    evaluate: Evaluator | None,
    seed: int,
    say: Say,
    starts_over: bool = False,
) -> tuple[Policy, list[dict[str, Any]]]:
    """Run the stages in order from `policy`; finished stages are not run again.

    With LoRA a stage's adapter is merged (summed in float32) before the next stage starts: d1's RL starts from the
    merged SFT model, so its reference is the SFT model and not the base.

    Args:
        folder: of the run.
        policy: what the first stage starts from.
        stages: in their order.
        evaluate: measures the base and every stage's policy; None measures none.
        seed: of the adapters.
        say: where lines for the user go.
        starts_over: see `run_stage`.

    Returns:
        The policy after the last stage, its adapter unmerged; and the evaluations of the base and of every stage.
    """
    evaluations = list(evaluate(policy, "base")) if evaluate is not None else []
    for stage in stages:
        place = StageFolder(folder / "stages" / stage.name)
        policy = run_stage(place, merge_lora(policy), stage, seed, say, starts_over)
        if evaluate is not None:
            evaluations += evaluate(policy, stage.name)
    return policy, evaluations


def run_stage(
    folder: StageFolder, policy: Policy, stage: Stage, seed: int, say: Say, starts_over: bool = False
) -> Policy:
    """Fit one stage, from its newest good checkpoint where there is one, and keep its weights in its folder.

    Args:
        folder: of the stage.
        policy: what it starts from.
        stage: what is run.
        seed: of the adapter.
        say: where lines for the user go.
        starts_over: a stage none of whose checkpoints can be used begins again, instead of being refused.

    Raises:
        ConfigError: if what an earlier start has left cannot be used.
    """
    if stage.lora is not None:
        policy = add_lora(policy, stage.lora, seed)
    policy.train_order_head(stage.trains_order_head, seed)
    if isinstance(policy.model, PeftModel):
        say(f"{stage.name}: {report(policy.model)}")
    left = first_decides(partial(look_at, folder, stage, starts_over))
    for line in left.remarks:
        say(f"{stage.name}: {line}")
    if left.is_finished:
        say(f"{stage.name}: finished earlier, taken from {folder.weights}")
        load_weights(policy, folder.weights)
        return policy
    device = policy.device
    _fit(folder, policy, stage, left.checkpoint, say)
    policy = unsharded(policy).to(device)
    if stage.selects_best:
        first_decides(partial(_check_best, folder, stage))
        load_weights(policy, folder.best)
    if is_first():
        put_whole(folder.weights, partial(save_weights, policy))
    wait_for_all()
    return policy


@dataclass(frozen=True)
class Left:
    """What an earlier start has left of a stage."""

    is_finished: bool
    checkpoint: Path | None
    """The one to go on from."""
    remarks: Sequence[str]


def look_at(folder: StageFolder, stage: Stage, starts_over: bool) -> Left:
    """What there is of a stage; the first process looks for all, for a disk may tell each of them something else.

    Raises:
        ConfigError: if the disk does not say, or if nothing of what there is can be used and `starts_over` is false.
    """
    try:
        for place in (folder.weights, folder.best):
            settle(place)
        is_old = is_unsealed(folder.weights)
        reason = broken(folder.weights) if folder.weights.exists() and not is_old else None
        if reason is None and folder.weights.exists():
            return Left(True, None, [f"{folder.weights} has no sums to be held against"] if is_old else ())
        remarks = [] if reason is None else [f"{folder.weights} is not used: {reason}"]
        checkpoint, refused = newest(folder.checkpoints)
        if checkpoint is not None and stage.selects_best and folder.best.exists():
            _check_best(folder, stage)
    except OSError as error:
        cause = f"{error.filename or folder.path} cannot be read ({error.strerror}), so where to go on is not known"
        raise ConfigError("resume", cause, "the same command again, once the disk answers", "E508") from None
    if refused and checkpoint is None and not starts_over:
        cause = f"of stage {stage.name} no checkpoint can be used: {'; '.join(reason for _, reason in refused)}"
        raise ConfigError("resume", cause, "resume=force, which begins the stage again", "E508")
    remarks += [f"{path.name} is not used: {reason}" for path, reason in refused]
    return Left(False, checkpoint, remarks)


def is_unsealed(folder: Path) -> bool:
    """Whether a folder of weights is of a version of d1lit that wrote no sums."""
    return not (folder / MANIFEST).exists() and any(folder.glob("*.safetensors"))


def _check_best(folder: StageFolder, stage: Stage) -> None:
    reason = None if is_unsealed(folder.best) else broken(folder.best)
    if reason is not None:
        cause = f"the weights that were best in stage {stage.name} cannot be used: {reason}"
        raise ConfigError("resume", cause, f"without {folder.path}, which begins the stage again", "E508")


def _fit(folder: StageFolder, policy: Policy, stage: Stage, checkpoint: Path | None, say: Say) -> None:
    if stage.keeps_reference:
        policy.keep_reference()
    if checkpoint is not None:
        say(f"{stage.name}: goes on from {checkpoint.name}")
    first_step = 0 if checkpoint is None else read_facts(checkpoint)["step"]
    trainer = stage.make_trainer(folder.path, first_step)
    started = time.perf_counter()
    path = None if checkpoint is None else str(checkpoint)
    module = stage.make_module(policy)
    trainer.fit(module, datamodule=stage.make_data(), ckpt_path=path)
    if isinstance(module, Accounted) and is_first():
        write_cost(folder, module.cost.record())
    say(f"{stage.name}: {trainer.global_step} updates in {time.perf_counter() - started:.0f} s")
    policy.drop_reference()
