"""Losses of twenty updates of three recipes, to the last bit: what nobody meant to change shows here."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import torch

from d1lit.report.events import read_scalars
from tests.end_to_end.served import Server
from tests.faults.jobs import EARNS, SMALL

FOLDER = Path(__file__).resolve().parents[1] / "golden_losses"
UPDATES = 20
RECIPES = {
    "pretrain": ("recipe=pretrain", f"scale.base.max_updates={UPDATES}", "scale.base.num_rows=80"),
    "sft": ("recipe=sft", f"stages.sft.max_updates={UPDATES}", "stages.sft.micro_batch_size=2"),
    "grpo": (
        "recipe=grpo",
        f"stages.grpo.max_updates={UPDATES}",
        "stages.grpo.module.num_inner_updates=2",
        "model.tiny.init_std=0.3",
        "loss.beta=0.04",
        *EARNS,
        "stages.grpo.optimizer.lr=0.003",
    ),
}
TAGS = ("train/loss", "train/kl", "rollout/reward", "rollout/entropy")


def machine() -> str:
    """What bits depend on: library, vector instructions, and the processor, by whose model products are arranged."""
    version = torch.__version__.split("+")[0]
    return f"torch {version} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {processor()}"


def processor() -> str:
    """Maker, family and model, where Linux tells them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return "/".join(facts.get(key, "?") for key in ("vendor_id", "cpu family", "model"))


def apart(one: str, other: str) -> float:
    """The largest difference of two records' values, in units of 1 + |value|; infinite where they name other scalars."""
    rows = [[line.rsplit(" ", 1) for line in text.splitlines()[1:]] for text in (one, other)]
    if [name for name, _ in rows[0]] != [name for name, _ in rows[1]]:
        return float("inf")
    pairs = [(float(a), float(b)) for (_, a), (_, b) in zip(*rows, strict=True)]
    return max(abs(a - b) / (1 + abs(a)) for a, b in pairs)


def measured(server: Server, recipe: str) -> str:
    """The lines of a recipe's file: a scalar's name, a step, and the value as it is read back exactly."""
    with tempfile.TemporaryDirectory(prefix="d1lit-losses-") as name:
        words = (*SMALL, *RECIPES[recipe], f"run_dir={name}/run")
        log = Path(name) / "log"
        assert server.run(words, log) == 0, log.read_text()
        scalars = read_scalars(Path(name) / "run" / "logs" / ("base" if recipe == "pretrain" else recipe))
    lines = [f"{tag} {step} {value!r}" for tag in TAGS for step, value in scalars.get(tag, [])]
    return "\n".join([machine(), *lines]) + "\n"


def stored(recipe: str) -> str:
    """What was written down."""
    return (FOLDER / f"{recipe}.txt").read_text()


def write() -> None:
    """Write all files anew: after a change that is meant, and that stands under Numerics in CHANGELOG.md."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="d1lit-losses-") as name:
        server = Server(Path(name) / "cache")
        for recipe in RECIPES:
            (FOLDER / f"{recipe}.txt").write_text(measured(server, recipe))
        server.close()
