"""Making a stage fit: micro-batches from a memory budget, and what would help where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

from d1lit.app.plan import Plan, StageParts
from d1lit.app.workloads import stage_work
from d1lit.data import BatchPlan
from d1lit.footprint import Workload, memory

GIB = 2**30
FILL = 0.9
"""Share of a device's memory that micro-batches chosen by the estimate may fill."""


def micro_batch_sizes(plan: Plan, world_size: int) -> dict[str, int]:
    """For each stage whose `micro_batch_size` is null, the largest that fits every device, by the estimate.

    1 where nothing does: the dry run then says what would help.
    """
    found = {}
    for parts in plan.stages:
        if not parts.fits_memory:
            continue
        share = parts.batch_size // world_size
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        limit = FILL * device_memory(plan)
        needs = ((size, stage_work(plan, replace(parts, micro_batch_size=size), world_size)) for size in sizes)
        found[parts.name] = next((size for size, work in needs if memory(work).peak <= limit), 1)
    return found


def with_micro_batches(plan: Plan, sizes: Mapping[str, int]) -> Plan:
    """The plan with micro-batches of these sizes."""
    if not sizes:
        return plan
    stages = [replace(s, micro_batch_size=sizes.get(s.name, s.micro_batch_size)) for s in plan.stages]
    return replace(plan, stages=stages)


def smaller(plan: Plan, parts: StageParts, work: Workload) -> Iterator[tuple[str, Workload]]:
    """Ways for a stage to need less memory, the cheapest first, each with the words of the command line that ask it."""
    few = None if work.rollout is None else replace(work.rollout, rows=min(4, work.rollout.rows))
    recompute = "" if work.recomputes_blocks else "model.gradient_checkpointing=true "
    if recompute:
        yield recompute.strip(), replace(work, recomputes_blocks=True)
    if parts.micro_batch_size > 1:
        one = replace(stage_work(plan, replace(parts, micro_batch_size=1), work.world_size), recomputes_blocks=True)
        yield f"{recompute}{_key(plan, parts, 'micro_batch_size')}=1", one
    if few is not None:
        chunks = f"stages.{parts.name}.module.views_per_chunk=1"
        cut = replace(work, recomputes_blocks=True, views_per_chunk=1)
        yield f"{recompute}{chunks}", cut
        yield f"{recompute}{chunks} sampler.rows_per_forward=4", replace(cut, rollout=few)
    if work.counts.adapter and not work.is_quantized and not work.is_sharded:
        packed = replace(work, recomputes_blocks=True, is_quantized=True, rollout=few)
        rows = "" if few is None else " sampler.rows_per_forward=4"
        yield f"{recompute}{_key(plan, parts, 'lora')}.quantize=nf4{rows}", packed
    if any(stage.lora is not None and stage.lora.quantize is not None for stage in plan.stages):
        return  # fsdp cannot shard four bits
    sizes = [devices for devices in (1, 2, 4, 8, 16, 32, 64) if devices >= work.world_size and _divides(plan, devices)]
    for devices, offload in [(d, False) for d in sizes if d > 1] + [(d, True) for d in sizes if work.on_gpu]:
        size = min(parts.micro_batch_size, parts.batch_size // devices)
        there = stage_work(plan, replace(parts, micro_batch_size=size), devices)
        sharded = replace(there, recomputes_blocks=True, is_sharded=True, is_offloaded=offload)
        yield f"{recompute}strategy=fsdp{'_offload' if offload else ''} trainer.devices={devices}", sharded


def _key(plan: Plan, parts: StageParts, name: str) -> str:
    """The key that a setting of a stage is set by: where its YAML refers to another, that one."""
    stage: Any = OmegaConf.to_container(plan.config.stages[parts.name], resolve=False)
    raw = stage[name]
    return raw[2:-1] if isinstance(raw, str) and raw.startswith("${") else f"stages.{parts.name}.{name}"


def _divides(plan: Plan, devices: int) -> bool:
    """Whether every stage's batch can be cut for so many devices."""
    for parts in plan.stages:
        try:
            BatchPlan(parts.batch_size, min(parts.micro_batch_size, max(1, parts.batch_size // devices)), devices)
        except ValueError:
            return False
    return True


def cures(plan: Plan, parts: StageParts, work: Workload, limit: float) -> list[str]:
    """What would make the stage fit: up to two ways."""
    found = (words for words, changed in smaller(plan, parts, work) if memory(changed).peak <= limit)
    return list(islice(found, 2))


def device_memory(plan: Plan) -> float:
    """Bytes of one device: stated, or this machine's."""
    if plan.config.hardware.memory_gib is not None:
        return float(plan.config.hardware.memory_gib * GIB)
    if plan.device.type == "cuda":
        return float(torch.cuda.get_device_properties(plan.device).total_memory)
    return float(psutil.virtual_memory().total)
