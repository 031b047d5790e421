"""What a run would need, before anything is loaded: memory of each device, operations, hours, disk (`dry_run=true`).

Memory is counted tensor by tensor as the network's code makes them, and checked against measured peaks; hours are
counted operations over a stated or measured peak, times a stated share of it that is reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

from d1lit.components import build
from d1lit.costs import RolloutPlan, matmul_peak, rollout_flops
from d1lit.data import BatchPlan
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.footprint import Memory, Work, count_parameters, cycle_flops, memory, network_shape, update_flops
from d1lit.joint_scoring import corruptions_at_once
from d1lit.models import MaskedDiffusionConfig, build_tiny_tokenizer
from d1lit.models.layouts import read_config
from d1lit.models.loading import load_config
from d1lit.models.policy import bytes_without_gradient
from d1lit.models.presets import tiny_config
from d1lit.modules import Prompts
from d1lit.modules.muon import MuonWithAdamW
from d1lit.plan import Plan, StageParts, evaluation_sampler
from d1lit.sampling import BlockSampler
from d1lit.strategies import FullySharded, Setting
from d1lit.types import Context, Rollout

GIB = 2**30
_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


# ------------------------------------------------------------------------------------------------------------ the model


def shape_of(plan: Plan) -> MaskedDiffusionConfig:
    """The model's configuration without its weights: from its folder, or as the YAML of a published model states it.

    Raises:
        ConfigError: for a hub id of which nothing is known here.
    """
    model = plan.config.model
    if model.path is None:
        ids = build_tiny_tokenizer()
        special = (ids.mask_token_id, ids.eos_token_id, ids.pad_token_id)
        return tiny_config(len(ids), *special, **OmegaConf.to_container(model.tiny))  # type: ignore[arg-type]
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return load_config(folder)
    if model.get("shape") is None:
        raise ConfigError(
            "model.path", f"{model.path} is no folder here, and its shape is not known", "a local folder", "E401"
        )
    return read_config(OmegaConf.to_container(model.shape, resolve=True), model.path)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ stages as workloads


def stage_work(plan: Plan, parts: StageParts, world_size: int) -> Work:
    """A stage of a plan as numbers."""
    model = plan.config.model
    config = shape_of(plan)
    counts = count_parameters(config, parts.lora)
    setting = Setting(world_size, plan.device, parts.lora is None and model.path is not None)
    strategy = build(plan.config, "strategy")(setting)
    keywords: Mapping[str, Any] = parts.module.keywords if isinstance(parts.module, partial) else {}
    loss = keywords["loss"]
    # Stated numbers are those of GPUs.
    on_gpu = plan.device.type == "cuda" or plan.config.hardware.peak_tflops is not None
    muon = isinstance(parts.optimizer, partial) and parts.optimizer.func is MuonWithAdamW
    slots = 2.0 - counts.matrices / counts.trainable if muon else 2.0
    common = Work(
        config=config,
        counts=counts,
        itemsize=_ITEMSIZE[model.dtype],
        optimizer_slots=slots,
        world_size=world_size,
        is_sharded=isinstance(strategy, FullySharded),
        is_offloaded=isinstance(strategy, FullySharded) and strategy.offload and on_gpu,
        recomputes_blocks=model.gradient_checkpointing,
        num_micro=parts.batch_size // (parts.micro_batch_size * world_size),
        views=parts.micro_batch_size,
        length=0,
        scored=0,
        views_per_chunk=keywords.get("views_per_chunk"),
        keeps_reference=False,
        on_gpu=on_gpu,
        is_quantized=parts.lora is not None and parts.lora.quantize is not None,
        caches=plan.sampler.cache is not None,
        validation=_evaluation_plan(plan, None) if parts.validate_every is not None and plan.task.val_rows else None,
    )
    if isinstance(parts.data, Prompts):
        return _rl_work(plan, parts, common, keywords, bool(getattr(loss, "needs_reference", False)))
    layout = parts.data.layout.keywords  # type: ignore[attr-defined]
    completion = layout.get("completion_length", layout.get("max_length"))
    prompt = plan.task.max_prompt_length if "completion_length" in layout else 0
    return replace(common, length=prompt + completion, scored=completion)


def _rl_work(plan: Plan, parts: StageParts, common: Work, keywords: Mapping[str, Any], needs_reference: bool) -> Work:
    sampler, group, inner = plan.sampler, keywords["group_size"], keywords["num_inner_updates"]
    prompt, completion = plan.task.max_prompt_length, sampler.completion_length
    rows = parts.batch_size // common.world_size * group
    views, length = _views(keywords["estimator"], parts.micro_batch_size, group, prompt, completion, inner)
    exact_weights = common.itemsize >= 4
    needs_old = keywords["loss"].needs_old
    view_bytes = bytes_without_gradient(common.config, length, common.itemsize)
    count = inner if needs_reference else inner - 1
    at_once = corruptions_at_once(max(1, count), views, view_bytes, common.views_per_chunk)
    return replace(
        common,
        views=views,
        length=length,
        scored=completion,
        keeps_reference=(needs_reference or bool(keywords.get("kl_in_reward"))) and parts.lora is None,
        rollout=_rollout_plan(sampler, rows, prompt),
        rollout_rows=rows * (2 if sampler.guidance else 1),
        passes=(inner - 1 if needs_old else 0) + (inner if needs_reference else 0),
        corruptions_at_once=at_once,
        merges=parts.lora is not None and (exact_weights or keywords["merge_for_rollouts"]),
    )


def _rollout_plan(sampler: BlockSampler, rows: int, prompt_length: int) -> RolloutPlan:
    """A sampler's work on what one forward holds of some rows; a guided row counts twice."""
    rows *= 2 if sampler.guidance else 1
    at_once, span = min(rows, sampler.rows_per_forward or rows), None if sampler.cache is None else sampler.cache.span
    canvas = (sampler.completion_length, sampler.block_length, sampler.steps_per_block)
    return RolloutPlan(at_once, prompt_length, *canvas, span)


