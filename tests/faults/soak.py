"""Many short updates in one process: what grows would grow for ever."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch

from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import make_stage
from d1lit.app.trainer import make_trainer
from d1lit.quiet import quiet_libraries
from d1lit.recipes import StageFolder, run_stage
from d1lit.stopping import StopFlag
from tests.faults.jobs import EARNS, SMALL

SETTLED = 0.2
"""Share of the steps before growth is measured: caches fill, allocators find their size."""
SAMPLES = 200


@dataclass(frozen=True)
class Growth:
    """What a long run did to its process."""

    steps: int
    mb_per_1000_steps: float
    """Slope of resident memory by least squares, over the settled part."""
    first_mb: float
    last_mb: float
    more_files: int
    """Open files at the end beyond those when it had settled."""
    more_threads: int
    zombies: int

    def line(self) -> str:
        """In words."""
        return (
            f"{self.steps} steps: resident memory {self.first_mb:.0f} to {self.last_mb:.0f} MB, "
            f"{self.mb_per_1000_steps:+.3f} MB per 1,000 steps; {self.more_files:+d} open files, "
            f"{self.more_threads:+d} threads, {self.zombies} zombies"
        )


class Gauge(L.Callback):
    """Looks at the process now and then."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.rows: list[tuple[int, float, int, int]] = []
        """Step, resident MB, open files, threads."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """A row."""
        step = trainer.global_step
        if step % self.every == 0 and (not self.rows or self.rows[-1][0] != step):
            gc.collect()
            p = self.process
            self.rows.append((step, p.memory_info().rss / 2**20, p.num_fds(), p.num_threads()))


def growth(steps: int) -> Growth:
    """A diffu-GRPO stage of so many updates, with everything a run has: rewards, guards, logs, samples, saves, looks."""
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="d1lit-soak-") as name:
        words = [
            "recipe=grpo",
            *(word for word in SMALL if not word.startswith(("debug", "evaluation", "report"))),
            "scale.grpo={batch_size:2,micro_batch_size:2,group_size:2}",
            f"scale.grpo.max_updates={steps}",
            *EARNS,
            "stages.grpo.module.num_inner_updates=2",
            f"stages.grpo.validate_every={max(2, steps // 20)}",
            f"callbacks.save.every_n_steps={max(2, steps // 40)}",
            f"callbacks.samples.every_n_steps={max(2, steps // 40)}",
            f"run_dir={name}",
        ]
        (config,) = compose_jobs("train", words).configs
        plan = plan_run(config)
        (parts,) = plan.stages
        policy, tokenizer = plan.make_policy()
        gauge = Gauge(max(1, steps // SAMPLES))

        def trainer(*arguments: Any) -> L.Trainer:
            made = make_trainer(plan, StopFlag(), tokenizer, *arguments)
            made.callbacks.append(gauge)  # pyright: ignore[reportAttributeAccessIssue]
            return made

        stage = make_stage(plan, parts, tokenizer, trainer)
        run_stage(StageFolder(Path(name) / "stages" / "grpo"), policy, stage, plan.seed, print)
    return measured(gauge.rows, steps)


def measured(rows: list[tuple[int, float, int, int]], steps: int) -> Growth:
    """Slope and differences over the settled part."""
    settled = [row for row in rows if row[0] >= SETTLED * steps]
    x = torch.tensor([row[0] for row in settled], dtype=torch.float64)
    y = torch.tensor([row[1] for row in settled], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    first, last = settled[0], settled[-1]
    children = psutil.Process().children(recursive=True)
    zombies = sum(child.status() == psutil.STATUS_ZOMBIE for child in children)
    return Growth(steps, 1000 * slope, first[1], last[1], last[2] - first[2], last[3] - first[3], zombies)
