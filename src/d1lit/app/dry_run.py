"""What a run would need, before anything is loaded: memory of each device, operations, hours, disk (`dry_run=true`).

Memory is counted tensor by tensor as the network's code makes them, and checked against measured peaks; hours are
counted operations over a stated or measured peak, times a stated share of it that is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from d1lit.app.micro_batches import GIB, cures, device_memory, micro_batch_sizes, with_micro_batches
from d1lit.app.plan import Plan, StageParts
from d1lit.app.workloads import evaluation_plan, stage_work
from d1lit.costs import RolloutPlan, matmul_peak, rollout_flops
from d1lit.errors import ConfigError
from d1lit.footprint import MemoryNeed, Workload, cycle_flops, memory, network_shape, update_flops


@dataclass(frozen=True)
class StageEstimate:
    """What one stage would need."""

    name: str
    work: Workload
    memory: MemoryNeed
    updates: int
    rollouts: int
    flops: int
    """Over all devices and the whole stage."""
    tokens: int
    """Token positions through the network in updates, over all devices."""
    hours: float
    checkpoint_bytes: int


def estimate_stage(plan: Plan, parts: StageParts, world_size: int, peak: float, utilisation: float) -> StageEstimate:
    """One stage on the plan's devices.

    Args:
        plan: the run.
        parts: the stage.
        world_size: devices.
        peak: operations a second that one device can do at most.
        utilisation: share of the peak that is reached.
    """
    work = stage_work(plan, parts, world_size)
    keywords: Mapping[str, Any] = parts.module.keywords if isinstance(parts.module, partial) else {}
    inner = keywords.get("num_inner_updates", 1)
    rollouts = -(-parts.max_updates // inner) if work.rollout is not None else 0
    flops = world_size * (parts.max_updates * update_flops(work) + rollouts * cycle_flops(work))
    half = work.itemsize < work.wide
    own = work.itemsize if work.counts.adapter == 0 else work.wide
    copies = work.wide if half and work.counts.adapter == 0 else 0
    kept = work.counts.trainable * (own + copies + work.wide * work.optimizer_slots)
    kept += work.reference_bytes
    return StageEstimate(
        name=parts.name,
        work=work,
        memory=memory(work),
        updates=parts.max_updates,
        rollouts=rollouts,
        flops=flops,
        tokens=parts.max_updates * work.num_micro * work.views * work.length * world_size,
        hours=flops / (world_size * peak * utilisation) / 3600,
        checkpoint_bytes=int(3 * kept) + work.counts.trainable * own,
    )


@dataclass(frozen=True)
class EvaluationEstimate:
    """What evaluating one model at one completion length would need."""

    completion_length: int
    rows: int
    memory: int
    """Bytes on each device, weights and adapter included."""
    hours: float


def estimate_evaluations(
    plan: Plan, work: Workload, world_size: int, peak: float, utilisation: float
) -> list[EvaluationEstimate]:
    """Every completion length that is asked for; no row is assumed to end early, and judging is left out.

    Args:
        plan: the run.
        work: its last stage, whose model is evaluated whole on every device.
        world_size: devices, which share the rows.
        peak: operations a second that one device can do at most.
        utilisation: share of the peak that is reached.
    """
    settings, task = plan.config.evaluation, plan.task
    count = len(task.rows(settings.split)[: settings.rows])
    found = []
    for length in settings.lengths or [plan.sampler.completion_length]:
        rollout = evaluation_plan(plan, length)
        share = -(-count // world_size) * (2 if plan.sampler.guidance else 1)
        flops = rollout_flops(network_shape(work.config), replace(rollout, rows=share))
        hours = flops / (peak * utilisation) / 3600
        found.append(EvaluationEstimate(length, count, _evaluation_bytes(work, rollout), hours))
    return found


def _evaluation_bytes(work: Workload, rollout: RolloutPlan) -> int:
    """The whole model on every device, and a forward of the rollout."""
    whole = replace(work, rollout=rollout, validation=None, merges=False, is_sharded=False, is_offloaded=False)
    need = memory(whole)
    return need.weights + need.rollout


def device_limits(plan: Plan) -> tuple[float, float, str]:
    """Bytes and operations a second of one device, stated or measured here, and a word on where they come from."""
    hardware, device = plan.config.hardware, plan.device
    limit = device_memory(plan)
    if hardware.peak_tflops is not None:
        return float(limit), float(hardware.peak_tflops) * 1e12, "stated"
    dtype = getattr(torch, plan.config.model.dtype)
    return float(limit), float(matmul_peak(device.type, dtype)), "measured on this machine"


def estimate_run(plan: Plan, world_size: int) -> tuple[list[StageEstimate], list[str]]:
    """Every stage of a plan, and what the dry run prints.

    Raises:
        ConfigError: for the first stage that does not fit, naming what would.
    """
    plan = with_micro_batches(plan, micro_batch_sizes(plan, world_size))
    limit, peak, source = device_limits(plan)
    utilisation = plan.config.hardware.utilisation
    stages = [estimate_stage(plan, parts, world_size, peak, utilisation) for parts in plan.stages]
    lines = [
        f"estimates for {world_size} device{'s' if world_size > 1 else ''} with {limit / GIB:.1f} GiB and "
        f"{peak / 1e12:.3g} TFLOP/s ({source}), of which {utilisation:.0%} is assumed to be reached"
    ]
    lines += [line for stage in stages for line in describe(stage)]
    evaluations = estimate_evaluations(plan, stages[-1].work, world_size, peak, utilisation) if stages else []
    models = len(stages) + bool(plan.config.evaluation.base)
    lines += [
        f"evaluation at {e.completion_length} tokens: {e.rows} rows, {e.hours:.3g} hours for each of {models} models, "
        f"{e.memory / GIB:.3g} GiB on each device"
        for e in evaluations
    ]
    if stages:
        need = merge_bytes(stages[-1].work) / GIB
        lines.append(f"merging an adapter, or export: {need:.3g} GiB for a moment, and the model's size on disk")
    total = sum(stage.hours for stage in stages) + models * sum(e.hours for e in evaluations)
    lines.append(f"everything: {total:.3g} hours, judging and looks at the validation rows apart")
    if stages and plan.sampler.commit.quotas(plan.sampler.block_length, plan.sampler.steps_per_block) is None:
        rule, steps = type(plan.sampler.commit).__name__, plan.sampler.steps_per_block
        lines.append(f"rollouts: {rule} decides itself how many steps a block takes; hours are those of {steps}")
    try:
        for stage, parts in zip(stages, plan.stages, strict=True):
            _check_stage(plan, parts, stage, limit)
        for entry in evaluations:
            _check_evaluation(plan, entry, stages[-1].work, limit)
    except ConfigError:
        print("\n".join(lines))
        raise
    return stages, lines


def _check_stage(plan: Plan, parts: StageParts, stage: StageEstimate, limit: float) -> None:
    """Refuse a stage that does not fit its device, this machine's memory where that is known, or its merge."""
    key, other = f"stages.{stage.name}", "larger devices"
    if stage.work.counts.adapter == 0:
        other = "an adapter (LoRA) instead of full training, or larger devices"
    if stage.memory.peak > limit:
        cause = f"needs about {stage.memory.peak / GIB:.1f} GiB on each device, which has {limit / GIB:.1f}"
        raise ConfigError(key, cause, "; or ".join(cures(plan, parts, stage.work, limit)) or other, "E602")
    is_last = parts.name == plan.stages[-1].name
    if parts.lora is not None and not is_last and merge_bytes(stage.work) > limit:
        cause = f"merging its adapter needs about {merge_bytes(stage.work) / GIB:.1f} GiB on each device"
        raise ConfigError(key, f"{cause}, which has {limit / GIB:.1f}", "larger devices", "E602")
    here = stage.work.world_size // plan.config.trainer.num_nodes * stage.memory.host
    there = psutil.virtual_memory().total
    if plan.config.hardware.memory_gib is None and here > there:
        cause = f"needs about {here / GIB:.1f} GiB of host memory on each machine, which has {there / GIB:.1f}"
        raise ConfigError(key, cause, f"strategy=fsdp, more machines, or {other}", "E602")


