"""A stage and an evaluation as workloads: what one device holds and computes, before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from d1lit.app.components import build
from d1lit.app.plan import Plan, StageParts, evaluation_sampler
from d1lit.costs import RolloutPlan
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.footprint import Workload, count_parameters
from d1lit.joint_scoring import corruptions_at_once
from d1lit.losses import recording
from d1lit.masking import WholeRow
from d1lit.models import MaskedDiffusionConfig, build_tiny_tokenizer
from d1lit.models.layouts import read_config
from d1lit.models.loading import load_config
from d1lit.models.policy import bytes_without_gradient
from d1lit.models.presets import tiny_config
from d1lit.modules import Prompts
from d1lit.modules.muon import MuonWithAdamW
from d1lit.sampling import BlockSampler
from d1lit.sampling.sharing import rows_at_a_canvas
from d1lit.strategies import FullySharded, Setting
from d1lit.types import Context, PolicyLoss, Rollout

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


def stage_work(plan: Plan, parts: StageParts, world_size: int) -> Workload:
    """A stage of a plan as numbers."""
    model = plan.config.model
    config = shape_of(plan)
    if parts.trains_order_head:
        config = copy.deepcopy(config)
        config.order_head = True
    counts = count_parameters(config, parts.lora)
    setting = Setting(world_size, plan.device, parts.lora is None and model.path is not None)
    strategy = build(plan.config, "strategy")(setting)
    keywords: Mapping[str, Any] = parts.module.keywords if isinstance(parts.module, partial) else {}
    # Stated numbers are those of GPUs.
    on_gpu = plan.device.type == "cuda" or plan.config.hardware.peak_tflops is not None
    muon = isinstance(parts.optimizer, partial) and parts.optimizer.func is MuonWithAdamW
    slots = 2.0 - counts.matrices / counts.trainable if muon else 2.0
    common = Workload(
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
        validation=evaluation_plan(plan, None) if parts.validate_every is not None and plan.task.val_rows else None,
    )
    if isinstance(parts.data, Prompts):
        return _rl_work(plan, parts, common, keywords)
    layout = parts.data.layout.keywords  # type: ignore[attr-defined]
    completion = layout.get("completion_length", layout.get("max_length"))
    prompt = plan.task.max_prompt_length if "completion_length" in layout else 0
    view = keywords.get("view", WholeRow())
    return replace(common, length=view.length(prompt, completion), scored=completion)


def _rl_work(plan: Plan, parts: StageParts, common: Workload, keywords: Mapping[str, Any]) -> Workload:
    group, inner = keywords["group_size"], keywords["num_inner_updates"]
    sampler = recording(plan.sampler, keywords["estimator"], keywords["advantage"])
    assert isinstance(sampler, BlockSampler)
    loss: PolicyLoss = keywords["loss"]
    prompt, completion = plan.task.max_prompt_length, sampler.completion_length
    rows = parts.batch_size // common.world_size * group
    # Of one prompt, whose views are as many as any other's: patterns of attention are large.
    views, length = _views(keywords["estimator"], _blank_rollout(sampler, group, group, prompt), inner)
    views *= parts.micro_batch_size
    exact_weights = common.itemsize >= 4
    needs_old, needs_reference = loss.traits.needs_old, loss.traits.needs_reference
    view_bytes = bytes_without_gradient(common.config, length, common.itemsize)
    count = inner if needs_reference else inner - 1
    at_once = corruptions_at_once(max(1, count), views, view_bytes, common.views_per_chunk)
    return replace(
        common,
        views=views,
        length=length,
        scored=completion,
        keeps_reference=parts.keeps_reference,
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
    shared = None
    if (tree := sampler.tree) is not None:
        shared = tuple(rows_at_a_canvas(tree, step, sampler.total_steps) for step in range(sampler.total_steps))
    return RolloutPlan(at_once, prompt_length, *canvas, span, sampler.looks_ahead, shared)


def evaluation_plan(plan: Plan, length: int | None) -> RolloutPlan:
    """What one forward holds in an evaluation or a look at the validation rows."""
    prompt = max(max(part.max_prompt_length, part.max_test_prompt_length) for part, _ in plan.task.portions(None))
    return _rollout_plan(evaluation_sampler(plan, length), plan.config.evaluation.batch_size, prompt)


def _blank_rollout(sampler: BlockSampler, rows: int, group: int, prompt: int) -> Rollout:
    """A rollout of the longest prompts in which nothing but the order of the tokens is said."""
    completion, tree = sampler.completion_length, sampler.tree
    ids = torch.zeros((rows, prompt), dtype=torch.int64)
    tokens = torch.zeros((rows, completion), dtype=torch.int64)
    numbers = torch.zeros((rows, completion))
    # Without a quota a token a step is the most that can come.
    quotas = sampler.commit.quotas(sampler.block_length, sampler.steps_per_block)
    num_steps = completion if quotas is None else min(sampler.total_steps, completion)
    place = torch.arange(completion).expand(rows, -1)
    order = place * num_steps // completion
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    seen = torch.ones_like(ids, dtype=torch.bool)
    rollout = Rollout(
        *(ids, seen, tokens, everywhere, torch.arange(rows), group, order, numbers, numbers, numbers),
        edge=None if tree is None else place * tree.height // completion,
    )
    if not sampler.record_predictions:
        return rollout
    masked = order >= torch.arange(num_steps)[:, None, None]
    predictions = torch.where(masked, 0, -1)
    return replace(
        rollout,
        trace=torch.zeros_like(predictions),
        predictions=predictions,
        prediction_logprobs=torch.zeros(predictions.shape),
    )


def _views(estimator: Any, rollout: Rollout, inner: int) -> tuple[int, int]:
    """How many views the estimator makes of one micro-batch, and how long they are: by letting it make them."""
    advantages = torch.where(torch.arange(len(rollout.row_ids)) % 2 == 0, 1.0, -1.0)
    corruption = estimator.corrupt(Context(rollout, advantages, 0, inner, 1, CounterDraws(0)))
    return tuple(corruption.noised_ids.shape)  # type: ignore[return-value]
