"""The runs that faults are tried on, and all that has to be equal at their end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d1lit.checkpoint import read_tree
from d1lit.report.events import read_scalars

SMALL = (
    "task=sudoku",
    "debug=fast",
    "model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}",
    "task.num_builtin={train:40,test:8}",
    "task.val_rows=4",
    "sampler.completion_length=16",
    "sampler.block_length=8",
    "sampler.num_steps=4",
    "evaluation.base=false",
    "report=false",
    "trainer.accelerator=cpu",
)
SFT = (
    "stages.sft.max_updates=10",
    "stages.sft.micro_batch_size=2",
    "stages.sft.lora={targets:all_linear,rank:2,alpha:4,dropout:0.2}",
    "stages.sft.validate_every=4",
    "stages.sft.select=best_val",
)
"""An adapter with dropout, two micro-batches an update; the weights that were best on validation rows are kept."""
EARNS = ("+reward.parts.wordy={_target_:tests.end_to_end.distributed_worker.Wordy}", "+reward.weights.wordy=1.0")
"""A reward that tells the completions of a model without any sense apart, so that its weights move."""
GRPO = (
    "stages.grpo.max_updates=12",
    "stages.grpo.micro_batch_size=1",
    "stages.grpo.module.num_inner_updates=3",
    "+stages.grpo.module.reference_sync_every=6",
    "+stages.grpo.module.reference_sync_weight=0.5",
    "stages.grpo.validate_every=4",
    "loss.beta=0.04",
    *EARNS,
    "stages.grpo.optimizer.lr=0.003",
)
"""All weights, a reference that moves, three inner updates a rollout, two micro-batches an update."""


@dataclass(frozen=True)
class Job:
    """A run of `train.py`."""

    words: tuple[str, ...]
    steps: Mapping[str, int]
    """Optimizer steps of each stage."""
    num_inner: int

    def with_saves(self, every_n_steps: int | None) -> tuple[str, ...]:
        """The command's words, with checkpoints so often."""
        return (*self.words, f"callbacks.save.every_n_steps={'null' if every_n_steps is None else every_n_steps}")


JOBS = {
    "sft": Job(("recipe=sft", *SMALL, *SFT), {"sft": 10}, 1),
    "grpo": Job(("recipe=grpo", *SMALL, *GRPO), {"grpo": 12}, 3),
    "d1": Job(("recipe=d1", *SMALL, *SFT, *GRPO), {"sft": 10, "grpo": 12}, 3),
}

DIFFERS = ("time/", "cost/mfu", "_peak_memory_mb", "cost/peak_memory_mb")
"""Scalars that no two runs share: seconds, memory, and what follows from seconds."""


@dataclass(frozen=True)
class Ending:
    """All that has to be equal, to the last bit."""

    weights: dict[str, bytes]
    """The files of every stage's weights and of the final model."""
    checkpoints: dict[str, Any]
    """Each stage's last checkpoint: weights, optimizer, schedule, counters, callbacks, experience."""
    scalars: dict[str, dict[str, list[tuple[int, float]]]]
    samples: list[dict[str, Any]]
    evaluations: Any


def ending(folder: Path, job: Job) -> Ending:
    """What a finished run left."""
    scalars = {}
    for stage in job.steps:
        found = read_scalars(folder / "logs" / stage)
        scalars[stage] = {tag: points for tag, points in found.items() if not any(word in tag for word in DIFFERS)}
    models = [folder / "model", *(folder / "stages" / stage / "model" for stage in job.steps)]
    samples = folder / "samples.jsonl"
    return Ending(
        {str(f.relative_to(folder)): f.read_bytes() for model in models for f in sorted(model.glob("*.safetensors"))},
        {
            stage: flat(read_tree(folder / "stages" / stage / "checkpoints" / f"step_{steps}")[0])
            for stage, steps in job.steps.items()
        },
        scalars,
        [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else [],
        json.loads((folder / "results.json").read_text())["evaluations"],
    )


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint by its path, tensors as bytes; seconds and memory are left out."""
    if isinstance(tree, Mapping):
        items = [(f"{name}/{key}", value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(f"{name}/{i}", value) for i, value in enumerate(tree)]
    elif isinstance(tree, torch.Tensor):
        raw = tree.detach().contiguous().reshape(-1).view(torch.uint8)
        return {name: (tuple(tree.shape), str(tree.dtype), bytes(raw.numpy()))}
    else:
        return {name: repr(tree)}
    kept = [(key, value) for key, value in items if not key.endswith(("/seconds", "/peak_memory_mb"))]
    return {key: value for item, inner in kept for key, value in flat(inner, item).items()}


def check_same(found: Ending, reference: Ending) -> None:
    """Equal, and no step twice.

    Raises:
        AssertionError: naming the first thing that differs.
    """
    for stage, scalars in found.scalars.items():
        assert {"train/loss", "val/accuracy"} <= scalars.keys(), sorted(scalars)
        assert any(value for _, value in scalars["train/loss"]), f"{stage} learns nothing, so nothing could differ"
        for tag, points in scalars.items():
            steps = [step for step, _ in points]
            assert len(set(steps)) == len(steps), f"{stage}: {tag} has a step twice: {steps}"
            assert points == reference.scalars[stage].get(tag), f"{stage}: {tag}"
        assert scalars.keys() == reference.scalars[stage].keys()
        mine, other = found.checkpoints[stage], reference.checkpoints[stage]
        assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
        different = [name for name in mine if mine[name] != other[name]]
        assert not different, f"{stage}: {different}"
    assert found.weights == reference.weights
    assert found.samples == reference.samples
    assert found.evaluations == reference.evaluations
