"""Steps that are not finite do not happen, on any rank; collapse is noticed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from d1lit.callbacks import SaveCheckpoints, guards
from d1lit.callbacks.alarms import Alarm, CollapseAlarms
from d1lit.callbacks.guards import SkipNonFinite, gradients_are_finite, named
from d1lit.checkpoint import FolderCheckpointIO, list_checkpoints
from d1lit.data import CompletionRows, EncodedRow, PromptCycles, canvas_layout
from d1lit.modules import DiffuGRPO, MaskedSFT
from tests.end_to_end import small
from tests.test_sft_masks import module_with

PLACES = ("loss_nan", "loss_inf", "loss_only", "one_gradient", "reward", "old_logprob", "ratio_overflow")


@dataclass
class Rows:
    """A batch that names its rows."""

    x: Tensor
    row_ids: Tensor


class Policy(L.LightningModule):
    """A policy-gradient step small enough to see through, with a fault at given (step, rank)."""

    def __init__(self, faults: dict[int, tuple[str, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.extra = nn.Parameter(torch.ones(2))
        self.faults = faults

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        whose = f"{self.global_rank}." if self.trainer.world_size > 1 else ""
        self.row_names = [f"{whose}{row}" for row in batch.row_ids.tolist()]
        place, rank = self.faults.get(self.global_step, ("", 0))
        place = place if rank == self.global_rank else ""
        logprobs = self.net(batch.x).log_softmax(-1)[:, 0]
        old, rewards = logprobs.detach().clone(), torch.linspace(-1, 1, len(batch.x))
        if place == "reward":
            rewards[1] = float("nan")
        if place == "old_logprob":
            old[0] = float("-inf")
        if place == "ratio_overflow":
            old = old - 200.0
        loss = -((logprobs - old).exp() * rewards).mean() + self.extra.square().sum()
        if place == "loss_nan":
            loss = loss * float("nan")
        if place == "loss_inf":
            loss = loss * float("inf")
        if place == "loss_only":  # a loss without meaning whose gradient looks healthy
            loss = loss + torch.tensor(float("inf"))
        if place == "one_gradient":
            self.extra.register_hook(lambda gradient: gradient.where(torch.tensor([True, False]), torch.nan))
            loss = loss + self.extra.sum()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


class Watch(L.Callback):
    """Weights and optimizer state around every step."""

    def __init__(self) -> None:
        self.before: Any = None
        self.moved: list[bool] = []
        self.state_moved: list[bool] = []

    def state(self, trainer: L.Trainer) -> tuple[list[Tensor], Any]:
        weights = [p.detach().clone() for p in trainer.lightning_module.parameters()]
        return weights, copy.deepcopy(trainer.optimizers[0].state_dict())

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.before = self.state(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        weights, optimizer = self.state(trainer)
        self.moved.append(not all(torch.equal(a, b) for a, b in zip(weights, self.before[0], strict=True)))
        self.state_moved.append(str(optimizer) != str(self.before[1]))
        pl_module.extra._backward_hooks = None  # type: ignore[union-attr]


def fit(module: L.LightningModule, callbacks: list[Any], num_steps: int, **settings: Any) -> L.Trainer:
    """Train quietly on rows 0-3, 4-7, ..."""
    own: dict[str, Any] = {
        "max_steps": num_steps,
        "callbacks": callbacks,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    trainer = L.Trainer(**{**own, **settings})
    x = torch.randn(4 * 64, 4, generator=torch.Generator().manual_seed(1))
    batches = [Rows(x[i : i + 4], torch.arange(i, i + 4)) for i in range(0, len(x), 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False))  # type: ignore[arg-type]
    return trainer


def every_other(ranks: int) -> dict[int, tuple[str, int]]:
    """A fault at each place on each rank, with a sound step between any two."""
    cases = [(place, rank) for place in PLACES for rank in range(ranks)]
    return {2 * i + 1: case for i, case in enumerate(cases)}


def check(moved: list[bool], state_moved: list[bool], faults: dict[int, tuple[str, int]], skipped: int) -> None:
    expected = [step not in faults for step in range(len(moved))]
    assert moved == expected
    assert state_moved == expected
    assert skipped == len(faults)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_changes_no_bit(clip: float | None) -> None:
    """Fault F6 in one process: weights and optimizer state (moments, decay, step count) stay as they were."""
    faults = every_other(1)
    watch, guard = Watch(), SkipNonFinite()
    trainer = fit(Policy(faults), [guard, watch], 2 * len(faults) + 2, gradient_clip_val=clip)
    check(watch.moved, watch.state_moved, faults, guard.skipped)
    assert trainer.callback_metrics["guard/skipped"] == len(faults)
    assert trainer.global_step == 2 * len(faults) + 2  # the data order does not shift


def test_without_the_guard_the_same_faults_destroy_the_weights() -> None:
    module = Policy({1: ("one_gradient", 0)})
    fit(module, [], 3)
    assert not torch.isfinite(module.extra).all()


def test_a_bad_micro_batch_spoils_its_whole_window_and_no_other() -> None:
    watch, guard = Watch(), SkipNonFinite()
    faults = {1: ("reward", 0)}
    fit(Policy(faults), [guard, watch], 4, accumulate_grad_batches=3)
    assert watch.moved == [False, False, True, False, False, False, False, False, True, False, False, True]
    assert guard.skipped == 1


def test_five_in_a_row_end_the_run_and_name_their_rows() -> None:
    guard = SkipNonFinite()
    with pytest.raises(RuntimeError, match="5 steps in a row") as caught:
        fit(Policy(dict.fromkeys(range(2, 20), ("reward", 0))), [guard], 20)
    for step in range(2, 7):
        assert ", ".join(str(4 * step + i) for i in range(4)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sound_step_between_resets_the_count() -> None:
    faults = {step: ("reward", 0) for step in range(20) if step % 5}
    guard = SkipNonFinite()
    fit(Policy(faults), [guard], 20)
    assert guard.skipped == 16


def test_counters_survive_a_checkpoint() -> None:
    guard = SkipNonFinite()
    fit(Policy(dict.fromkeys((1, 2, 4, 5), ("reward", 0))), [guard], 6)
    other = SkipNonFinite()
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (other.skipped, other.in_a_row) == (4, 2)
    with pytest.raises(
        RuntimeError, match=r"rows: 16, 17, 18, 19; 20, 21, 22, 23; 0, 1, 2, 3; 4, 5, 6, 7; 8, 9, 10, 11\."
    ):
        fit(Policy(dict.fromkeys(range(3), ("reward", 0))), [other], 6)


def test_nothing_is_saved_while_steps_are_left_out(tmp_path: Path) -> None:
    """Else both checkpoints that are kept would be of weights whose losses are not finite, and of a count near its end."""
    faults = dict.fromkeys((3, 4, 5, 6), ("reward", 0))
    found: list[list[str]] = []

    class Names(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            found.append([path.name for path in list_checkpoints(tmp_path)])

    callbacks = [SkipNonFinite(), SaveCheckpoints(tmp_path, 1, None), Names()]
    settings = {"plugins": [FolderCheckpointIO(keep=2)], "enable_checkpointing": True}
    fit(Policy(faults), callbacks, 10, **settings)
    assert found[5] == found[7] == ["step_3", "step_2"] and found[9] == ["step_8", "step_3"]


@pytest.mark.slow
def test_two_ranks_decide_alike(tmp_path: Path) -> None:
    """Fault F6: seven places on each of two ranks (gloo)."""
    command = [sys.executable, "-m", "tests.test_guards", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=120, capture_output=True)
    faults = every_other(2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        check(result["moved"], result["state_moved"], faults, result["skipped"])
    assert results[0]["weights"] == results[1]["weights"]
    for said, (step, (place, rank)) in zip(results[0]["said"], faults.items(), strict=True):
        ranks = (0, 1) if place == "one_gradient" else (rank,)  # a gradient is everyone's, a loss one rank's
        rows = ", ".join(f"{n}.{4 * step + i}" for n in ranks for i in range(4))
        assert said == f"step {step} left out: its loss or gradient is not finite (rows {rows})"


class Report(L.Callback):
    """Writes what a rank saw."""

    def __init__(self, folder: Path, watch: Watch, guard: SkipNonFinite) -> None:
        self.folder, self.watch, self.guard = folder, watch, guard
        self.said: list[str] = []
        guards.rank_zero_warn = self.said.append  # type: ignore[assignment]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        result = {
            "moved": self.watch.moved,
            "state_moved": self.watch.state_moved,
            "skipped": self.guard.skipped,
            "said": self.said,
            "weights": [p.tolist() for p in pl_module.parameters()],
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


def two_ranks(folder: Path) -> None:
    """The body of `test_two_ranks_decide_alike`, in a process of its own."""
    torch.set_num_threads(1)
    faults, watch, guard = every_other(2), Watch(), SkipNonFinite()
    callbacks = [guard, watch, Report(folder, watch, guard)]
    fit(Policy(faults), callbacks, 2 * len(faults) + 2, strategy="ddp_fork", devices=2)


def test_gradients_are_finite_sees_every_parameter() -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    assert bool(gradients_are_finite(parameters))
    for value in (float("inf"), float("-inf"), float("nan")):
        parameters[2].grad = torch.tensor([0.0, 0.0, value])
        assert not bool(gradients_are_finite(parameters))
    parameters[2].grad = torch.full((3,), 3e38)  # large is not infinite, though its norm is
    assert bool(gradients_are_finite(parameters))


class BadRow(DiffuGRPO):
    """The method itself; the reward of one row of the data set is no number."""

    def update(self, experience: Any, inner: int, num_micro: int) -> Tensor:
        bad = torch.tensor([example["id"] == "7" for example in experience.rollout.examples])
        return super().update(replace(experience, rewards=experience.rewards.where(~bad, torch.nan)), inner, num_micro)


class BadDemonstration(MaskedSFT):
    """SFT itself; one demonstration of the data set has a loss that is no number."""

    def masked_loss(self, batch: Any, *arguments: Any) -> Any:
        loss, metrics = super().masked_loss(batch, *arguments)
        return loss * (torch.nan if "7" in batch.names else 1.0), metrics


def test_rows_of_rl_are_named_as_the_data_names_them() -> None:
    """Row 7 comes once an epoch of three rollouts, each used twice: both updates name the prompts it was cut with."""
    prompts = partial(PromptCycles, small.prompt_rows(), num_inner_updates=2, num_updates=12, pad_id=small.EOS, seed=1)
    seen = [batch.prompts.examples for batch in map(prompts(plan=small.BatchPlan(4, 2)).__getitem__, range(0, 24, 4))]  # type: ignore[union-attr]
    pairs = [[str(example["id"]) for example in half] for four in seen for half in (four[:2], four[2:])]
    (first, second) = (", ".join(pair) for pair in pairs if "7" in pair)
    guard = SkipNonFinite(max_in_a_row=2)
    with pytest.raises(RuntimeError, match=rf"their rows: {first}\. Try"):
        small.fit(small.make_module(small.small_policy(), BadRow, num_updates=12), 2, callbacks=[guard])
    guard = SkipNonFinite()
    with pytest.warns(UserWarning, match=rf"\(rows {second}\)"):
        small.fit(small.make_module(small.small_policy(), BadRow, num_updates=12), 2, callbacks=[guard])
    assert guard.skipped == 4


def test_rows_of_sft_are_named_as_the_data_names_them() -> None:
    rows = [EncodedRow(row.prompt_ids, row.example, [n] * 3) for n, row in enumerate(small.prompt_rows())]
    layout = partial(canvas_layout, completion_length=8)

    def demonstrations(plan: Any) -> CompletionRows:
        return CompletionRows(rows, plan, 3, layout, small.EOS, small.EOS, 1)

    batches = [demonstrations(small.BatchPlan(4, 2))[n] for n in range(6)]
    (faulty,) = (", ".join(batch.names) for batch in batches if "7" in batch.names)
    assert len({name for batch in batches for name in batch.names}) == 12
    guard = SkipNonFinite(max_in_a_row=1)
    with pytest.raises(RuntimeError, match=rf"their rows: {faulty}\. Try"):
        small.fit(module_with(kind=BadDemonstration, num_updates=3), 2, 4, [guard], demonstrations)


class HidesNothing:
    """A mask that hides a token in some micro-batches only."""

    def __init__(self, hides: list[bool]) -> None:
        self.hides = iter(hides)

    def __call__(self, draws: Any, row_ids: Tensor, prob: Tensor, is_target: Tensor) -> Tensor:
        return is_target & next(self.hides)

    def weight(self, draws: Any, row_ids: Tensor, prob: Tensor, is_target: Tensor) -> Tensor:
        return torch.ones_like(is_target, dtype=torch.float32)


def test_an_update_that_hides_no_token_is_no_step() -> None:
    """Weight decay and moments would move the weights, though nothing was learnt; one micro-batch without is no harm."""
    rows = [EncodedRow(row.prompt_ids, row.example, [n] * 3) for n, row in enumerate(small.prompt_rows())]
    layout = partial(canvas_layout, completion_length=8)

    def adam(named: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named], lr=0.1, weight_decay=0.1)

    weights = {}
    for updates, hides in ((2, [True, True, False, True]), (3, [True, True, False, True, False, False])):
        policy, guard = small.small_policy(), SkipNonFinite()
        module = module_with(policy=policy, mask=HidesNothing(hides), optimizer=adam, num_updates=updates)

        def demonstrations(plan: Any, updates: int = updates) -> CompletionRows:
            return CompletionRows(rows, plan, updates, layout, small.EOS, small.EOS, 1)

        weights[updates] = small.fit(module, 2, 4, [guard], demonstrations)
        assert guard.skipped == updates - 2
    assert all(torch.equal(weights[2][name], value) for name, value in weights[3].items())


def test_a_line_names_so_many_rows_and_counts_the_rest() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([str(n) for n in range(20)]).endswith("14, 15 and 4 more")


# ------------------------------------------------------------------------------------------------------------ collapse


class Collapsing(L.LightningModule):
    """Logs a given series after each optimizer step, as the training modules do."""

    def __init__(self, **series: list[float]) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.series = series

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        return self.net(batch.x).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict(
            {name.replace("_", "/", 1): values[batch_idx] for name, values in self.series.items()}, batch_size=1
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def alarms_of(alarm: Alarm, num_steps: int, **series: list[float]) -> list[str]:
    """The lines an alarm writes over a run."""
    callback = CollapseAlarms([alarm])
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d1lit.callbacks.alarms.rank_zero_warn", lines.append)
        fit(Collapsing(**series), [callback], num_steps)
    return [line for line in lines if line.startswith("alarm at")]


@pytest.mark.parametrize(
    ("alarm", "series", "steps"),
    [
        (Alarm("rollout/zero_std_fraction", above=0.9, patience=3), [0.5, 1, 1, 1, 1, 0.5, 1, 1], [4]),
        (Alarm("rollout/zero_std_fraction", below=0.5), [0.6, 0.4, 0.6], [2]),
        (Alarm("rollout/zero_std_fraction", drop=0.3, warmup=3), [1, 1, 1, 0.8, 0.2, 0.9], [5]),
        (Alarm("rollout/zero_std_fraction", ratio=3.0, warmup=2), [0.01, 0.01, 0.02, 0.09, 0.01], [4]),
        (Alarm("rollout/zero_std_fraction", ratio=3.0, warmup=4), [0.01, 0.01, 0.02, 0.09, 0.01], []),
        (Alarm("rollout/zero_std_fraction", above=5.0), [1, float("nan"), 1], [2]),
        (Alarm("rollout/absent", above=5.0), [9, 9, 9], []),
    ],
)
def test_alarms_sound_at_the_right_step(alarm: Alarm, series: list[float], steps: list[int]) -> None:
    lines = alarms_of(alarm, len(series) + 1, rollout_zero_std_fraction=[*series, 0.5])
    assert [int(line.split("step ")[1].split(":")[0]) for line in lines] == steps


def test_an_alarm_can_stop_the_run() -> None:
    alarm = Alarm("train/kl", action="stop", above=10.0)
    with pytest.raises(RuntimeError, match=r"step 3: train/kl = 11 is above 10"):
        fit(Collapsing(train_kl=[1.0, 2.0, 11.0, 3.0]), [CollapseAlarms([alarm])], 4)


def test_the_running_mean_is_the_plain_mean_at_first_and_survives_a_checkpoint() -> None:
    first = CollapseAlarms([Alarm("train/kl", above=1e9, memory=0.75)])
    values = [1.0, 2.0, 6.0, 7.0, 8.0, 9.0]
    fit(Collapsing(train_kl=[*values[:3], 0.0]), [first], 4)
    second = CollapseAlarms([Alarm("train/kl", above=1e9, memory=0.75)])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(second.state_dict()["state"].values()) == [{"mean": 3.0, "count": 3, "in_a_row": 0, "good": 2}]
    fit(Collapsing(train_kl=[*values[3:], 0.0]), [second], 4)
    mean = 3.0
    for value in values[3:]:
        mean += 0.25 * (value - mean)
    assert list(second.state_dict()["state"].values()) == [{"mean": mean, "count": 6, "in_a_row": 0, "good": 2}]


@pytest.mark.parametrize(
    "settings",
    [{}, {"above": 1.0, "patience": 0}, {"above": 1.0, "memory": 1.0}],
)
def test_alarms_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.alarms\.alarms: the alarm on train/kl .*\. Try: .* \[E202\]$"):
        Alarm("train/kl", **settings)


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
