"""A small training run to be killed: starts once, then forks a fresh run for every line it reads.

Two micro-batches an optimizer step, two inner updates a rollout, a validation every three steps: every kind of moment
at which a run can be interrupted. Line in: {"folder": ..., "sleep": seconds a network pass, ...}. Lines out: the pid of
the run, later its exit code. A finished run leaves `final.json` with the hashes of weights and optimizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.callbacks.signals import StopOnSignal
from d1lit.callbacks.validation import Validate
from d1lit.checkpoint import FolderCheckpointIO, lock_run, newest, read_facts
from d1lit.data import batch_loader
from d1lit.draws import CounterDraws
from d1lit.stopping import requeued

MICRO, INNER, STEPS, VALIDATE_EVERY = 2, 2, 24, 3
ROWS, LENGTH, VOCABULARY = 4, 6, 16


class At:
    """Sends a signal to the own process, and a second one shortly after, at the n-th visit of a named moment."""

    def __init__(self, moment: str, visit: int, signum: int) -> None:
        self.moment, self.left, self.signum = moment, visit, signum

    def __call__(self, moment: str) -> None:
        """Here is such a moment."""
        if moment == self.moment:
            self.left -= 1
            if self.left in (0, -1):
                os.kill(os.getpid(), self.signum)


class ScalarLines(Logger):
    """Scalars as lines of JSON, buffered until `save`; on resume the lines of unsaved steps are cut off."""

    def __init__(self, path: Path, next_step: int) -> None:
        super().__init__()
        self.path = path
        self.lines: list[str] = []
        if path.exists() and next_step < STEPS:  # a finished run will write nothing again
            kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] < next_step]
            cut = path.with_suffix(".cut")  # a kill may come between truncating a file and filling it
            cut.write_text("".join(kept))
            cut.replace(path)

    name = version = property(lambda self: None)  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep until the next `save`."""
        self.lines.append(json.dumps({"step": step} | {k: v for k, v in metrics.items() if k != "epoch"}) + "\n")

    def save(self) -> None:
        """Append and flush."""
        with self.path.open("a") as file:
            file.writelines(self.lines)
            file.flush()
            os.fsync(file.fileno())
        self.lines = []

    def finalize(self, status: str) -> None:
        """Nothing: a killed run has no last word either."""


class Cycles(L.LightningModule):
    """Learns what it sampled itself: rollout, two inner updates of two micro-batches, as diffu-GRPO does it."""

    def __init__(self, sleep: float, here: Callable[[str], None]) -> None:
        super().__init__()
        self.sleep = sleep
        self.at = here
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.draws = CounterDraws(7)
        self.experience: list[torch.Tensor] = []

    def here(self, moment: str) -> None:
        """A moment of the last rank (the only one, mostly)."""
        if self.global_rank == self.trainer.world_size - 1:
            self.at(moment)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """One pass of the network."""
        time.sleep(self.sleep)
        return self.head(torch.tanh(self.table(ids)))

    @torch.no_grad()
    def rollout(self, step: int, rows: torch.Tensor) -> torch.Tensor:
        """One token after the other."""
        ids = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
        for place in range(1, LENGTH):
            self.here("rollout")
            noise = -torch.log(-torch.log(self.draws.at(step=step).uniform("sample", rows, (VOCABULARY,), place)))
            ids[:, place] = (self.logits(ids)[:, place - 1] + noise).argmax(-1)
        return ids

    def training_step(self, batch: tuple[int, int, int], batch_idx: int) -> torch.Tensor:
        """One micro-batch of one inner update."""
        step, inner, micro = batch
        if inner == 0 and micro == 0:
            self.experience = [self.rollout(step, torch.arange(ROWS) + m * ROWS) for m in range(MICRO)]
        self.here(f"inner {inner} micro {micro}")
        ids = self.experience[micro]
        weight = self.draws.at(step=step, inner=inner).uniform("weight", torch.arange(ROWS), (1,))
        losses = nn.functional.cross_entropy(self.logits(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weight).mean()
        self.log("train/loss", loss)
        return loss

    @property
    def policy(self) -> Cycles:
        """What is validated."""
        return self

    @torch.no_grad()
    def measure(self, policy: Any) -> dict[str, float]:
        """Numbers that depend on the weights alone, in four passes."""
        ids = torch.arange(VOCABULARY)
        losses = []
        for shift in range(4):
            self.here("validation")
            losses.append(float(nn.functional.cross_entropy(self.logits(ids), ids.roll(shift))))
        return {"accuracy": -sum(losses), "loss": sum(losses)}

    def configure_optimizers(self) -> Any:
        """Adam keeps state, the schedule counts."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The experience is state."""
        self.here("save")
        checkpoint["experience"] = self.experience

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back."""
        self.experience = checkpoint["experience"]


class Batches(torch.utils.data.Dataset):
    """(rollout, inner, micro) of every batch, inner-major."""

    def __len__(self) -> int:
        return STEPS * MICRO

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        step, micro = divmod(index, MICRO)
        return step // INNER, step % INNER, micro


def sha256(tree: Any) -> str:
    """Of every bit in a state dict, in order."""
    digest = hashlib.sha256()

    def feed(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            digest.update(node.detach().contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key, item in node.items():
                digest.update(repr(key).encode())
                feed(item)
        elif isinstance(node, (list, tuple)):
            for item in node:
                feed(item)
        else:
            digest.update(repr(node).encode())

    feed(tree)
    return digest.hexdigest()


def watch_fsync(here: Callable[[str], None]) -> None:
    """Make every flush to the disk a moment: most of them are those of a save."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        here("fsync")
        real(descriptor)

    os.fsync = fsync


def run(
    folder: Path,
    sleep: float = 0.0,
    every_n_steps: int | None = 2,
    every_n_minutes: float | None = None,
    at: tuple[str, int, int] | None = None,
    environment: dict[str, str] | None = None,
    max_file_bytes: int | None = None,
    ranks: int = 1,
) -> None:
    """Train to the end, from wherever the folder says."""
    torch.set_num_threads(1)
    os.environ |= environment or {}
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    with requeued(), lock_run(folder):
        checkpoints = folder / "stages" / "only" / "checkpoints"
        checkpoint, refused = newest(checkpoints)
        done = read_facts(checkpoint)["step"] if checkpoint is not None else 0
        with (folder / "starts.txt").open("a") as file:
            file.write(f"{done} {len(refused)}\n")
        saver = SaveCheckpoints(checkpoints, every_n_steps, every_n_minutes)
        module = Cycles(sleep, At(*at) if at is not None else lambda moment: None)
        watch_fsync(module.at)
        trainer = L.Trainer(
            max_steps=STEPS,
            accumulate_grad_batches=MICRO,
            max_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=ScalarLines(folder / "scalars.jsonl", done),
            callbacks=[saver, Validate(module.measure, None, VALIDATE_EVERY), StopOnSignal()],
            plugins=[FolderCheckpointIO()],
            accelerator="cpu",
            devices=ranks,
            strategy="ddp_fork" if ranks > 1 else "auto",
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        loader = batch_loader(Batches(), STEPS * MICRO, done * MICRO)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        for logger in trainer.loggers:
            logger.save()
        final = {
            "weights": sha256(dict(module.state_dict())),
            "optimizer": sha256(trainer.optimizers[0].state_dict()),
            "schedule": sha256(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
            "step": trainer.global_step,
        }
        (folder / "final.json").write_text(json.dumps(final))


def main() -> None:
    """Serve runs until the input ends."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run(Path(request.pop("folder")), **request)
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
