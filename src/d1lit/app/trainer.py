"""The Trainer of one stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import OmegaConf

from d1lit.app.components import build
from d1lit.app.plan import Plan, StageParts
from d1lit.app.task_evaluator import TaskEvaluator
from d1lit.callbacks import ConsoleProgress, StopOnSignal, Validate
from d1lit.checkpoint import FolderCheckpointIO
from d1lit.processes import ALONE, is_first, world
from d1lit.report.console import console
from d1lit.report.events import cut_events
from d1lit.report.loggers import cut_csv, stage_logger
from d1lit.stopping import StopFlag
from d1lit.strategies import Setting


def make_trainer(
    plan: Plan, flag: StopFlag, tokenizer: Any, parts: StageParts, folder: Path, first_step: int
) -> L.Trainer:
    """A Trainer for one stage; accumulation follows from the global batch and the devices."""
    flags: dict[str, Any] = OmegaConf.to_container(plan.config.trainer, resolve=True)  # type: ignore[assignment]
    # Lightning's word for leaving every number in the dtype it has: the model's own, float32 for adapters.
    precision = flags.pop("precision") or "32-true"
    here = world()
    flags |= {"devices": here.local_world_size, "num_nodes": here.num_nodes}
    trains_large_model = parts.lora is None and plan.config.model.path is not None
    strategy = build(plan.config, "strategy")(Setting(here.world_size, plan.device, trains_large_model))
    callbacks: list[L.Callback] = []
    watch = plan.config.callbacks
    if watch.save is not None:
        callbacks.append(build(plan.config, "callbacks.save")(folder=folder / "checkpoints"))
    if watch.samples is not None:
        file = folder.parent.parent / "samples.jsonl"
        callbacks.append(build(plan.config, "callbacks.samples")(stage=parts.name, file=file, console=console))
    own = [name for name in watch if name not in ("save", "samples") and watch[name] is not None]
    callbacks += [build(plan.config, f"callbacks.{name}") for name in own]
    if parts.validate_every is not None and plan.task.val_rows:  # a signal may end it, so the others come before
        measure = TaskEvaluator(plan, tokenizer, folder.parent.parent, flag).validation
        best = folder / "best" if parts.select == "best_val" else None
        callbacks.append(Validate(measure, best, parts.validate_every, plan.config.evaluation.batch_size))
    # Last: they see the step at which an alarm ends the run.
    callbacks += [ConsoleProgress(parts.name, parts.max_updates, console), StopOnSignal(flag)]
    return L.Trainer(
        **flags,
        precision=precision,
        max_steps=parts.max_updates,
        max_epochs=1,
        strategy=strategy,
        accumulate_grad_batches=parts.batch_size // (parts.micro_batch_size * here.world_size),
        gradient_clip_val=parts.gradient_clip,
        logger=make_logger(plan, folder.parent.parent, parts.name, first_step, parts.max_updates),
        callbacks=callbacks,
        plugins=[FolderCheckpointIO(keep=2), LightningEnvironment() if here == ALONE else TorchElasticEnvironment()],
        enable_checkpointing=watch.save is not None,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def make_logger(plan: Plan, folder: Path, stage: str, first_step: int, num_steps: int) -> Any:
    """The configured logger, one sub-folder a stage; False for none. Steps that will be run again are cut off."""
    if is_first() and first_step < num_steps:  # after the last step nothing is
        cut_events(folder / "logs" / stage, first_step)
        cut_csv(folder / "logs" / stage, first_step)
    if plan.config.logger is None or plan.config.logger.get("_target_") is None:
        return False
    return stage_logger(build(plan.config, "logger"), folder, stage)
