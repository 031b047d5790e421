"""What the sections of `gpu.py` share: the network, the clock, contenders that take turns, and what was found."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Size, table
from peft import PeftModel

from d1lit.costs import (
    RolloutPlan,
    synchronise,
)
from d1lit.models import LoraSettings, MaskedDiffusionConfig, Policy, add_lora
from d1lit.models.kernels import PLAIN, Kernels, fused
from d1lit.models.presets import build_on_meta, tiny_config

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A network and the workload it is measured under."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    plan: RolloutPlan
    """Of a whole rollout; its rows are the group."""
    rank: int
    num_inner_updates: int
    batches: tuple[int, ...]
    sft: tuple[tuple[int, int], ...]
    """Rows and length of SFT micro-batches."""

    def config(self) -> MaskedDiffusionConfig:
        """As LLaDA's, whatever its size."""
        mask, eos = self.vocab_size - 1, self.vocab_size - 2
        return tiny_config(
            self.vocab_size, mask, eos, eos, self.width, self.num_layers, self.num_heads, self.mlp_width, 500000.0,
            4096, 0.02,
        )  # fmt: skip

    @property
    def size(self) -> Size:
        """For the other benchmarks' cases."""
        return Size(self.vocab_size, self.width, self.num_layers)


SHAPES = {
    "llada_8b": Shape(
        126464, 4096, 32, 32, 12288, RolloutPlan(6, 200, 256, 32, 16), 128, 12, (8, 1, 24), ((1, 4096), (8, 512))
    ),
    "tiny": Shape(67, 64, 2, 1, 192, RolloutPlan(2, 8, 16, 8, 4), 2, 2, (2, 1), ((2, 16),)),
}


class Session:
    """What all sections share: the network, the clock, and what has been found so far."""

    def __init__(self, shape: Shape, device: str, seconds: float, out: Path) -> None:
        self.shape, self.device, self.out = shape, device, out
        self.is_cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.end = time.perf_counter() + seconds
        self.record: dict[str, Any] = {}
        self.tables: list[str] = []
        self.peak = 0.0
        self._policy: Policy | None = None
        self._adapted: Policy | None = None
        self.kernels = PLAIN

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    @property
    def policy(self) -> Policy:
        """The plain network, made on the device at first use."""
        if self._policy is None:
            network = build_on_meta(self.shape.config())
            torch.nn.Module.to(network, dtype=self.dtype)
            network.to_empty(device=self.device)
            generator = torch.Generator(self.device).manual_seed(0)
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if parameter.dim() == 1:
                        parameter.fill_(1.0)
                        continue
                    parameter.normal_(0, 0.02, generator=generator)
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        parameter.mul_((2 * self.shape.num_layers) ** -0.5)
                network.head_weight[-1] = 0.0  # the textbook might propose the mask token otherwise
            network.requires_grad_(False)
            self._policy = Policy(network).eval()
        return self._policy

    @property
    def adapted(self) -> Policy:
        """The same network with d1's adapter, in place: `without_adapter` before the plain one is used again."""
        if self._adapted is None:
            settings = LoraSettings("paper", self.shape.rank, 0.5 * self.shape.rank, 0.0)
            self._adapted = add_lora(self.policy, settings, 0).eval()
        return self._adapted

    def without_adapter(self) -> None:
        """Take the adapter out of the network."""
        if self._adapted is not None:
            assert isinstance(self._adapted.model, PeftModel)
            self._adapted.model.unload()
            self._adapted = None
            free(self)

    def let_go(self) -> None:
        """Give the network's memory back, to other processes as well."""
        self.without_adapter()
        self._policy = None
        free(self)

    def autocast(self) -> AbstractContextManager[Any]:
        """The adapter is in fp32 and its products in bf16, as under trainer.precision=bf16-mixed."""
        return torch.autocast("cuda", torch.bfloat16) if self.is_cuda else nullcontext()

    def fused(self) -> Kernels:
        """On a GPU."""
        return fused("cuda", torch.bfloat16) if self.is_cuda else PLAIN

    def note(self, name: str, content: Any) -> None:
        """Keep a result, on disk as well."""
        self.record[name] = content
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({**self.record, "tables": self.tables}, indent=1, default=str) + "\n")

    def show(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table and keep it."""
        text = f"## {title}\n\n{table(headings, rows)}"
        self.tables.append(text)
        print(f"\n{text}", flush=True)


@dataclass(frozen=True)
class Contender:
    """Something to time; `ready` is done before and outside the clock."""

    run: Callable[[], object]
    ready: Callable[[], object] = lambda: None
    warm_ups: int = 1
    flops: float = 0.0
    arithmetic: float | None = None
    tokens: int = 0


def seconds_of(run: Callable[[], object], device: str) -> float:
    """From an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def peak_gib(run: Callable[[], object], is_cuda: bool) -> float:
    """Most memory of the allocator above what stood before; not known on a CPU here."""
    if not is_cuda:
        run()
        return float("nan")
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def race(session: Session, contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Contenders take turns; what fails is left out with its error, and the rest goes on."""
    result: dict[str, dict[str, Any]] = {}
    taken: dict[str, list[float]] = {}
    for name, one in contenders.items():
        try:
            one.ready()
            for _ in range(one.warm_ups - 1):
                one.run()
            result[name] = {"peak_gib": peak_gib(one.run, session.is_cuda)}
            taken[name] = []
        except Exception as error:  # out of memory, a library's refusal
            print(f"   {name}: {first_line(error)}", flush=True)
            result[name] = {"error": first_line(error)}
            free(session)
    for number in range(rounds):
        for name in list(taken) if number % 2 == 0 else list(reversed(taken)):
            contenders[name].ready()
            taken[name].append(seconds_of(contenders[name].run, session.device))
        if session.left < 0:
            break
    base = next(iter(contenders))
    for name, seconds in taken.items():
        one, found = contenders[name], result[name]
        found["seconds"] = statistics.median(seconds)
        found["rounds"] = len(seconds)
        if base in taken:
            ratios = [first / own for first, own in zip(taken[base], seconds, strict=True)]
            found["factor"], found["range"] = statistics.median(ratios), [min(ratios), max(ratios)]
        found["arithmetic"] = one.arithmetic
        found["mfu"] = one.flops / found["seconds"] / session.peak if session.peak else None
        found["tokens_per_second"] = one.tokens / found["seconds"]
    return result


def first_line(error: BaseException) -> str:
    """Of an error, with its type."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def free(session: Session) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if session.is_cuda:
        torch.cuda.empty_cache()


def lines(measured: dict[str, dict[str, Any]], *first: Any) -> list[list[Any]]:
    """For a table."""
    rows = []
    for name, one in measured.items():
        if "error" in one:
            rows.append([*first, name, one["error"], "", "", "", "", "", ""])
            continue
        factor = f"{one['factor']:.2f} ({one['range'][0]:.2f}-{one['range'][1]:.2f})" if "factor" in one else ""
        arithmetic = "" if one["arithmetic"] is None else one["arithmetic"]
        rows.append([*first, name, one["seconds"], factor, arithmetic, one["mfu"], one["tokens_per_second"],
                     one["peak_gib"], one["rounds"]])  # fmt: skip
    return rows


HEADINGS = ("what", "s", "factor (range)", "arithmetic", "MFU", "tokens/s", "peak GiB above weights", "rounds")
