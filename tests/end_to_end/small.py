"""A diffu-GRPO stage small enough to look into: a random policy of one block, prompts of numbers, a reward of text."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy
import torch
from torch import Tensor

from d1lit.advantages import group_mean
from d1lit.data import BatchPlan, EncodedRow, PromptCycles
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.terms import k3, token_mean
from d1lit.models import Policy
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.modules import DiffuGRPO, StageData
from d1lit.modules.optimizing import constant
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import BlockSampler, EvenSchedule, FixedQuota, InverseCDF, TokenProbability
from d1lit.types import Example, Verdict

VOCABULARY, MASK, EOS = 24, 22, 23
COMPLETION = 8


def small_policy(
    dtype: torch.dtype = torch.float32, seed: int = 3, init_std: float = 0.4, num_layers: int = 1
) -> Policy:
    """Width 16, one block, random weights large enough that predictions differ."""
    config = tiny_config(VOCABULARY, MASK, EOS, EOS, 16, num_layers, 2, 24, 100.0, 64, init_std=init_std)
    return Policy(fresh_network(config, seed=seed, dtype=dtype))


def sampler(**changes: Any) -> BlockSampler:
    """Two blocks of two steps each, at temperature 1."""
    settings: dict[str, Any] = {
        "completion_length": COMPLETION,
        "num_steps": 4,
        "block_length": 4,
        "temperature": 1.0,
        "guidance": 0.0,
        "proposal": InverseCDF(),
        "confidence": TokenProbability(),
        "commit": FixedQuota(EvenSchedule()),
        "stop_at_eos": True,
    }
    return BlockSampler(**{**settings, **changes})


class EvenTokens:
    """Share of even tokens: almost every completion of a random policy earns something else."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        words = [text.split() for text in completions]
        return [Verdict(sum(int(w) % 2 == 0 for w in row) / max(1, len(row))) for row in words]


def prompt_rows(count: int = 12) -> list[EncodedRow]:
    """Prompts of three to six tokens."""
    rng = random.Random(0)
    return [EncodedRow([rng.randrange(MASK) for _ in range(rng.randint(3, 6))], {"id": str(n)}) for n in range(count)]


def decode(ids: Tensor) -> str:
    """Numbers up to the end token."""
    kept = ids.tolist()
    return " ".join(map(str, kept[: kept.index(EOS)] if EOS in kept else kept))


def sgd(named: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    """Plain gradient descent: what rounding does to a gradient it does to the weights, and no more."""
    return torch.optim.SGD([p for _, p in named], lr=lr)


def make_module(policy: Policy, kind: type[DiffuGRPO] = DiffuGRPO, **changes: Any) -> DiffuGRPO:
    """d1's method with two inner updates, unless changed."""
    settings: dict[str, Any] = {
        "policy": policy,
        "decode": decode,
        "sampler": sampler(),
        "reward": RewardParts({"even": EvenTokens()}, {"even": 1.0}),
        "advantage": group_mean,
        "estimator": OneStepEstimator(prompt_mask_prob=0.3, num_masks=1, share_within_group=False),
        "loss": ClippedPolicyLoss(0.5, 0.5, 0.0, k3, token_mean),
        "optimizer": sgd,
        "lr_schedule": partial(constant, warmup_updates=0),
        "group_size": 3,
        "num_inner_updates": 2,
        "num_updates": 4,
        "seed": 5,
    }
    return kind(**{**settings, **changes})


class Noise(L.Callback):
    """Draws from every global generator between steps."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, *args: Any) -> None:
        self._draw(args[-1])

    def on_train_batch_end(self, *args: Any) -> None:
        self._draw(args[-1])

    def _draw(self, batch_idx: int) -> None:
        for library_seed in (torch.manual_seed, numpy.random.seed, random.seed):
            library_seed(self.seed + batch_idx)
        for _ in range(self.seed % 7 + 1):
            _ = torch.rand(3), numpy.random.rand(3), random.random()


class Confidant(L.Callback):
    """Is told secrets, and does nothing with them."""

    def __init__(self, **secrets: Any) -> None: ...


def fit(
    module: Any,
    num_micro: int = 1,
    batch_size: int = 4,
    callbacks: Sequence[L.Callback] = (),
    make_dataset: Callable[[BatchPlan], Any] | None = None,
) -> Mapping[str, Tensor]:
    """Run the whole stage in a bare Trainer; the weights at its end."""

    def prompts(plan: BatchPlan) -> PromptCycles:
        return PromptCycles(prompt_rows(), plan, module.num_inner_updates, module.num_updates, EOS, 1)

    quiet()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=module.num_updates,
        max_epochs=1,
        accumulate_grad_batches=num_micro,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=StageData(make_dataset or prompts, batch_size, batch_size // num_micro))
    assert trainer.global_step == module.num_updates
    return {name: value.detach().clone() for name, value in module.policy.state_dict().items()}


def quiet() -> None:
    """No word from Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def largest_shift(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
