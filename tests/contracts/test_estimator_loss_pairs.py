"""Every estimator with every loss, for two real updates: what is allowed learns, what is refused says why."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from d1lit.advantages import StepAdvantage, TreeAdvantage, group_mean
from d1lit.app.components import build
from d1lit.app.composing import CONF, compose_jobs
from d1lit.data import prompt_batch
from d1lit.losses import check_pair
from d1lit.models import Policy
from d1lit.modules import DiffuGRPO
from tests.end_to_end.small import EOS, make_module, prompt_rows, quiet, sampler, small_policy

ESTIMATORS = sorted(file.stem for file in (CONF / "estimator").glob("*.yaml"))
LOSSES = sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))


@lru_cache(maxsize=1)
def tiny_config() -> DictConfig:
    """The tiny model's configuration on a canvas of two blocks of four."""
    overrides = ["task=sudoku", "sampler.completion_length=8", "sampler.block_length=4", "sampler.num_steps=4"]
    (config,) = compose_jobs("train", overrides).configs
    return config


def component(group: str, name: str) -> Any:
    """What the YAML makes, there."""
    config = tiny_config().copy()
    config[group] = OmegaConf.load(CONF / group / f"{name}.yaml")
    return build(config, group)


def has_parts(estimator: Any, loss: Any) -> bool:
    """Whether the estimator's likelihood holds what the loss reads beside its value."""
    return loss.traits.needs_parts <= estimator.traits.parts


MEAN_FIELD = {"one_step", "one_step_fixed", "one_step_shared"}
SEQUENCE_RATIO = {"espo", "gdpo", "gspo", "luspo"}
BOUNDS = {"bgpo", "dmpo", "ebpo", "elbo", "espo", "gdpo", "gdsd", "spg", "spg_elbo", "vrpo"}
WITH_K3 = {"coupled", "d1_micro_batch", "drift", "grpo"}  # of weight above 0 at the tiny scale


def is_known_not_to_learn(estimator: str, loss: str) -> bool:
    """Written out by name: what others have seen fail though the units fit."""
    return (estimator in MEAN_FIELD and loss in SEQUENCE_RATIO) or (estimator in BOUNDS and loss in WITH_K3)


class CountingPolicy(Policy):
    """Counts the passes of the network."""

    calls = 0

    def hidden(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return super().hidden(*args, **named)


@pytest.fixture(scope="module")
def trainer() -> L.Trainer:
    quiet()
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def two_updates(estimator: Any, loss: Any, trainer: L.Trainer) -> None:
    """Collect one rollout and take both its inner updates, checking each."""
    policy = CountingPolicy(small_policy().network)
    order = estimator.traits.order
    policy.train_order_head(order is not None and order.score == "head", seed=0)
    if loss.traits.needs_reference:
        policy.keep_reference()
    # Groups of two, which preference losses want; an estimator of trees wants their leaves, and has advantages of edges;
    # one of steps has advantages of those.
    tree, advantage = getattr(estimator, "tree", None), group_mean
    if loss.traits.takes_unit_advantages:
        of_steps = "step" in estimator.traits.parts
        advantage = TreeAdvantage(tree) if tree is not None else StepAdvantage() if of_steps else group_mean
    module: DiffuGRPO = make_module(
        policy,
        sampler=sampler(tree=tree),
        estimator=estimator,
        advantage=advantage,
        loss=loss,
        group_size=2 if tree is None else tree.leaves,
    )
    module.trainer = trainer
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-4)  # a step within GSPO's clip of 3e-4
    (experience,) = module.collect(prompt_batch(prompt_rows(4), range(4), EOS), 0, 1)
    assert (experience.old[1] is not None) == loss.traits.needs_old
    assert (experience.ref[0] is not None) == loss.traits.needs_reference
    for inner in range(2):
        policy.calls = 0
        value = module.update(experience, inner, 1)
        assert policy.calls == 1  # one pass for all views: the estimator itself never asks the network
        assert torch.isfinite(value)
        optimizer.zero_grad()
        value.backward()
        trained = [p for p in policy.parameters() if p.requires_grad]
        grads = [p.grad for p in trained if p.grad is not None]
        assert grads
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert max(float(grad.abs().max()) for grad in grads) > 0
        assert sum(bool((grad != 0).any()) for grad in grads) > len(trained) // 2
        optimizer.step()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if i % 4 else ()) for i, n in enumerate(ESTIMATORS)]
)
def test_estimator_with_every_loss(name, trainer):
    estimator = component("estimator", name)
    learnt, refused = [], []
    for loss_name in LOSSES:
        loss = component("loss", loss_name)
        unsound = estimator.traits.unit not in loss.traits.units or is_known_not_to_learn(name, loss_name)
        if unsound or not has_parts(estimator, loss):
            with pytest.raises(ValueError, match=r"^loss: .* is refused: .* Try: ") as refusal:
                check_pair(estimator, loss)
            assert type(estimator).__name__ in str(refusal.value)
            assert type(loss).__name__ in str(refusal.value)
            if has_parts(estimator, loss):
                assert "allow_unsound_pair=true" in str(refusal.value)
                check_pair(estimator, loss, allow=True)
            refused.append(loss_name)
            continue
        check_pair(estimator, loss)
        try:
            two_updates(estimator, loss, trainer)
        except Exception as error:
            raise AssertionError(f"estimator={name} loss={loss_name}: {error}") from error
        learnt.append(loss_name)
    print(f"{name} ({estimator.traits.unit}): learns with {', '.join(learnt)}; refused: {', '.join(refused) or 'none'}")
    assert learnt
