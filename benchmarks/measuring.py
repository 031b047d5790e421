"""Side by side in one process: seconds, peak memory, and tables of both.

Contenders take turns, in an order that is reversed every round, so that a machine that speeds up, slows down or works
for others does so for all of them; a factor is the median over rounds of one round's ratio. On a CPU the seconds are
CPU time of this process (one thread), which waiting for a busy core does not lengthen; wall time is kept beside it.

Peak memory is measured in a pass of its own, before the timed ones: torch's profiler reports every allocation and
release of the CPU allocator, and the highest running sum of these is the peak above what was there before (weights
and inputs). Unlike resident memory it does not depend on what the C library keeps for later. On a GPU it is
`max_memory_allocated` above the level before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from d1lit.costs import matmul_peak, synchronise
from d1lit.models import Policy
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.types import PromptBatch

MB = 2**20
Run = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What the command line said."""

    quick: bool
    rounds: int
    device: str
    out: Path


def setup(name: str, arguments: Sequence[str] | None = None, rounds: int = 5) -> Setup:
    """Read the command line; one CPU thread."""
    parser = argparse.ArgumentParser(name)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, default=None, help=f"timed turns of each contender (default {rounds})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    known = parser.parse_args(arguments)
    if known.rounds is not None and known.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(1)
    return Setup(known.quick, known.rounds or (1 if known.quick else rounds), known.device, known.out)


# ----------------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Size:
    """A network in LLaDA's proportions (MLP three times as wide), heads of 64."""

    vocab_size: int
    width: int
    num_layers: int

    def __str__(self) -> str:
        return f"V {self.vocab_size}, d {self.width}, {self.num_layers} layers"


TINY = Size(67, 64, 2)
PROPORTIONAL = Size(4096, 512, 8)
"""Head : body as in LLaDA-8B, 7.7 % (7.4 %)."""
MIDDLE = Size(32000, 256, 4)
LARGE_VOCABULARY = Size(126464, 256, 4)


def fresh_policy(size: Size, device: str, train_body: bool = False) -> Policy:
    """Random weights; the mask token's logit is always 0, so that no sampler would ever propose it."""
    mask, eos = size.vocab_size - 1, size.vocab_size - 2
    heads = max(1, size.width // 64)
    config = tiny_config(
        size.vocab_size, mask, eos, eos, size.width, size.num_layers, heads, 3 * size.width, 10000.0, 4096, 0.05
    )
    network = fresh_network(config, seed=0)
    with torch.no_grad():
        network.head_weight[mask] = 0.0
    network.requires_grad_(False)
    if train_body:
        network.model.layers.requires_grad_(True)
        network.model.norm.requires_grad_(True)
    torch.nn.Module.to(network, device)
    return Policy(network).eval()


def random_prompts(count: int, length: int, vocab_size: int, device: str, seed: int = 0) -> PromptBatch:
    """Unpadded prompts of ordinary tokens."""
    ids = torch.randint(0, vocab_size - 2, (count, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(count, device=device), ({},) * count)


# ------------------------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class Measured:
    """One contender."""

    seconds: float
    """Median over rounds."""
    wall_seconds: float
    factor: float
    """Median over rounds of (seconds of the first contender) / (its own)."""
    factor_low: float
    factor_high: float
    peak_mb: float
    memory_factor: float


def peak_bytes(run: Run, device: str) -> int:
    """Most bytes held at once while `run` runs, above what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def seconds_of(run: Run, device: str) -> tuple[float, float]:
    """CPU (on a GPU: wall) seconds, and wall seconds."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return (cpu if device == "cpu" else wall), wall


def compare(contenders: dict[str, Run], rounds: int, device: str, warm_up: bool = True) -> dict[str, Measured]:
    """All contenders, against the first of them.

    Args:
        contenders: what is run, by name.
        rounds: timed turns of each.
        device: cpu or cuda.
        warm_up: run each once before, for its peak memory; without, for runs of minutes, there is no such figure.
    """
    names = list(contenders)
    peaks = {name: peak_bytes(contenders[name], device) / MB if warm_up else float("nan") for name in names}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            taken[name].append(seconds_of(contenders[name], device))
    first = names[0]
    result = {}
    for name in names:
        ratios = [base / own for (base, _), (own, _) in zip(taken[first], taken[name], strict=True)]
        result[name] = Measured(
            statistics.median(cpu for cpu, _ in taken[name]),
            statistics.median(wall for _, wall in taken[name]),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            peaks[name],
            peaks[first] / peaks[name] if peaks[name] else float("nan"),
        )
    return result


def relative_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Length of the difference of two lists of tensors over the length of the second."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5


# --------------------------------------------------------------------------------------------------------------- output


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "matmul_gflops": matmul_peak(device, torch.float32) / 1e9,
        "load_average": round(os.getloadavg()[0], 2),
    }


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """As markdown."""

    def shown(cell: Any) -> str:
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell)

    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(map(shown, row)) + " |" for row in rows])


def against(measured: Measured, floor: float | None) -> str:
    """A factor with its range over rounds, and whether its floor holds."""
    text = f"{measured.factor:.2f} ({measured.factor_low:.2f}-{measured.factor_high:.2f})"
    return text if floor is None else f"{text} {'>=' if measured.factor >= floor else 'BELOW'} {floor:g}"


def keep(name: str, chosen: Setup, tables: Sequence[str], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write tables and numbers as JSON; called after every case, so that a run that is cut short leaves something."""
    facts = machine(chosen.device)
    content = {"name": name, "quick": chosen.quick, "rounds": chosen.rounds, "machine": facts, "tables": list(tables)}
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"{name}.json").write_text(json.dumps({**content, "records": list(records)}, indent=1) + "\n")
    return facts


def publish(name: str, chosen: Setup, tables: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Print the tables, and keep tables and numbers as JSON."""
    facts = keep(name, chosen, tables, records)
    print(f"# {name}: {facts['processor']}, {facts['threads']} thread, torch {facts['torch']}, "
          f"{facts['matmul_gflops']:.0f} GFLOP/s, load {facts['load_average']}, {chosen.rounds} rounds")  # fmt: skip
    for text in tables:
        print(f"\n{text}")


def plain(measured: dict[str, Measured]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {name: asdict(one) for name, one in measured.items()}
