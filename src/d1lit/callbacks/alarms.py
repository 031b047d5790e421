"""Collapse is noticed while it begins: alarms on logged numbers, and the way back to weights that were still good."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.callbacks.validation import Validate
from d1lit.checkpoint import FolderCheckpointIO, list_checkpoints, verify
from d1lit.errors import RunError

_KEY = "callbacks.alarms.alarms"
Action = Literal["warn", "stop", "rollback"]
ACTIONS = ("warn", "stop", "rollback")
OF_ROLLOUTS = ("rollout/", "reward/")
"""Numbers of a rollout, which are logged again at each of its inner updates."""
OF_LOOKS = "val/"
"""Numbers of a look at the validation rows, which stand until the next look."""
_ABSENT = 30
"""Values that would have come meanwhile (the rarest numbers come with every tenth rollout) until an alarm whose number
is not logged keeps no checkpoint any more."""
_NOT_IN_EVERY_STAGE = ("rollout", "reward", "val")


@dataclass(frozen=True)
class Alarm:
    """A logged number and the bound it should keep.

    Args:
        metric: name under which it is logged ("rollout/zero_std_fraction").
        action: warn: one line; stop: end the run after this step with an error that says why; rollback: take weights
            and optimizer from the last checkpoint that is not after the weights which kept the bound last, and go on
            with the next data.
        above: alarm when the number is greater.
        below: alarm when it is less.
        drop: alarm when it lies this much below its running mean.
        ratio: alarm when it is more than this many times its running mean.
        patience: values in a row that break the bound before the alarm sounds: steps; rollouts where the number is one
            of a rollout ("rollout/...", "reward/..."); looks where it is one of validation rows ("val/...").
        memory: weight of the past in the running mean, per value.
        warmup: values before drop and ratio are looked at.
        optional: say nothing where the stage logs no such number.
    """

    metric: str
    action: Action = "warn"
    above: float | None = None
    below: float | None = None
    drop: float | None = None
    ratio: float | None = None
    patience: int = 1
    memory: float = 0.9
    warmup: int = 10
    optional: bool = False

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            choices = f"must be one of {', '.join(ACTIONS)}, got {self.action!r}"
            raise ValueError(f"{_KEY}: action of the alarm on {self.metric} {choices}. Try: warn [E202]")
        if all(bound is None for bound in (self.above, self.below, self.drop, self.ratio)):
            raise ValueError(
                f"{_KEY}: the alarm on {self.metric} has no bound. Try: above, below, drop or ratio [E202]"
            )
        if self.patience < 1 or not 0 <= self.memory < 1:
            what = f"the alarm on {self.metric} needs patience >= 1 and 0 <= memory < 1"
            raise ValueError(f"{_KEY}: {what}. Try: 1 and 0.9 [E202]")

    def broken(self, value: float, mean: float, count: int) -> str | None:
        """Which bound the value breaks, given the running mean of `count` earlier ones."""
        if not math.isfinite(value):
            return "is not finite"
        if self.above is not None and value > self.above:
            return f"is above {self.above:g}"
        if self.below is not None and value < self.below:
            return f"is below {self.below:g}"
        if count < self.warmup:
            return None
        if self.drop is not None and value < mean - self.drop:
            return f"is more than {self.drop:g} below its running mean {mean:.4g}"
        if self.ratio is not None and value > self.ratio * mean:
            return f"is more than {self.ratio:g} times its running mean {mean:.4g}"
        return None


class CollapseAlarms(L.Callback):
    """Watches logged numbers for the ways a policy collapses: groups agree, reward falls, length or KL runs away.

    Each alarm sees the metric once an optimizer step, a number of rollouts once a rollout and one of validation rows
    once a look, where it was logged. The first process decides for all. An alarm speaks when it begins, again when it
    has lasted twice, four times, eight times as long, and when it is over; it acts every `patience` values.

    Rolling back does not turn the clock back: data, draws and learning rate are functions of the step, so the same
    steps would end the same way. Weights and optimizer state return to what they were, and the run goes on past the
    data it collapsed on, from its next rollout. `guard/rollbacks` counts. The newest checkpoint that each such alarm
    could go back to is kept beside the latest ones.

    Args:
        alarms: what to watch.
        max_rollbacks: the next alarm that asks for one more ends the run.
    """

    def __init__(self, alarms: Iterable[Alarm], max_rollbacks: int = 3) -> None:
        self.alarms = tuple(dict.fromkeys(alarms))
        self.max_rollbacks = max_rollbacks
        self.rollbacks = 0
        # By what the alarm is, not by its place: under resume=force a run may go on with others beside it.
        self._state = {str(alarm): {"mean": 0.0, "count": 0, "in_a_row": 0, "good": None} for alarm in self.alarms}
        """Running mean, values in it, values in a row that broke the bound, and the step of the weights that kept it
        last."""
        self._step = -1
        self._inner = 0
        """Which inner update of its rollout the step under way is."""
        self._look_seen: int | None = 0
        """The step of the last look at the validation rows whose numbers were seen."""
        self._known: set[str] = set()
        """Metrics whose absence has been looked into."""
        self._absent = {alarm.metric: 0 for alarm in self.alarms}
        """Values of each metric that have not come, in a row."""
        self._due: tuple[int | None, str] | None = None
        """A rollback that waits for the next rollout: the step of the last good weights, and why."""

    @override
    def state_dict(self) -> dict[str, Any]:
        """Running means go on after a resume."""
        state = {key: dict(value) for key, value in self._state.items()}
        return {"state": state, "rollbacks": self.rollbacks, "due": self._due}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the running means up, of the alarms that are still the same."""
        self._take_means(state_dict)
        self.rollbacks, self._due = state_dict["rollbacks"], state_dict["due"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See whether there will be something to roll back to.

        Raises:
            ValueError: if an alarm asks for a rollback and no checkpoints are written.
        """
        if any(alarm.action == "rollback" for alarm in self.alarms) and _checkpoints(trainer) is None:
            raise ValueError("callbacks.alarms: rollback needs checkpoints to roll back to. Try: callbacks.save")
        self._hold_checkpoints(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the numbers of the step that has just ended (they are complete only now), and act.

        Raises:
            RunError: if an alarm with action stop sounds, or one that wants a rollback too many.
        """
        if trainer.global_step != self._step:
            first, self._step = self._step < 0, trainer.global_step
            if not first:
                self._look_at_all(trainer)
                self._hold_checkpoints(trainer)
        self._inner = getattr(batch, "inner", 0)
        starts_rollout = getattr(batch, "inner", 0) == 0 and getattr(batch, "micro", 0) == 0
        if self._due is not None and starts_rollout:
            self._roll_back(trainer, *self._due)
            self._due = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the count, where there can be one."""
        if any(alarm.action == "rollback" for alarm in self.alarms):
            pl_module.log("guard/rollbacks", float(self.rollbacks), batch_size=1)

    def _look_at_all(self, trainer: L.Trainer) -> None:
        sounded: list[tuple[int, int | None, str]] = []
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        look = next((callback.looked_at for callback in callbacks if isinstance(callback, Validate)), None)
        for i, alarm in enumerate(self.alarms):
            self._tell_of_absence(alarm, trainer.callback_metrics)
            is_old = (self._inner > 0 and alarm.metric.startswith(OF_ROLLOUTS)) or (
                look is not None and look == self._look_seen and alarm.metric.startswith(OF_LOOKS)
            )
            if is_old:
                continue
            value = trainer.callback_metrics.get(alarm.metric)
            self._absent[alarm.metric] = 0 if value is not None else self._absent[alarm.metric] + 1
            if value is None:
                continue
            state = self._state[str(alarm)]
            message = self._look(alarm, state, float(value), trainer.global_step)
            sounded += [(i, state["good"], message)] if message else []
        self._look_seen = look
        if any(alarm.action != "warn" for alarm in self.alarms):
            sounded = trainer.strategy.broadcast(sounded)  # metrics are logged in the first process alone
        for i, good, message in sounded:
            if self.alarms[i].action == "stop":
                raise RunError(_KEY, message, "the curve, and the checkpoints before it in the stage's folder", "E702")
            if self.alarms[i].action == "rollback" and self._due is None:
                self._due = (good, message)

    def _look(self, alarm: Alarm, state: dict[str, Any], value: float, step: int) -> str | None:
        """Why the alarm has to act, if it has to; what there is to say is said."""
        reason = alarm.broken(value, state["mean"], state["count"])
        before = state["in_a_row"]
        state["in_a_row"] = before + 1 if reason else 0
        if math.isfinite(value):
            state["count"] += 1
            weight = max(1 / state["count"], 1 - alarm.memory)  # a plain mean at first, then an exponential one
            state["mean"] += weight * (value - state["mean"])
        if reason is None:
            state["good"] = step - 1  # the number is of the weights that the step began with
            if before >= alarm.patience:
                rank_zero_warn(f"step {step}: {alarm.metric} = {value:.4g} keeps its bound again ({before} did not)")
            return None
        lasted, rest = divmod(state["in_a_row"], alarm.patience)
        if rest:
            return None
        message = f"alarm at step {step}: {alarm.metric} = {value:.4g} {reason} ({state['in_a_row']} in a row)"
        if lasted & (lasted - 1) == 0:
            rank_zero_warn(message)
        return message

    def _tell_of_absence(self, alarm: Alarm, logged: Mapping[str, Any]) -> None:
        """Once: an alarm on a number that is not there, though others of its kind are, would never sound."""
        kind = alarm.metric.split("/")[0]
        is_time = kind not in _NOT_IN_EVERY_STAGE or any(name.startswith(f"{kind}/") for name in logged)
        if alarm.metric in self._known or not is_time:
            return
        self._known.add(alarm.metric)
        if alarm.metric not in logged and not alarm.optional:
            near = ", ".join(difflib.get_close_matches(alarm.metric, logged, 3, 0.5)) or "a name that the log has"
            rank_zero_warn(f"{_KEY}: nothing is logged as {alarm.metric}, so its alarm cannot sound. Try: {near}")

    def _hold_checkpoints(self, trainer: L.Trainer) -> None:
        """Keep what each rollback would need, however many checkpoints come after it."""
        store = trainer.strategy.checkpoint_io
        if isinstance(store, FolderCheckpointIO):
            acting = [alarm for alarm in self.alarms if alarm.action == "rollback"]
            goods = [self._state[str(alarm)]["good"] for alarm in acting if self._absent[alarm.metric] < _ABSENT]
            due = self._due[0] if self._due is not None else None
            store.hold = {step for step in (*goods, due) if step is not None}

    def _roll_back(self, trainer: L.Trainer, last_good: int | None, message: str) -> None:
        """Weights, optimizer state and running means of the newest checkpoint up to step `last_good`."""
        if self.rollbacks >= self.max_rollbacks:
            cause = f"{message}; rolled back {self.rollbacks} times already, which did not help"
            raise RunError(_KEY, cause, "a smaller learning rate, or the rows since the checkpoint", "E702")
        folder = _checkpoints(trainer)
        assert folder is not None
        path = trainer.strategy.broadcast(None if last_good is None else last_before(folder, last_good))
        if path is None:
            cause = f"{message}; there is no checkpoint from before that"
            raise RunError(_KEY, cause, "a smaller callbacks.save.every_n_steps, or a smaller learning rate", "E702")
        checkpoint = trainer.strategy.load_checkpoint(path)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        strict = trainer.lightning_module.strict_loading
        trainer.strategy.load_model_state_dict(checkpoint, strict=strict)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, own in zip(trainer.optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate
        self._take_means(checkpoint["callbacks"][self.state_key])
        for state in self._state.values():  # it was chosen as good
            state["in_a_row"], state["good"] = 0, checkpoint["global_step"]
        self.rollbacks += 1
        rank_zero_warn(f"step {trainer.global_step}: weights and optimizer are those of {Path(path).name} again")

    def _take_means(self, state_dict: dict[str, Any]) -> None:
        self._state |= {key: dict(value) for key, value in state_dict["state"].items() if key in self._state}


def _checkpoints(trainer: L.Trainer) -> Path | None:
    """Where the stage's checkpoints are written, if they are."""
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback.folder for callback in callbacks if isinstance(callback, SaveCheckpoints)), None)


def last_before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint that verifies and is not after a step."""
    old = (path for path in list_checkpoints(folder) if int(re.sub(r"\D", "", path.name)) <= step)
    return next((path for path in old if verify(path) is None), None)
