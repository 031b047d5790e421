"""What a dry run says: official shapes without memory, counts, memory against measured peaks, and clear refusals."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.dry_run import estimate_run
from d1lit.app.micro_batches import GIB
from d1lit.app.plan import Plan
from d1lit.app.workloads import shape_of, stage_work
from d1lit.costs import full
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.footprint import count_parameters, cycle_flops, memory, update_flops
from d1lit.models import LoraSettings, add_lora
from d1lit.models.layouts import to_official_name
from d1lit.models.presets import build_on_meta
from d1lit.types import PromptBatch

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ("task=gsm8k", "task.train_data=builtin", "task.test_data=builtin", "task.demonstration_data=task")


@lru_cache(maxsize=8)
def plan_for(*words: str) -> Plan:
    (config,) = compose_jobs("train", ["model=llada_8b", "hardware=gpu_80gb", *OFFLINE, *words]).configs
    return plan_run(config)


def test_llada_8b_stands_on_the_meta_device_under_its_official_names():
    before = psutil.Process().memory_info().rss
    network = build_on_meta(shape_of(plan_for()))
    names = {to_official_name(name, "llada"): p.numel() for name, p in network.named_parameters()}
    assert psutil.Process().memory_info().rss - before < GIB / 4, "16 GB of weights were not allocated"
    assert all(p.is_meta for p in network.parameters())
    assert sum(names.values()) == 8_015_581_184
    block = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    expected = {f"model.transformer.blocks.{n}.{part}.weight" for n in range(32) for part in block}
    assert set(names) == expected | {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}


@pytest.mark.parametrize(("targets", "count"), [("paper", 167_772_160), ("all_linear", 335_544_320)])
def test_adapters_of_the_paper(targets, count):
    """Rank 128: each matrix adds 128 times the sum of its sides, worked out by hand."""
    counts = count_parameters(shape_of(plan_for()), LoraSettings(targets, 128, 64, 0.0))
    square, wide = 128 * (4096 + 4096), 128 * (4096 + 12288)
    assert counts.trainable == count == 32 * (3 * square + wide if targets == "paper" else 4 * square + 3 * wide)
    assert counts.total == 8_015_581_184 + count


def test_the_papers_run_is_estimated_whole():
    stages, lines = estimate_run(plan_for(), world_size=8)
    assert [stage.name for stage in stages] == ["sft", "grpo"]
    sft, grpo = stages
    assert grpo.work.rollout_rows * 8 == 96, "96 completions an update, as d1 ran"
    assert grpo.memory.weights == 8_015_581_184 * 2 + 167_772_160 * 4, "the adapter is in float32"
    assert grpo.memory.optimizer == 2 * 167_772_160 * 4
    assert sft.tokens == 2460 * 8 * 4096
    assert 16 * GIB < grpo.memory.peak < 24 * GIB
    assert any("estimates for 8 devices" in line for line in lines)


def test_flops_of_an_update_by_hand():
    """Adapters and attention apart, a frozen body costs two products forward and one backward a weight and token."""
    work = stage_work(plan_for(), plan_for().stages[1], world_size=8)
    tokens = work.num_micro * full(work.views, work.length).rows * work.length
    body, head = 32 * (4 * 4096**2 + 3 * 4096 * 12288), 126464 * 4096
    recomputed = 2 * body * tokens
    least = (2 + 2) * body * tokens + recomputed + 4 * head * work.num_micro * work.views * work.scored
    assert least * 0.95 < update_flops(work) < least * 1.15


def test_what_cannot_fit_is_refused_with_what_would(capsys):
    plan = plan_for("recipe=grpo", "scale.grpo.lora=null")
    with pytest.raises(
        ConfigError, match=r"stages.grpo: needs about \d+\.\d GiB on each device, which has 77.0"
    ) as caught:
        estimate_run(plan, world_size=1)
    assert "strategy=fsdp trainer.devices=" in caught.value.cure
    devices = int(caught.value.cure.split("trainer.devices=")[1].split(";")[0])
    estimate_run(plan, world_size=devices)
    with pytest.raises(ConfigError):
        estimate_run(plan, world_size=devices // 2)


def test_a_card_too_small_for_bfloat16_is_told_of_four_bits():
    plan = plan_for("hardware.memory_gib=17")
    with pytest.raises(ConfigError, match=r"stages.sft: needs about 18\.\d GiB") as caught:
        estimate_run(plan, world_size=1)
    assert caught.value.cure.startswith("scale.sft.lora.quantize=nf4")
    nf4 = ("scale.sft.lora.quantize=nf4", "scale.grpo.lora.quantize=nf4", "sampler.rows_per_forward=4")
    sft, grpo = estimate_run(plan_for("hardware.memory_gib=17", "dry_run=true", *nf4), world_size=1)[0]
    whole, packed = 8_015_581_184, 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    assert grpo.memory.start == 2 * whole, "loaded in bfloat16, then packed"
    expected = 2 * (whole - packed) + packed * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4 * 167_772_160
    assert grpo.memory.weights == pytest.approx(expected)
    assert sft.memory.peak < 17 * GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("recipe=grpo", "scale.grpo.lora=null"),
        ("recipe=grpo", "hardware.memory_gib=20", "scale.grpo.micro_batch_size=4"),
        ("recipe=sft", "hardware.memory_gib=19", "scale.sft.micro_batch_size=8"),
        ("recipe=grpo", "hardware.memory_gib=20", "model.gradient_checkpointing=false"),
        ("recipe=grpo", "hardware.memory_gib=45", "scale.grpo.lora=null", "scale.grpo.batch_size=6"),
    ],
)
def test_every_cure_that_is_named_works(words):
    with pytest.raises(ConfigError) as caught:
        estimate_run(plan_for(*words), world_size=1)
    for cure in caught.value.cure.split("; or "):
        cured = plan_for(*words, "dry_run=true", *cure.split())
        estimate_run(cured, cured.config.trainer.devices)


def test_an_adapter_is_not_told_to_take_one():
    with pytest.raises(ConfigError, match="needs about") as caught:
        estimate_run(plan_for("recipe=grpo", "hardware.memory_gib=4"), world_size=1)
    assert caught.value.cure == "larger devices"


def test_a_sharded_model_is_whole_before_and_after_its_stage():
    full, base = plan_for("recipe=grpo", "scale.grpo.lora=null", "strategy=fsdp_offload"), 2 * 8_015_581_184
    for devices in (2, 8):
        (stage,), _ = estimate_run(full, devices)
        assert stage.memory.start == 2 * base, "beside its copy, the reference"
        assert stage.memory.weights == stage.memory.optimizer == 0
        # Weights, gradients and reference in bfloat16; two moments and a copy of the weights in float32.
        assert stage.memory.host == pytest.approx(base * (3 + 3 * 2) / devices)
    assert stage.checkpoint_bytes == 3 * base * (2 + 3 * 2) + base, "the kept reference is in every checkpoint"
    (sft,), _ = estimate_run(plan_for("recipe=sft", "scale.sft.lora=null", "strategy=fsdp"), 8)
    assert sft.memory.start == base + base // 8, "the shards still stand when all is put together"
    assert sft.memory.rollout > base, "and validation gathers it"


def test_an_evaluation_that_does_not_fit_is_refused():
    plan = plan_for(
        "recipe=sft",
        "hardware.memory_gib=60",
        "evaluation.batch_size=512",
        "task.val_rows=0",
        "evaluation.lengths=null",
    )
    plan = replace(plan, sampler=replace(plan.sampler, rows_per_forward=None, block_length=256))
    with pytest.raises(ConfigError, match=r"^evaluation: at 256 tokens it needs about \d+\.\d GiB") as caught:
        estimate_run(plan, world_size=1)
    rows = int(caught.value.cure.removeprefix("sampler.rows_per_forward="))
    estimate_run(replace(plan, sampler=replace(plan.sampler, rows_per_forward=rows)), world_size=1)


def test_hours_are_those_of_the_sampler_that_is_chosen():
    exact, cached = (estimate_run(plan_for("recipe=grpo", *words), 1) for words in ((), ("sampler=dual_cache",)))
    assert cached[0][0].hours < exact[0][0].hours / 2
    _, lines = estimate_run(plan_for("recipe=grpo", "sampler=threshold"), 1)
    assert any("Threshold decides itself how many steps" in line for line in lines)


def test_evaluation_and_merge_are_estimated_at_every_length():
    plan = plan_for("recipe=grpo", "evaluation.lengths=[128,256]", "task.num_builtin.test=40")
    _, lines = estimate_run(plan, world_size=1)
    at = {n: next(line for line in lines if f"at {n} tokens" in line) for n in (128, 256)}
    assert all("40 rows" in line and "for each of 2 models" in line for line in at.values())
    hours = {n: float(line.split("rows, ")[1].split()[0]) for n, line in at.items()}
    # Twice the steps over a canvas that is longer by 128 of about 640 tokens.
    assert 2 * 1.1 < hours[256] / hours[128] < 2 * 1.4
    merge = next(line for line in lines if line.startswith("merging"))
    assert float(merge.split(": ")[1].split()[0]) == pytest.approx(
        (2 * 8_015_581_184 + 12 * 4096 * 12288) / GIB, abs=0.06
    )


def estimated_on_a_gpu(monkeypatch) -> dict[str, float]:
    """GiB beside weights and optimizer, as benchmarks/gpu_memory.py names and asks for them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes, parts, rollouts = map(importlib.import_module, ("gpu_session", "gpu_memory", "gpu_rollouts"))
    shape = shapes.SHAPES["llada_8b"]
    session, plan = SimpleNamespace(shape=shape, is_cuda=True), shape.plan
    counts = count_parameters(shape.config(), LoraSettings("paper", shape.rank, shape.rank / 2, 0.0))
    found = {}
    for batch, cached in product(shape.batches, (False, True)):
        small = rollouts.one_block(plan, batch)
        work = parts.stage(session, counts, 1, plan.length, 1, False)
        need = memory(replace(work, rollout=small, rollout_rows=batch, caches=cached))
        found[f"rollout, B {batch}{', dual cache' if cached else ''}"] = need.rollout
    for (name, views), recomputes in product((("group", 1), ("row", plan.rows)), (False, True)):
        work = parts.stage(session, counts, views, plan.length, plan.completion_length, recomputes)
        need = memory(replace(work, passes=1))
        label = f"update, {name}, blocks {'recomputed' if recomputes else 'kept'}"
        found[label] = max(need.update, need.gradients + need.update_end)
        found[f"scoring, {name}"] = need.scoring
    for (count, length), recomputes in product(shape.sft, (True, False)):
        need = memory(parts.stage(session, counts, count, length, int(length * 0.375), recomputes))
        found[f"SFT, {count} x {length}, blocks {'recomputed' if recomputes else 'kept'}"] = need.peak - need.fixed
    return {name: value / GIB for name, value in found.items()}


