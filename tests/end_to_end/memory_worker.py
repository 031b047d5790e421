"""One stage in a fresh process: its measured peak of resident memory beside what dry_run says.

`python -m tests.end_to_end.memory_worker NAME` prints `measured estimated` in bytes. Start it with
MALLOC_MMAP_THRESHOLD_=65536, so that what is freed leaves the process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from omegaconf import OmegaConf

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import Plan, make_stage
from d1lit.app.trainer import make_trainer
from d1lit.app.workloads import stage_work
from d1lit.footprint import memory
from d1lit.modules.accounting import peak_memory_mb, reset_peak_memory
from d1lit.quiet import quiet_libraries
from d1lit.recipes import StageFolder, run_stage
from d1lit.stopping import StopFlag

COMMON = {
    "trainer.accelerator": "cpu",
    "model.tiny.num_heads": 4,
    "task.num_builtin.train": 200,
    "task.val_rows": 0,
    "callbacks": {"save": None, "samples": None},
    "scale.sft.num_demonstrations": 60,
    "scale.sft.max_updates": 2,
    "scale.grpo.max_updates": 2,
    "scale.grpo.beta": 0.04,
}
LORA = {"targets": "paper", "rank": 8, "alpha": 16, "dropout": 0.0}
SHAPES = {
    "sft-full": {"recipe": "sft", "width": 384, "layers": 4, "mlp": 1024, "rows": 8, "micro": 8, "completion": 128},
    "sft-recomputing": {
        "recipe": "sft",
        "width": 384,
        "layers": 8,
        "mlp": 1024,
        "rows": 8,
        "micro": 8,
        "completion": 128,
    },
    "grpo-lora": {"recipe": "grpo", "width": 384, "layers": 4, "mlp": 1024, "rows": 4, "micro": 2, "completion": 64},
    "grpo-full": {"recipe": "grpo", "width": 384, "layers": 4, "mlp": 1024, "rows": 2, "micro": 1, "completion": 64},
}


def plan_of(name: str, is_small: bool) -> Plan:
    """The shape's plan, or that of a toy that only warms up."""
    shape = SHAPES[name]
    stage = shape["recipe"]
    values = {
        **COMMON,
        "model.tiny.width": 16 if is_small else shape["width"],
        "model.tiny.num_layers": 1 if is_small else shape["layers"],
        "model.tiny.mlp_width": 16 if is_small else shape["mlp"],
        "model.gradient_checkpointing": name == "sft-recomputing",
        f"scale.{stage}.batch_size": shape["rows"],
        f"scale.{stage}.micro_batch_size": shape["micro"],
        "scale.grpo.group_size": 4,
        "scale.grpo.share_within_group": False,
        f"scale.{stage}.lora": LORA if "lora" in name else None,
        "scale.sft.layout.completion_length": shape["completion"],
        "sampler.completion_length": shape["completion"],
        "sampler.block_length": 32,
        "sampler.num_steps": 8,
    }
    (config,) = compose_jobs("train", ["task=sudoku", f"recipe={stage}", "logger=none"]).configs
    for key, value in values.items():
        OmegaConf.update(config, key, yaml.safe_load(str(value)) if isinstance(value, str) else value, force_add=True)
    return plan_run(config)


def run(plan: Plan, folder: Path) -> None:
    """Train the plan's stage."""
    folder.mkdir()
    policy, tokenizer = plan.make_policy()
    stage = make_stage(plan, plan.stages[0], tokenizer, partial(make_trainer, plan, StopFlag(), tokenizer))
    run_stage(StageFolder(folder), policy, stage, plan.seed, lambda line: None)


def resident() -> float:
    """Bytes in memory now, what the allocator has kept for itself given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return (
        next(float(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
        * 1024
    )


def longest_prompt(plan: Plan) -> int:
    """Of the rows the stage trains on."""
    _, tokenizer = plan.make_policy()
    return max(len(row.prompt_ids) for row in plan.rows_of(plan.stages[0], tokenizer).rows)


def main(name: str) -> None:
    """Warm up, then measure."""
    quiet_libraries()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        run(plan_of(name, is_small=True), Path(folder) / "warm")
        plan = plan_of(name, is_small=False)
        OmegaConf.update(plan.config, "task.max_prompt_length", longest_prompt(plan))
        plan = plan_run(plan.config)
        before = resident()
        reset_peak_memory()
        run(plan, Path(folder) / "run")
        spent = json.loads((Path(folder) / "run" / "cost.json").read_text())  # its sections reset the mark
    estimate = memory(stage_work(plan, plan.stages[0], 1))
    print(estimate, file=sys.stderr)
    print(round(max(peak_memory_mb(), spent["peak_memory_mb"]) * 2**20 - before), estimate.peak)


if __name__ == "__main__":
    main(sys.argv[1])
