"""One of two processes of a diffu-GRPO stage with a fault.

`python -m tests.end_to_end.faulty_worker FOLDER FAULT`: `not_finite` (one place on one process at a time, and a process
that is slow once), `raise` (the second process's judge), `die` (the second process), `signal` (SIGUSR1 for the second
process alone while it looks at its validation rows), `none`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from d1lit.app import task_evaluator
from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import make_stage
from d1lit.app.trainer import make_trainer
from d1lit.callbacks import SkipNonFinite
from d1lit.modules import DiffuGRPO
from d1lit.processes import join_world, world
from d1lit.quiet import quiet_libraries
from d1lit.recipes import StageFolder, run_stage
from d1lit.rewards.parts import RewardParts
from d1lit.stopping import StopFlag
from tests.end_to_end.distributed_worker import GRPO, Wordy

PLACES = ("loss_nan", "loss_inf", "one_gradient", "logprob", "old_logprob", "ref_logprob", "reward")
INNER = 2
CASES = [(place, rank) for place in PLACES for rank in range(2)]
ROLLOUTS = {2 * i + 1: case for i, case in enumerate(CASES)}
"""Every other rollout has a fault: place and process."""
NUM_UPDATES = INNER * (2 * len(CASES) + 1)


def bad_steps() -> list[int]:
    """Optimizer steps that must not happen: a reward spoils both inner updates, an old log-prob the second alone."""
    hit = {"reward": (0, 1), "old_logprob": (1,)}
    return [INNER * rollout + i for rollout, (place, _) in ROLLOUTS.items() for i in hit.get(place, (0,))]


SLOW_ROLLOUT, SLOW_SECONDS = 2, 4.0
FEW_UPDATES, LAST_ROLLOUT = 8, 2
"""Of a run that ends within its third rollout."""


class Ending(DiffuGRPO):
    """The method itself, whose second process does not live to see the end."""

    fault = "none"

    def note(self) -> None:
        """When it happened."""
        Path(sys.argv[1], "failed_at").write_text(str(time.time()))

    def update(self, experience: Any, inner: int, num_micro: int) -> Tensor:
        """Die within the cycle."""
        if self.fault == "die" and self.global_rank == 1 and (experience.step, inner) == (LAST_ROLLOUT, 1):
            self.note()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().update(experience, inner, num_micro)

    def collect(self, prompts: Any, step: int, num_micro: int, *more: Any) -> Any:
        """Fail where answers are judged."""
        if self.fault == "raise" and self.global_rank == 1 and step == LAST_ROLLOUT:
            self.note()
            raise ArithmeticError("the judge of process 1 has lost its mind")
        return super().collect(prompts, step, num_micro, *more)


class Faulty(DiffuGRPO):
    """The method itself, with what a broken kernel, judge or network would put into it."""

    def _place(self, step: int) -> str:
        place, rank = ROLLOUTS.get(step, ("", 0))
        return place if rank == self.global_rank else ""

    def collect(self, prompts: Any, step: int, num_micro: int, *more: Any) -> Any:
        """Rewards, old and reference log-probs are broken after they were computed."""
        if step == SLOW_ROLLOUT and self.global_rank == 1:
            time.sleep(SLOW_SECONDS)
        experience = super().collect(prompts, step, num_micro, *more)
        if self._place(step) == "reward":
            experience[0] = replace(experience[0], rewards=experience[0].rewards * torch.nan)
        for name in ("old", "ref"):
            if self._place(step) == f"{name}_logprob":
                entries = [spoilt(e, float("-inf" if name == "old" else "nan")) for e in getattr(experience[0], name)]
                entries = entries if name == "old" else [entries[0], experience[0].ref[1]]
                experience[0] = replace(experience[0], **{name: tuple(entries)})
        return experience

    def update(self, experience: Any, inner: int, num_micro: int) -> Tensor:
        """The loss is broken after it was computed; a log-prob on the way to it."""
        place = self._place(experience.step) if inner == 0 else ""
        if place == "logprob":
            real = self._likelihood

            def likelihood(*args: Any) -> Any:
                found, scores = real(*args)
                return replace(found, value=torch.where(found.weight > 0, torch.inf, found.value)), scores

            self._likelihood = likelihood  # type: ignore[method-assign]
            loss = super().update(experience, inner, num_micro)
            del self._likelihood
            return loss
        loss = super().update(experience, inner, num_micro)
        if place == "loss_nan":
            return loss * torch.nan
        return loss + torch.tensor(torch.inf) if place == "loss_inf" else loss  # its gradient looks healthy

    def on_after_backward(self) -> None:
        """One number of one gradient."""
        super().on_after_backward()
        step, inner = divmod(self.trainer.global_step, INNER)
        if inner == 0 and self._place(step) == "one_gradient":
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            gradients[-1].view(-1)[0] = torch.nan


def spoilt(logprobs: Any, value: float) -> Any:
    """The first row's log-probs."""
    if logprobs is None:
        return None
    changed = logprobs.value.clone()
    changed[0] = value
    return replace(logprobs, value=changed)


