"""LLaDA-8B's shape on one GPU, random weights in bf16: checks, rollouts, a GRPO step, updates, SFT, memory.

    python benchmarks/gpu.py [--shape llada_8b|tiny] [--device cuda|cpu] [--seconds 400] [--out FILE] [--only NAME ...]

Needs torch, transformers and peft alone. Sections run in the order of their weight; one that fails is noted with its
error and the others go on; none starts after `--seconds`. The JSON file is written after every section.

Rollouts are measured on one block of 32 tokens in 16 steps on d1's canvas of 456 tokens (prompt 200, completion 256):
every block of a rollout costs the same, so a rollout is eight times that; one line runs whole rollouts to show it.
"factor" is the textbook's time over a contender's in the same round, "arithmetic" the ratio of operations by
src/d1lit/costs.py, which knows products of matrices only. Weights are random: nothing here is about quality.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from gpu_checks import CHECKS, QUICK, Bench
from gpu_memory import measure_memory
from gpu_rollouts import measure_batches, measure_rollout, measure_whole_rollout
from gpu_session import GIB, SHAPES, Session, first_line, free, seconds_of
from gpu_training import measure_sft, measure_step, measure_update
from measuring import machine

from d1lit.costs import (
    matmul_peak,
)


def measure_machine(session: Session) -> None:
    """Peak rate, bandwidth."""
    facts = machine(session.device)
    session.peak = matmul_peak(session.device, session.dtype)
    facts["peak_tflops"] = session.peak / 1e12
    if session.is_cuda:
        one = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
        other = torch.empty_like(one)
        seconds = min(seconds_of(lambda: other.copy_(one), "cuda") for _ in range(6))
        facts["copy_tb_per_s"] = 2 * one.numel() / seconds / 1e12
        facts["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / GIB
        facts["cuda"] = torch.version.cuda
    session.show("Machine", ("fact", "value"), list(facts.items()))
    session.note("machine", facts)


def measure_checks(session: Session, names: Sequence[str] = tuple(CHECKS)) -> None:
    """Right before fast."""
    bench = Bench(session.device, session.shape is SHAPES["tiny"])
    found = {}
    for name in names:
        try:
            found[name] = CHECKS[name](bench)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"ok": False, "error": first_line(error)}
        print(f"   {name}: {found[name]}", flush=True)
    free(session)
    rows = []
    for name, one in found.items():
        figures = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in one.items()]
        rows.append([name, "yes" if one["ok"] else "NO", "; ".join(figures)])
    session.show("Checks", ("check", "holds", "figures"), rows)
    session.note("checks", found)


SECTIONS: dict[str, Callable[[Session], None]] = {
    "machine": measure_machine,
    "checks": measure_checks,
    "rollout": measure_rollout,
    "step": measure_step,
    "update": measure_update,
    "sft": measure_sft,
    "memory": measure_memory,
    "batches": measure_batches,
    "whole": measure_whole_rollout,
}
BY_NAME = {"quick_checks": partial(measure_checks, names=QUICK)}
"""Run only where they are asked for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser("gpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llada_8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=400.0, help="no section starts after this time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--only", nargs="*", default=None, help="sections, by name")
    chosen = parser.parse_args(arguments)
    session = Session(SHAPES[chosen.shape], chosen.device, chosen.seconds, chosen.out)
    for name in chosen.only or SECTIONS:
        if session.left < 0 and name != "machine":
            print(f"-- {name}: not run, the time is up", flush=True)
            continue
        start = time.perf_counter()
        print(f"-- {name}", flush=True)
        try:
            (SECTIONS | BY_NAME)[name](session)
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            session.note(f"{name} failed", first_line(error))
            free(session)
        print(f"-- {name}: {time.perf_counter() - start:.1f} s, {session.left:.0f} left", flush=True)
    print("\n".join(["", "# All tables", *session.tables]))


if __name__ == "__main__":
    main()
