"""Alarms that act: weights return to what they were before the collapse, and the run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

from d1lit.callbacks import Alarm, CollapseAlarms, SaveCheckpoints, SkipNonFinite, Validate
from d1lit.callbacks.alarms import last_before
from d1lit.checkpoint import FolderCheckpointIO, list_checkpoints, read_tree
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.terms import k3, micro_batch_token_mean, token_mean
from d1lit.modules.accounting import repeated_fraction
from d1lit.modules.experience import all_finite
from d1lit.types import LogProbs, LossInputs
from tests.end_to_end.small import fit, make_module, small_policy

CONF = Path(__file__).parents[1] / "conf"


class Falling(L.LightningModule):
    """Several updates a rollout; logs a given series, a number for each rollout."""

    def __init__(self, series: list[float], inner: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.series = series
        self.inner = inner

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(batch_idx))
        return (self.net(x) - batch_idx).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("rollout/reward", self.series[batch_idx // self.inner])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(L.Callback):
    """Weights, Adam's moments and the learning rate that each batch begins with."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.moments: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        (optimizer,) = trainer.optimizers
        state = optimizer.state.get(pl_module.net.weight, {"exp_avg": torch.zeros(1)})
        self.weights.append(pl_module.net.weight.detach().clone())
        self.moments.append(state["exp_avg"].clone())
        self.rates.append(optimizer.param_groups[0]["lr"])


