"""Killed at arbitrary moments and started again by the same command, a run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from d1lit.report.events import read_scalars
from tests.end_to_end.served import Server

pytestmark = pytest.mark.slow

# SFT of an adapter with dropout, merged; then RL of all weights with a reference, three inner updates a rollout.
WORDS = [
    "recipe=d1",
    "task=sudoku",
    "debug=fast",
    "model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}",
    "stages.sft.max_updates=5",
    "stages.sft.micro_batch_size=2",
    "stages.sft.lora={targets:all_linear,rank:2,alpha:4,dropout:0.2}",
    "stages.grpo.max_updates=7",
    "stages.grpo.micro_batch_size=1",
    "stages.grpo.module.num_inner_updates=3",
    "sampler.completion_length=16",
    "sampler.block_length=8",
    "sampler.num_steps=4",
    "loss.beta=0.04",
    "reward.weights.givens_kept=0.5",
    "callbacks.save.every_n_steps=1",
    "evaluation.base=false",
]
STAGES = {"sft": 5, "grpo": 7}
DIFFERS = ("time/", "cost/mfu", "_peak_memory_mb", "cost/peak_memory_mb")
"""Scalars that no two runs share: seconds and memory."""


@dataclass(frozen=True)
class Ending:
    """All that has to be equal, to the last bit."""

    weights: dict[str, bytes]
    checkpoints: dict[str, bytes]
    """Tensors of each stage's last checkpoint: weights, optimizer, experience."""
    scalars: dict[str, dict[str, list[tuple[int, float]]]]
    evaluations: Any


def ending(folder: Path) -> Ending:
    """What a finished run left."""
    scalars = {}
    for stage in STAGES:
        found = read_scalars(folder / "logs" / stage)
        scalars[stage] = {tag: points for tag, points in found.items() if not any(word in tag for word in DIFFERS)}
    models = [folder / "model", *(folder / "stages" / stage / "model" for stage in STAGES)]
    return Ending(
        {str(f.relative_to(folder)): f.read_bytes() for model in models for f in sorted(model.glob("*.safetensors"))},
        {
            f"{stage}/{file.name}": file.read_bytes()
            for stage, steps in STAGES.items()
            for file in sorted((folder / "stages" / stage / "checkpoints" / f"step_{steps}").glob("*.safetensors"))
        },
        scalars,
        json.loads((folder / "results.json").read_text())["evaluations"],
    )


def check_same(found: Ending, reference: Ending) -> None:
    """Equal, and no step twice."""
    for stage, scalars in found.scalars.items():
        assert {"train/loss"} <= scalars.keys()
        for tag, points in scalars.items():
            steps = [step for step, _ in points]
            assert len(set(steps)) == len(steps), (stage, tag)
            assert points == reference.scalars[stage].get(tag), (stage, tag)
    assert found.scalars == reference.scalars
    assert found.weights == reference.weights
    assert found.checkpoints == reference.checkpoints
    assert found.evaluations == reference.evaluations


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    served = Server(tmp_path_factory.mktemp("cache"))
    yield served
    served.close()


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody killed."""

    ending: Ending
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    first = server.run([*WORDS, f"run_dir={folder / 'first'}"], folder / "first.log")
    assert first == 0, (folder / "first.log").read_text()
    started = time.monotonic()
    assert server.run([*WORDS, f"run_dir={folder / 'run'}"], folder / "run.log") == 0
    seconds = time.monotonic() - started
    found = ending(folder / "run")
    check_same(ending(folder / "first"), found)  # twice the same, before any kill is asked for
    assert len(found.weights) == 3
    assert {stage: len(scalars["train/loss"]) for stage, scalars in found.scalars.items()} == STAGES
    return Undisturbed(found, seconds)


def test_killed_at_optimizer_steps(server, undisturbed, tmp_path):
    """After the third step of SFT, and after the second of RL: the middle of a cycle of three inner updates."""
    words, log = [*WORDS, f"run_dir={tmp_path / 'run'}"], tmp_path / "log"
    for stage, step in (("sft", 3), ("grpo", 2)):
        pid = server.start(words, log)
        checkpoint = tmp_path / "run" / "stages" / stage / "checkpoints" / f"step_{step}"
        while not checkpoint.exists():
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, log.read_text()
        assert not (tmp_path / "run" / "stages" / stage / "model").exists()
    assert server.run(words, log) == 0, log.read_text()
    text = log.read_text()
    assert "sft: goes on from step_3" in text or "sft: goes on from step_4" in text
    assert "grpo: goes on from step_" in text
    check_same(ending(tmp_path / "run"), undisturbed.ending)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(server, undisturbed, tmp_path):
    rng, kills, runs = random.Random(11), 0, 0
    while kills < 50:
        folder, log = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        words = [*WORDS, f"run_dir={folder}"]
        for _ in range(12):  # then let it end
            pid = server.start(words, log)
            time.sleep(rng.uniform(0.0, undisturbed.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = server.wait()
            assert status in (0, -signal.SIGKILL), log.read_text()
            kills += status != 0
            if status == 0:
                break
        assert server.run(words, log) == 0, log.read_text()
        check_same(ending(folder), undisturbed.ending)
        runs += 1
    print(f"{kills} kills in {runs} runs: all ended bit-identical")
