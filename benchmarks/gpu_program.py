"""The whole program, `train.py`, on one GPU: LLaDA-8B's shape with random weights, then the built-in model.

    python benchmarks/gpu_program.py [--shape llada_8b|tiny] [--device cuda|cpu] [--seconds 500] [--only WORD ...]

Every run is a process of its own with a command line that anyone could type; what it cost, section by section, is read
from its results.json. A run that fails is noted with its last lines and the others go on; none starts after
`--seconds`. Weights are random: nothing here is about quality.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_session import SHAPES, Session

from d1lit.models.loading import export_model
from d1lit.models.tokenizers import build_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]

BUILTIN = (
    "recipe=d1", "task=sudoku", "report=false", "evaluation.rows=64", "scale.base.num_rows=64",
    "scale.base.max_updates=20", "scale.sft.max_updates=10", "scale.grpo.max_updates=8",
)  # fmt: skip
"""The tiny model through all of its stages, shortened."""

RANDOM = (
    "task=countdown", "task.train_data=builtin", "task.num_builtin={train:512,test:8}", "task.val_rows=8",
    "task.demonstration_data=task", "task.max_prompt_length=2048", "task.max_test_prompt_length=2048",
    "scale.evaluation.lengths=null", "stages.grpo.validate_every=null", "scale.grpo.batch_size=2", "report=false",
)  # fmt: skip
"""The model of the folder on Countdown at the paper's scale, with few rows: 4096 tokens of SFT, completions of 256."""
SFT = ("scale.sft.max_updates=2", "scale.sft.batch_size=2", "stages.sft.validate_every=null")
FAST = ("sampler=dual_cache", "model.compile=true", "model.cuda_graphs=true", "model.gradient_checkpointing=false")

RUNS: dict[str, tuple[str, ...]] = {
    "SFT, merge, GRPO": ("recipe=d1", *RANDOM, *SFT, "scale.grpo.max_updates=8", "sampler=dual_cache"),
    "GRPO, shared prompt mask, graphs and fused kernels": (
        "recipe=grpo", *RANDOM, *FAST, "estimator=one_step_shared", "scale.grpo.max_updates=16",
    ),
    "GRPO, four bits": (
        "recipe=grpo", *RANDOM, "sampler=dual_cache", "scale.grpo.lora.quantize=nf4", "scale.grpo.max_updates=8",
    ),
    "GRPO, fsdp_offload": (
        "recipe=grpo", *RANDOM, "sampler=dual_cache", "strategy=fsdp_offload", "scale.grpo.max_updates=8",
    ),
    "built-in model": BUILTIN,
    "built-in model, graphs and fused kernels": (*BUILTIN, "model.compile=true", "model.cuda_graphs=true"),
    "GRPO, fsdp": ("recipe=grpo", *RANDOM, "sampler=dual_cache", "strategy=fsdp", "scale.grpo.max_updates=8"),
    "GRPO, exact sampler": ("recipe=grpo", *RANDOM, "scale.grpo.max_updates=8", "model.compile=true"),
}  # fmt: skip


def write_model(session: Session, folder: Path) -> None:
    """Random weights in LLaDA's own layout, with the built-in tokenizer and its template."""
    tokenizer = build_tiny_tokenizer()
    network = session.policy.network
    config = network.config
    config.family = "llada"
    for name, token in (("mask_token_id", "mask_token"), ("eos_token_id", "eos_token"), ("pad_token_id", "eos_token")):
        setattr(config, name, int(tokenizer.convert_tokens_to_ids(str(getattr(tokenizer, token)))))
    export_model(network, folder, layout="official")
    tokenizer.save_pretrained(folder)


def run_once(words: Sequence[str], folder: Path, cache: Path, seconds: float) -> dict[str, Any]:
    """One `train.py`, and what its results.json says."""
    environment = {**os.environ, "D1LIT_CACHE": str(cache), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "train.py"), *words, f"run_dir={folder}"]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds, cwd=folder.parent
        )
    except subprocess.TimeoutExpired:
        return {"words": list(words), "error": f"not done after {seconds:.0f} s"}
    wall = time.perf_counter() - started
    (folder.parent / f"{folder.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip().splitlines()[-12:]
        return {"words": list(words), "error": " | ".join(tail)[-1500:], "status": done.returncode, "wall_s": wall}
    results = json.loads((folder / "results.json").read_text())
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if re.match(r"(warning|error|model\.)", line)]
    return {"words": list(words), "wall_s": wall, "stages": results["cost"]["stages"], "said": warnings}


def estimate(words: Sequence[str], home: Path, cache: Path) -> list[str]:
    """What `dry_run` prints for the same words: the lines about memory."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words, "dry_run=true"],
        env={**os.environ, "D1LIT_CACHE": str(cache), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True, text=True, check=False, cwd=home,
    )  # fmt: skip
    return [line.rstrip() for line in done.stdout.splitlines() if "GiB" in line or "MiB" in line]


def sections(name: str, run: Mapping[str, Any]) -> list[list[Any]]:
    """One row for each section of each stage."""
    rows = []
    for stage, cost in run["stages"].items():
        for section, spent in cost["sections"].items():
            updates = cost["updates"]
            rows.append(
                [name, stage, section, updates, spent["seconds"], spent["forwards"], spent["peak_memory_mb"] / 1024]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run them one after the other, and print one table."""
    parser = argparse.ArgumentParser("gpu_program", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llada_8b")
    parser.add_argument("--device", default="cuda", help="where the random weights are made: cuda or cpu")
    parser.add_argument("--seconds", type=float, default=500.0, help="no run starts later, and none goes on longer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_program.json")
    parser.add_argument("--only", nargs="*", default=None, help="words of the names of the runs that are wanted")
    parser.add_argument("--estimates", action="store_true", help="dry_run's memory for the same words beside it")
    known = parser.parse_args(arguments)
    shape = SHAPES[known.shape]
    shape = replace(shape, vocab_size=max(shape.vocab_size, len(build_tiny_tokenizer())))
    session = Session(shape, known.device, known.seconds, known.out)
    wanted = {name: words for name, words in RUNS.items() if known.only is None or any(w in name for w in known.only)}
    with tempfile.TemporaryDirectory(prefix="d1lit-gpu-") as place:
        home, cache = Path(place), Path(place) / "cache"
        if any("built-in" not in name for name in wanted):
            write_model(session, home / "model")
        session.let_go()
        if session.is_cuda:
            session.note("device", torch.cuda.get_device_name(0))
        rows: list[list[Any]] = []
        for number, (name, words) in enumerate(wanted.items()):
            if session.left < 0:
                print(f"{name}: not run, the time is up", flush=True)
                continue
            model = () if "built-in" in name else ("model=llada_8b", f"model.path={home / 'model'}")
            run = run_once((*words, *model), home / f"run{number}", cache, session.left + 60)
            run["dry_run"] = estimate((*words, *model), home, cache) if model and known.estimates else []
            session.note(name, run)
            print(
                f"{name}: {run.get('error') or format(run['wall_s'], '.0f') + ' s'}", *run.get("said", ()), flush=True
            )
            print("\n".join(run["dry_run"]), flush=True)
            if "error" not in run:
                rows += sections(name, run)
        session.show(
            "The whole program",
            ("run", "stage", "section", "updates", "s", "forwards", "peak GiB of the process"),
            rows,
        )
        session.note("done", True)


if __name__ == "__main__":
    main()