def _check_evaluation(plan: Plan, entry: EvaluationEstimate, work: Workload, limit: float) -> None:
    """Refuse an evaluation that does not fit, naming how many rows of a forward would."""
    if entry.memory <= limit:
        return
    rollout = evaluation_plan(plan, entry.completion_length)
    streams = 2 if plan.sampler.guidance else 1
    fits = [n for n in (32, 16, 8, 4, 2, 1) if streams <= n < rollout.rows]
    fits = [n for n in fits if _evaluation_bytes(work, replace(rollout, rows=n)) <= limit]
    cause = f"at {entry.completion_length} tokens it needs about {entry.memory / GIB:.1f} GiB on each device"
    cure = f"sampler.rows_per_forward={fits[0]}" if fits else "larger devices"
    raise ConfigError("evaluation", f"{cause}, which has {limit / GIB:.1f}", cure, "E602")


def merge_bytes(work: Workload) -> int:
    """What `d1lit export` and the hand-over between stages hold: the model, and one matrix three times in float32."""
    widest = max(work.config.intermediate_size, work.config.hidden_size) * work.config.hidden_size
    return (work.counts.total - work.counts.adapter) * work.itemsize + 3 * widest * work.wide


def describe(stage: StageEstimate) -> list[str]:
    """A stage in a few lines."""
    work, need = stage.work, stage.memory
    parts = {
        "whole model": need.start,
        "weights": need.weights,
        "gradients": need.gradients,
        "optimizer": need.optimizer,
        "reference": need.reference,
        "update": need.update,
        "rollout": need.rollout,
        "scoring": need.scoring,
    }
    sizes = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
    host = f"; of the host for each device: {need.host / GIB:.3g}" if need.host else ""
    steps = f"{stage.updates} updates" + (f" on {stage.rollouts} rollouts" if stage.rollouts else "")
    return [
        f"{stage.name}: {work.counts.total:,} parameters, {work.counts.trainable:,} of them trained; {steps}",
        f"  memory of each device, GiB: {need.peak / GIB:.3g} at most ({sizes}){host}",
        f"  {work.num_micro} micro-batches of {work.views} views x {work.length} tokens on each device",
        f"  {stage.tokens:.3g} tokens in updates, {stage.flops:.3g} operations, {stage.hours:.3g} hours; "
        f"checkpoints and weights {stage.checkpoint_bytes / GIB:.3g} GiB of disk",
    ]