def run(
    folder: Path,
    series: list[float],
    alarms: CollapseAlarms,
    save_every: int | None = 1,
    inner: int = 2,
    keep: int = 0,
    others: Sequence[L.Callback] = (),
) -> Watch:
    """Train over the series, with checkpoints."""
    watch = Watch()
    callbacks: list[L.Callback] = [alarms, watch, *others]
    if save_every is not None:
        callbacks.append(SaveCheckpoints(folder, save_every, None))
    trainer = L.Trainer(
        max_steps=inner * len(series),
        callbacks=callbacks,
        plugins=[FolderCheckpointIO(keep)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=save_every is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [SimpleNamespace(inner=n % inner, micro=0) for n in range(inner * len(series))]  # as InnerUpdate is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Falling(series, inner), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return watch


SERIES = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
ALARM = Alarm("rollout/reward", action="rollback", below=0.5, patience=2)


def test_weights_and_optimizer_return_to_the_last_step_that_was_good(tmp_path: Path) -> None:
    """The rollouts before steps 4 and 6 are bad, the one before step 2 was good; the next one begins after step 8."""
    alarms = CollapseAlarms([ALARM])
    watch = run(tmp_path, SERIES, alarms)
    checkpoint, _ = read_tree(tmp_path / "step_2")
    assert alarms.rollbacks == 1
    assert torch.equal(watch.weights[8], checkpoint["state_dict"]["net.weight"])
    assert torch.equal(watch.moments[8], checkpoint["optimizer_states"][0]["state"][0]["exp_avg"])
    assert torch.equal(watch.weights[2], watch.weights[8]) and not torch.equal(watch.weights[7], watch.weights[8])
    assert watch.rates == pytest.approx([0.1 / (1 + step) for step in range(2 * len(SERIES))])  # the schedule goes on
    plain = run(tmp_path / "plain", SERIES, CollapseAlarms([replace(ALARM, action="warn")]))
    for before in range(8):
        assert torch.equal(plain.weights[before], watch.weights[before])
    assert not torch.equal(plain.weights[8], watch.weights[8])


@pytest.mark.parametrize(("inner", "patience"), [(1, 5), (6, 1), (6, 3)])
def test_good_weights_are_kept_until_the_alarm_has_sounded(tmp_path: Path, inner: int, patience: int) -> None:
    """Saved after every step, two are kept: without more, all would be of the collapse when the alarm sounds."""
    last_good = 2 * inner  # the rollout of step 2 * inner was good, the next one is not
    alarms = CollapseAlarms([replace(ALARM, patience=patience)])
    series = [1.0] * 3 + [0.0] * patience + [1.0] * 4
    watch = run(tmp_path, series, alarms, inner=inner, keep=2)
    after = inner * (3 + patience)
    assert alarms.rollbacks == 1
    assert torch.equal(watch.weights[after], watch.weights[last_good])
    assert len(list_checkpoints(tmp_path)) == 3, "the two latest, and what the next alarm would go back to"


def test_rollouts_are_counted_and_not_their_inner_updates(tmp_path: Path) -> None:
    alarms = CollapseAlarms([replace(ALARM, action="warn", patience=2)])
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("d1lit.callbacks.alarms.rank_zero_warn", lines.append)
        run(tmp_path, [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], alarms, save_every=None, inner=6)
    assert [line.split(":")[0] for line in lines] == ["alarm at step 25", "step 31"]
    (state,) = alarms.state_dict()["state"].values()
    assert state["count"] == 6 and state["mean"] == pytest.approx(0.5)


def test_a_checkpoint_that_is_not_old_enough_is_not_taken(tmp_path: Path) -> None:
    run(tmp_path, SERIES, CollapseAlarms([replace(ALARM, action="warn")]), save_every=4)
    assert [last_before(tmp_path, step) for step in (3, 4, 9, 12)] == [
        None,
        *(tmp_path / f"step_{step}" for step in (4, 8, 12)),
    ]
    (tmp_path / "step_4" / "structure.json").write_text("{}")
    assert last_before(tmp_path, 7) is None
    assert last_before(tmp_path / "absent", 7) is None
    with pytest.raises(RuntimeError, match=r"there is no checkpoint from before that.*\[E702\]"):
        run(tmp_path / "again", SERIES, CollapseAlarms([ALARM]), save_every=4)


def test_an_alarm_that_lasts_speaks_at_doubling_distances_and_when_it_is_over(monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr("d1lit.callbacks.alarms.rank_zero_warn", said.append)
    alarm = Alarm("train/kl", above=1.0, patience=10)
    alarms = CollapseAlarms([alarm])
    state = alarms._state[str(alarm)]
    acts = [step for step in range(1, 101) if alarms._look(alarm, state, 2.0 if step <= 95 else 0.5, step)]
    assert acts == list(range(10, 100, 10)), "what it does, it does as often as before"
    begun = [f"alarm at step {n}: train/kl = 2 is above 1 ({n} in a row)" for n in (10, 20, 40, 80)]
    assert said == [*begun, "step 96: train/kl = 0.5 keeps its bound again (95 did not)"]


def test_what_an_alarm_knows_goes_with_it_and_not_with_its_place() -> None:
    one, other = Alarm("train/kl", above=9.0), Alarm("train/kl", above=9.0, action="stop")
    first = CollapseAlarms([one, other, one])
    assert first.alarms == (one, other)
    first._look(one, first._state[str(one)], 3.0, 1)
    second = CollapseAlarms([Alarm("train/loss", above=1.0), other, one])
    second.load_state_dict(first.state_dict())
    assert [second._state[str(alarm)]["mean"] for alarm in second.alarms] == [0.0, 0.0, 3.0]


def test_an_alarm_on_validation_rows_counts_looks_and_goes_back_to_the_last_good_one(tmp_path: Path) -> None:
    """A look before steps 2, 4, ... of one update each; the numbers stand until the next look."""
    found = iter([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    alarms = CollapseAlarms([replace(ALARM, metric="val/accuracy"), replace(ALARM, metric="val/acuracy")])
    seen = Watch()
    measure = Validate(lambda policy: {"accuracy": next(found)}, None, 2)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("d1lit.callbacks.alarms.rank_zero_warn", lines.append)
        patch.setattr(Falling, "policy", nn.Linear(1, 1), raising=False)
        run(tmp_path, [1.0] * 12, alarms, inner=1, keep=2, others=[measure, seen])
    assert [line.split(" (")[0] for line in lines if "step 9" in line] == [
        "alarm at step 9: val/accuracy = 0 is below 0.5",
        "step 9: weights and optimizer are those of step_4 again",
    ]
    assert any("nothing is logged as val/acuracy" in line for line in lines)
    assert alarms.rollbacks == 1 and torch.equal(seen.weights[9], seen.weights[4])
    assert alarms.state_dict()["state"][str(alarms.alarms[0])]["count"] == 2, "those of step_4, and one since"


def test_each_rollback_alarm_has_its_checkpoint_and_one_without_numbers_lets_go(tmp_path: Path) -> None:
    late, early = replace(ALARM, patience=9), Alarm("rollout/reward", "rollback", below=0.9, patience=50)
    gone = Alarm("rollout/gone", "rollback", below=0.0)
    for series, kept in (([1.0] * 6 + [0.6] * 4 + [0.0] * 4, [14, 13, 9, 5, 3]), ([1.0] * 40, [40, 39, 38])):
        alarms = CollapseAlarms([late, early, gone])
        alarms._state[str(gone)]["good"] = 3  # as it came out of a checkpoint
        folder = tmp_path / str(len(series))
        run(folder, series, alarms, inner=1, keep=2)
        assert [path.name for path in list_checkpoints(folder)] == [f"step_{step}" for step in kept]


def test_an_alarm_on_a_number_that_is_not_there_says_so(monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr("d1lit.callbacks.alarms.rank_zero_warn", said.append)
    metrics = ("rollout/rewrad", "rolout/reward", "rollout/reward", "train/grad", "val/accuracy")
    alarms = [Alarm(metric, above=9.0) for metric in metrics] + [Alarm("train/kl", above=9.0, optional=True)]
    fit(make_module(small_policy()), callbacks=[CollapseAlarms(alarms)])
    assert [line.split(", so ")[0].split(" as ")[1] for line in said] == [
        "rollout/rewrad",
        "rolout/reward",
        "train/grad",
    ]
    assert "Try: rollout/reward" in said[0]


def test_rollbacks_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    alarms = CollapseAlarms([ALARM], max_rollbacks=2)
    with pytest.raises(RuntimeError, match="rolled back 2 times already"):
        run(tmp_path, [1.0, 1.0] + [0.0] * 10, alarms)


def test_a_rollback_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.alarms: rollback needs checkpoints"):
        run(tmp_path, SERIES, CollapseAlarms([ALARM]), save_every=None)


def test_every_way_to_collapse_has_a_threshold_and_an_action_in_yaml() -> None:
    alarms = yaml.safe_load((CONF / "callbacks" / "default.yaml").read_text())["alarms"]["alarms"]
    found = {alarm["metric"]: alarm for alarm in alarms}
    ways = {"zero_std_fraction", "reward", "length", "repeated_fraction", "failed_judge_fraction"}
    assert {f"rollout/{way}" for way in ways} | {"train/kl", "train/ratio_max"} == found.keys()
    assert all(alarm["action"] == "warn" for alarm in alarms)
    for alarm in alarms:
        Alarm(**{key: value for key, value in alarm.items() if key != "_target_"})


def test_repeated_text_is_measured() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 4, 4, 4], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    for length in (10, 7, 3, 2, 1):
        cut = mask & (torch.arange(10) < length)
        expected = []
        for row in ids.tolist():
            seen, again, runs = set(), 0, [tuple(row[i : i + 3]) for i in range(length - 2)]
            for three in runs:
                again += three in seen
                seen.add(three)
            expected.append(again / max(1, len(runs)))
        torch.testing.assert_close(repeated_fraction(ids, cut), torch.tensor(expected))


# ------------------------------------------------------------------------------------------------------ no valid token


class NothingToScore(OneStepEstimator):
    """Gives no token a weight at one rollout."""

    def combine(self, view_logprobs: Tensor, corruption: Any, context: Any) -> Any:
        found = super().combine(view_logprobs, corruption, context)
        empty = context.draws.step == 1
        return replace(found, weight=found.weight * 0) if empty else found


@pytest.mark.parametrize(("num_micro", "aggregate"), [(1, token_mean), (2, micro_batch_token_mean)])
def test_an_update_without_a_valid_token_is_no_step(num_micro: int, aggregate: Any) -> None:
    """Weight decay, momentum and step count stay where they are: nothing was learnt."""

    def adam(named: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named], lr=0.1, weight_decay=0.1)

    estimator = partial(NothingToScore, prompt_mask_prob=0.3, num_masks=1, share_within_group=False)
    weights = {}
    for updates in (2, 4):  # rollout 0, then rollout 1, of which no token counts
        guard = SkipNonFinite()
        settings = {"estimator": estimator(), "loss": ClippedPolicyLoss(0.5, 0.5, 0.0, k3, aggregate)}
        module = make_module(small_policy(), optimizer=adam, num_updates=updates, **settings)
        weights[updates] = fit(module, num_micro, callbacks=[guard])
        assert guard.skipped == updates - 2
    assert all(torch.equal(weights[2][name], value) for name, value in weights[4].items())


def test_a_number_that_a_clipped_loss_would_hide_is_found() -> None:
    weight = torch.tensor([[1.0, 0.0]])
    sound = LogProbs(torch.tensor([[-1.0, -2.0]]), weight)
    inputs = LossInputs(
        logprobs=sound,
        old=sound,
        ref=None,
        advantages=torch.ones(1),
        rewards=torch.ones(1),
        group_size=1,
        completion_mask=torch.ones(1, 2, dtype=torch.bool),
        entropy=None,
        num_units=1.0,
        num_rollouts=1.0,
    )
    for value in (float("-inf"), float("nan"), float("inf")):
        bad = LogProbs(torch.tensor([[value, -2.0]]), weight)
        assert bool(all_finite(inputs))
        assert bool(all_finite(replace(inputs, old=LogProbs(torch.tensor([[-1.0, value]]), weight))))  # not scored
        for name, broken in (("logprobs", bad), ("old", bad), ("ref", bad), ("rewards", torch.tensor([value]))):
            assert not bool(all_finite(replace(inputs, **{name: broken})))
        assert not bool(all_finite(replace(inputs, advantages=torch.tensor([value]))))
    loss, _ = ClippedPolicyLoss(0.5, 0.5, 0.0, k3, token_mean)(
        replace(inputs, old=LogProbs(torch.tensor([[float("-inf"), -2.0]]), weight))
    )
    assert bool(torch.isfinite(loss))
