"""A world small enough to enumerate: four tokens, a rule that ties neighbours, and a network of 5,360 weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d1lit.exact import completion_law
from d1lit.models import MaskedDiffusionConfig, MaskedDiffusionLM, Policy
from d1lit.sampling import (
    BlockSampler,
    EvenSchedule,
    FixedQuota,
    InverseCDF,
    LeftToRight,
    RandomOrder,
    TokenProbability,
)
from d1lit.types import PromptBatch

TOKENS, MASK, EOS = 4, 4, 5
"""The end of sequence is outside the vocabulary: all completions have full length."""
PROMPTS = torch.tensor([[step, other] for step in (1, 2, 3) for other in (0, 1)])
ORDERS = {"low_confidence": TokenProbability(), "random": RandomOrder(), "left_to_right": LeftToRight()}


class World(nn.Module):
    """The project's own network without the mask token in its vocabulary, as far as it is asked to predict."""

    def __init__(self, seed: int, predicts_mask: bool = False) -> None:
        super().__init__()
        config = MaskedDiffusionConfig(
            vocab_size=TOKENS + 1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_theta=100.0,
            mask_token_id=MASK,
            eos_token_id=EOS,
            pad_token_id=MASK,
            initializer_range=0.3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.policy = Policy(MaskedDiffusionLM(config)).double()
        self.predicts_mask = predicts_mask
        """True: the mask token takes its share of the softmax, as it does in every published estimator.

        Without it every estimator scores as with `exclude_mask`.
        """

    mask_token_id, eos_token_id, pad_token_id = MASK, EOS, MASK

    def hidden(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the network."""
        return self.policy.hidden(ids, *args, **kwargs)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits; e^-100 for the mask token."""
        logits = self.policy.head(hidden)
        return logits if self.predicts_mask else logits.masked_fill(torch.arange(TOKENS + 1) == MASK, -100.0)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, exclude_mask: bool = False) -> Tensor:
        """Straight from the logits."""
        logits = self.head(hidden) / temperature
        if exclude_mask:
            logits = logits.masked_fill(torch.arange(TOKENS + 1) == MASK, -torch.inf)
        return logits.log_softmax(-1).gather(-1, targets)

    def reference(self) -> AbstractContextManager[None]:
        """As the network."""
        return self.policy.reference()


@dataclass(frozen=True)
class Setting:
    """A sampler and a length."""

    order: str = "low_confidence"
    temperature: float = 1.0
    length: int = 4
    block_length: int = 4
    tokens_per_step: int = 1

    def sampler(self, proposal: Any = None) -> BlockSampler:
        """The project's block sampler."""
        return BlockSampler(
            completion_length=self.length,
            num_steps=self.length // self.tokens_per_step,
            block_length=self.block_length,
            temperature=self.temperature,
            guidance=0.0,
            proposal=proposal or InverseCDF(),
            confidence=ORDERS[self.order],
            commit=FixedQuota(EvenSchedule()),
            stop_at_eos=False,
        )


def rewards_of(prompts: Tensor, completions: Tensor) -> Tensor:
    """Share of neighbours in which the right token is the left one plus the prompt's first token, modulo 4."""
    right = (completions[:, 1:] - completions[:, :-1] - prompts[:, :1]) % TOKENS == 0
    return right.double().mean(1)


def prompt_batch(index: Tensor) -> PromptBatch:
    """Prompts by number."""
    ids = PROMPTS[index]
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids)))


def expected_reward(world: World, setting: Setting, prompts: Tensor = PROMPTS) -> Tensor:
    """J: the exact mean reward of the sampler over all prompts, or some, differentiable."""
    values = []
    for prompt in prompts:
        law = completion_law(world, setting.sampler(), prompt)
        values.append(law.expectation(rewards_of(prompt[None], law.canvases)))
    return torch.stack(values).mean()


def flat_gradient(value: Tensor, world: World) -> Tensor:
    """Gradient with respect to all weights in one vector."""
    gradients = torch.autograd.grad(value, list(world.parameters()), allow_unused=True)
    pairs = zip(gradients, world.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def trained_world(seed: int, length: int, steps: int = 400, obeys: float = 0.6) -> World:
    """Masked cross-entropy on sequences of which a share obeys the rule; the rest is uniform."""
    world, generator = World(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(world.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        prompts = PROMPTS[torch.randint(len(PROMPTS), (64,), generator=generator)]
        start = torch.randint(TOKENS, (64, 1), generator=generator)
        ruled = (start + torch.arange(length) * prompts[:, :1]) % TOKENS
        noise = torch.randint(TOKENS, (64, length), generator=generator)
        clean = torch.where(torch.rand(64, 1, generator=generator) < obeys, ruled, noise)
        count = torch.randint(1, length + 1, (64, 1), generator=generator)
        hidden = torch.rand(64, length, generator=generator).argsort(1) < count
        ids = torch.cat([prompts, torch.where(hidden, MASK, clean)], 1)
        logprobs = world.head(world.hidden(ids))[:, 2:].log_softmax(-1)
        loss = -(logprobs.gather(2, clean[..., None])[..., 0] * hidden / count).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return world