def _evaluation_plan(plan: Plan, length: int | None) -> RolloutPlan:
    """What one forward holds in an evaluation or a look at the validation rows."""
    prompt = max(max(part.max_prompt_length, part.max_test_prompt_length) for part, _ in plan.task.portions(None))
    return _rollout_plan(evaluation_sampler(plan, length), plan.config.evaluation.batch_size, prompt)


def _views(estimator: Any, prompts: int, group: int, prompt: int, completion: int, inner: int) -> tuple[int, int]:
    """How many views the estimator makes of one micro-batch, and how long they are: by letting it make them."""
    rows = prompts * group
    ids = torch.zeros((rows, prompt), dtype=torch.int64)
    tokens = torch.zeros((rows, completion), dtype=torch.int64)
    numbers = torch.zeros((rows, completion))
    order = torch.arange(completion).expand(rows, -1).clone()
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    row_ids = torch.arange(rows)
    seen = torch.ones_like(ids, dtype=torch.bool)
    rollout = Rollout(ids, seen, tokens, everywhere, row_ids, group, order, numbers, numbers, numbers)
    advantages = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)
    corruption = estimator.corrupt(Context(rollout, advantages, 0, inner, 1, CounterDraws(0)))
    return tuple(corruption.noised_ids.shape)  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class StageEstimate:
    """What one stage would need."""

    name: str
    work: Work
    memory: Memory
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
    kept += work.counts.total * own if work.keeps_reference else 0
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
    plan: Plan, work: Work, world_size: int, peak: float, utilisation: float
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
        rollout = _evaluation_plan(plan, length)
        share = -(-count // world_size) * (2 if plan.sampler.guidance else 1)
        flops = rollout_flops(network_shape(work.config), replace(rollout, rows=share))
        hours = flops / (peak * utilisation) / 3600
        found.append(EvaluationEstimate(length, count, _evaluation_bytes(work, rollout), hours))
    return found


def _evaluation_bytes(work: Work, rollout: RolloutPlan) -> int:
    """The whole model on every device, and a forward of the rollout."""
    whole = replace(work, rollout=rollout, validation=None, merges=False, is_sharded=False, is_offloaded=False)
    need = memory(whole)
    return need.weights + need.rollout


# --------------------------------------------------------------------------------- micro-batches from a memory budget

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


def smaller(plan: Plan, parts: StageParts, work: Work) -> Iterator[tuple[str, Work]]:
    """Ways for a stage to need less memory, the cheapest first, each with the words of the command line that ask it."""
    few = None if work.rollout is None else replace(work.rollout, rows=min(4, work.rollout.rows))
    recompute = "" if work.recomputes_blocks else "model.gradient_checkpointing=true "
    if recompute:
        yield recompute.strip(), replace(work, recomputes_blocks=True)
    if parts.micro_batch_size > 1:
        one = replace(stage_work(plan, replace(parts, micro_batch_size=1), work.world_size), recomputes_blocks=True)
        yield f"{recompute}{_key(plan, parts, 'micro_batch_size')}=1", one
    if few is not None:
        chunks = f"+stages.{parts.name}.module.views_per_chunk=1"
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


def cures(plan: Plan, parts: StageParts, work: Work, limit: float) -> list[str]:
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


def _check_evaluation(plan: Plan, entry: EvaluationEstimate, work: Work, limit: float) -> None:
    """Refuse an evaluation that does not fit, naming how many rows of a forward would."""
    if entry.memory <= limit:
        return
    rollout = _evaluation_plan(plan, entry.completion_length)
    streams = 2 if plan.sampler.guidance else 1
    fits = [n for n in (32, 16, 8, 4, 2, 1) if streams <= n < rollout.rows]
    fits = [n for n in fits if _evaluation_bytes(work, replace(rollout, rows=n)) <= limit]
    cause = f"at {entry.completion_length} tokens it needs about {entry.memory / GIB:.1f} GiB on each device"
    cure = f"sampler.rows_per_forward={fits[0]}" if fits else "larger devices"
    raise ConfigError("evaluation", f"{cause}, which has {limit / GIB:.1f}", cure, "E602")


def merge_bytes(work: Work) -> int:
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