def test_memory_is_what_was_measured_on_a_gpu(monkeypatch):
    """The peaks of the last run on an H100, which benchmarks/RESULTS.md shows."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())["second"]["memory"]
    estimated = estimated_on_a_gpu(monkeypatch)
    assert len(recorded) == len(estimated) == 16
    for name, measured, _, _ in recorded:
        assert abs(estimated[name] / measured - 1) <= 0.15, name


SHAPES = ("sft-full", "sft-recomputing", "grpo-lora", "grpo-full")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_that_of_a_measured_run(name):
    command = [sys.executable, "-m", "tests.end_to_end.memory_worker", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured, estimated = map(int, done.stdout.split()[-2:])
    error = estimated / measured - 1
    print(f"{name}: measured {measured / 2**20:.0f} MiB, estimated {estimated / 2**20:.0f}: {error:+.0%}")
    assert abs(error) <= 0.15


SMALL = [f"model.tiny.{size}" for size in ("width=16", "num_layers=2", "num_heads=2", "mlp_width=24")]


def small_plan(*words: str) -> Plan:
    (config,) = compose_jobs(
        "train", ["task=sudoku", "task.num_builtin.train=8", "task.val_rows=0", *SMALL, *words]
    ).configs
    return plan_run(config)


def test_a_rollout_that_branches_is_counted_as_it_is_metered():
    """d-TreeRPO's recipe: the dry run's operations of a rollout are those of a real one, what rows share counted once."""
    plan = small_plan("recipe=d_tree_rpo", "sampler.stop_at_eos=false", "scale.grpo.batch_size=2")
    work = stage_work(plan, plan.stages[0], world_size=1)
    policy, tokenizer = plan.make_policy()
    ids = torch.full((2, plan.task.max_prompt_length), tokenizer.eos_token_id)
    prompts = PromptBatch(ids, torch.ones_like(ids).bool(), torch.arange(2), ({}, {}))
    plan.sampler(policy, prompts, plan.stages[0].module.keywords["group_size"], CounterDraws(0))
    assert cycle_flops(replace(work, passes=0)) == policy.work.flops
    alone = cycle_flops(replace(work, passes=0, rollout=replace(work.rollout, rows_at_a_canvas=None)))
    assert 1.2 < alone / policy.work.flops < 8


@pytest.mark.parametrize(
    "words", [("recipe=lladou", "loss.beta=0.04"), ("recipe=grpo", "stages.grpo.module.reference_sync_every=4")]
)
def test_a_reference_that_is_kept_beside_an_adapter_is_counted(words):
    lora = "stages.grpo.lora={targets: all_linear, rank: 4, alpha: 8, dropout: 0.0, quantize: null}"
    plan = small_plan(*words, lora, "model.dtype=bfloat16", "scale.grpo.beta=0.04")
    (parts,) = plan.stages
    assert parts.keeps_reference
    policy = add_lora(plan.make_policy()[0], parts.lora, seed=0)
    policy.train_order_head(parts.trains_order_head, seed=0)
    before = sum(p.nbytes for p in policy.parameters())
    policy.keep_reference()
    kept = sum(p.nbytes for p in policy.parameters()) - before
    work = stage_work(plan, parts, world_size=1)
    assert memory(work).reference == kept > 0
