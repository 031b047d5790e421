"""The block sampler: token identity with a textbook sampler, its law, and what may not move a token."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d1lit.draws import CounterDraws
from d1lit.sampling import (
    BlockSampler,
    CumulativeEntropyBounded,
    DreamSchedule,
    EntropyBounded,
    EvenSchedule,
    Factor,
    FixedQuota,
    Gumbel,
    InverseCDF,
    LeftToRight,
    Margin,
    NegativeEntropy,
    PlackettLuce,
    RandomOrder,
    RandomReveal,
    SampledLogProb,
    Threshold,
    TokenProbability,
)
from d1lit.types import MaskPredictor, PromptBatch, Rollout, Sampler


class SmallNetwork(nn.Module):
    """Two bidirectional attention layers with positions and random weights; every logit hears the whole canvas."""

    def __init__(self, seed: int, vocabulary: int = 23, width: int = 16, eos: int = 1) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=g) / shape[0] ** 0.5)  # noqa: E731
        self.embedding, self.places = draw(vocabulary, width), draw(128, width)
        self.embedding.data *= vocabulary**0.5
        self.places.data *= 128**0.5
        self.query, self.key = nn.ParameterList([draw(width, width), draw(width, width)]), draw(width, width)
        self.value = nn.ParameterList([draw(width, width), draw(width, width)])
        self.output = nn.Parameter(torch.randn(width, vocabulary, generator=g) * 0.8)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[int, ...]] = []
        self.modes: list[bool] = []
        self.largest_head = 0
        self._ids = (vocabulary - 1, eos, 0)

    @property
    def mask_token_id(self) -> int:
        return self._ids[0]

    @property
    def eos_token_id(self) -> int:
        return self._ids[1]

    @property
    def pad_token_id(self) -> int:
        return self._ids[2]

    def hidden(
        self,
        ids: Int[Tensor, "R T"],
        attention: Bool[Tensor, "R T"] | Bool[Tensor, "R T T"] | None = None,
        position_ids: Int[Tensor, "R T"] | None = None,
        keep: Int[Tensor, "R M"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "R M D"]:
        self.calls.append(tuple(ids.shape))
        self.modes.append(self.training)
        x = self.embedding[ids] + self.places[: ids.shape[1]]
        for query, value in zip(self.query, self.value, strict=True):
            scores = (x @ query) @ (x @ self.key).transpose(1, 2) / x.shape[-1] ** 0.5
            if attention is not None:
                scores = scores.masked_fill(~attention[:, None], -torch.inf)
            x = x + self.dropout(torch.tanh(scores.softmax(-1) @ (x @ value)))
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return x if keep is None else x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))

    def head(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        self.largest_head = max(self.largest_head, hidden[..., 0].numel())
        return hidden @ self.output

    def logprobs(
        self, hidden: Float[Tensor, "M D"], targets: Int[Tensor, "M J"], temperature: float = 1.0
    ) -> Float[Tensor, "M J"]:
        return (self.head(hidden) / temperature).log_softmax(-1).gather(-1, targets)

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()


def sampler(**changes: Any) -> BlockSampler:
    """Low-confidence sampling of 16 tokens in two blocks, with changes."""
    settings: dict[str, Any] = {
        "completion_length": 16,
        "num_steps": 8,
        "block_length": 8,
        "temperature": 0.0,
        "guidance": 0.0,
        "proposal": InverseCDF(),
        "confidence": TokenProbability(),
        "commit": FixedQuota(EvenSchedule()),
        "stop_at_eos": False,
    }
    return BlockSampler(**(settings | changes))


def prompts(count: int, length: int = 5, seed: int = 0, padded: bool = False, vocabulary: int = 23) -> PromptBatch:
    """Random prompts, some left-padded."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary - 1, (count, length), generator=g)
    mask = torch.ones(count, length, dtype=torch.bool)
    if padded:
        lengths = torch.randint(1, length, (count, 1), generator=g)
        mask = torch.arange(length) >= lengths
    return PromptBatch(ids.masked_fill(~mask, 0), mask, torch.arange(count), tuple({"n": n} for n in range(count)))


def textbook(
    policy: SmallNetwork, batch: PromptBatch, completion_length: int, num_steps: int, block_length: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Low-confidence sampling at temperature 0 as the papers describe it: every position, every token, every step."""
    count, start = batch.prompt_ids.shape
    mask_id = policy.mask_token_id
    ids = torch.cat([batch.prompt_ids, torch.full((count, completion_length), mask_id)], 1)
    attention = torch.cat([batch.prompt_mask, torch.ones(count, completion_length, dtype=torch.bool)], 1)
    commit_step = torch.full((count, completion_length), -1)
    blocks = completion_length // block_length
    steps = max(1, num_steps // blocks)
    for block in range(blocks):
        stop = start + (block + 1) * block_length
        for step in range(steps):
            logits = policy.head(policy.hidden(ids, attention))
            if guidance:
                blind = ids.clone()
                blind[:, :start] = mask_id
                other = policy.head(policy.hidden(blind, attention))
                logits = other + (guidance + 1) * (logits - other)
            probs = logits.softmax(-1)
            allowed = logits.clone()
            allowed[..., mask_id] = -torch.inf
            tokens = allowed.argmax(-1)
            confidence = probs.gather(-1, tokens[..., None])[..., 0]
            for row in range(count):
                masked = [p for p in range(stop) if ids[row, p] == mask_id]
                left = block_length // steps + (step < block_length % steps)
                for p in sorted(masked, key=lambda p: (-float(confidence[row, p]), p))[:left]:
                    ids[row, p] = tokens[row, p]
                    commit_step[row, p - start] = block * steps + step
    return ids[:, start:], commit_step


SHAPES = [(16, 8, 8), (16, 16, 16), (12, 10, 4), (24, 5, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_tokens_equal_a_textbook_sampler(shape: tuple[int, int, int], guidance: float) -> None:
    completion_length, num_steps, block_length = shape
    tokens = 0
    for seed in range(20 if guidance == 0 else 5):
        policy = SmallNetwork(seed).eval()
        batch = prompts(3, seed=seed, padded=seed % 2 == 1)
        with torch.no_grad():
            ids, commit_step = textbook(policy, batch, completion_length, num_steps, block_length, guidance)
        rollout = sampler(
            completion_length=completion_length, num_steps=num_steps, block_length=block_length, guidance=guidance
        )(policy, batch, 1, CounterDraws(0))
        assert torch.equal(rollout.completion_ids, ids)
        assert torch.equal(rollout.commit_step, commit_step)
        tokens += ids.numel()
    print(f"{tokens} tokens equal")


def test_only_masked_positions_of_the_active_block_reach_the_head() -> None:
    policy = SmallNetwork(0)
    rollout = sampler()(policy, prompts(3), 2, CounterDraws(0))
    assert policy.largest_head == 6 * 8
    assert rollout.num_forwards == len(policy.calls) == 8
    assert rollout.num_tokens_forward == 8 * 6 * 21


def test_protocols() -> None:
    assert isinstance(sampler(), Sampler)
    assert isinstance(SmallNetwork(0), MaskPredictor)