class Watch(L.Callback):
    """Which steps moved a weight or the optimizer's state."""

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.state_moved: list[bool] = []
        self._before: tuple[list[Tensor], list[Tensor]] = ([], [])

    def _now(self, trainer: L.Trainer) -> tuple[list[Tensor], list[Tensor]]:
        (optimizer,) = trainer.optimizers
        state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        weights = [p.detach().clone() for p in trainer.lightning_module.parameters() if p.requires_grad]
        return weights, [value.clone() for value in state]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Before the step."""
        self._before = self._now(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """After it."""
        for before, now, moved in zip(self._before, self._now(trainer), (self.moved, self.state_moved), strict=True):
            alike = len(before) == len(now) and all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
            moved.append(not alike)


def signalled(evaluate: Any, *args: Any, **settings: Any) -> Any:
    """The second process is asked to stop before its first row."""
    if world().rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return evaluate(*args, **settings)


def main(folder: Path, fault: str) -> None:
    """Train, and write down what happened."""
    quiet_libraries()
    torch.set_num_threads(1)
    join_world("cpu")
    updates = NUM_UPDATES if fault == "not_finite" else FEW_UPDATES
    words = [*GRPO, "scale.grpo.micro_batch_size=2", f"scale.grpo.max_updates={updates}"]
    words += [f"stages.grpo.module.num_inner_updates={INNER}", "callbacks.alarms=null"]
    words.append("callbacks.save=null" if fault == "not_finite" else "callbacks.save.every_n_steps=1")
    if fault == "signal":
        words += ["task.val_rows=4", "scale.grpo.validate_every=3", "scale.evaluation.batch_size=1"]
        task_evaluator.evaluate = partial(signalled, task_evaluator.evaluate)
    Ending.fault = fault
    (config,) = compose_jobs("train", words).configs
    plan = plan_run(config)
    (parts,) = plan.stages
    assert isinstance(parts.module, partial)
    reward = RewardParts({"wordy": Wordy()}, {"wordy": 1.0})
    parts = replace(
        parts,
        module=partial(Faulty if fault == "not_finite" else Ending, **{**parts.module.keywords, "reward": reward}),
    )
    policy, tokenizer = plan.make_policy()
    watch, guards, flag = Watch(), [], StopFlag()

    def trainer(*arguments: Any) -> L.Trainer:
        made = make_trainer(plan, flag, tokenizer, *arguments)
        made.callbacks.append(watch)  # pyright: ignore[reportAttributeAccessIssue]
        guards.extend(c for c in made.callbacks if isinstance(c, SkipNonFinite))  # pyright: ignore
        return made

    final = run_stage(
        StageFolder(folder / "stage"),
        policy,
        make_stage(plan, parts, tokenizer, trainer),
        plan.seed,
        print,
    )
    record = {
        "moved": watch.moved,
        "state_moved": watch.state_moved,
        "skipped": guards[0].skipped,
        "weights": [p.tolist() for p in final.parameters() if p.requires_grad],
    }
    (folder / f"{world().rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
