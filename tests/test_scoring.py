"""`score` is a plain log-softmax at the scored positions, however views are shared, chunked and recomputed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d1lit.models import LoraSettings, Policy, add_lora
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.scoring import score
from d1lit.types import Corruption, Rollout

VOCAB, MASK = 23, 20
PROMPT, COMPLETION = 5, 7


def small_policy(dtype: torch.dtype = torch.float64, **settings: bool) -> Policy:
    config = tiny_config(VOCAB, MASK, 21, 21, 16, 2, 2, 24, 100.0, 64, init_std=0.3)
    return Policy(fresh_network(config, seed=3, dtype=dtype), head_budget=VOCAB * 8 * 3, **settings)


def rollout_of(sequences: Tensor, prompt: int, group_size: int = 1) -> Rollout:
    rows, length = sequences.shape
    zeros = torch.zeros(rows, length - prompt)
    everything = torch.ones_like(sequences, dtype=torch.bool)
    return Rollout(
        sequences[:, :prompt], everything[:, :prompt], sequences[:, prompt:], everything[:, prompt:],
        torch.arange(rows), group_size, torch.zeros(rows, length - prompt, dtype=torch.int64), zeros, zeros, zeros,
    )  # fmt: skip


def random_case(seed: int, rows: int = 4, views: int = 6, k: int = 2) -> tuple[Rollout, Corruption]:
    """Views shared at random, some used by nobody, some pairs without a view, weights with holes."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    sequences = integers(20, rows, PROMPT + COMPLETION)
    noised = integers(20, views, PROMPT + COMPLETION)
    noised[integers(2, views, PROMPT + COMPLETION).bool()] = MASK
    weight = torch.rand(rows, k, COMPLETION, generator=generator).to(torch.float64)
    weight[integers(3, rows, k, COMPLETION) == 0] = 0.0
    corruption = Corruption(
        noised, integers(views, rows, k, low=-1), integers(20, rows, k, COMPLETION), weight, PROMPT, temperature=0.7
    )
    return rollout_of(sequences, PROMPT), corruption


def longhand(policy: Policy, corruption: Corruption) -> tuple[Tensor, Tensor]:
    """Every pair by itself, through the whole network and a full log-softmax."""
    rows, k, length = corruption.target_ids.shape
    logprobs = torch.zeros(rows, k, length, dtype=torch.float64)
    entropy = torch.zeros_like(logprobs)
    for n in range(rows):
        for j in range(k):
            view = int(corruption.view_of[n, j])
            if view < 0:
                continue
            attention = None if corruption.attention is None else corruption.attention[view : view + 1]
            position_ids = None if corruption.position_ids is None else corruption.position_ids[view : view + 1]

            def logits(ids: Tensor, attention=attention, position_ids=position_ids) -> Tensor:
                return policy.head(policy.hidden(ids, attention, position_ids))[0]

            ids = corruption.noised_ids[view : view + 1]
            blind = ids.clone()
            blind[:, :PROMPT] = MASK
            mixed = logits(blind) + (corruption.guidance + 1) * (logits(ids) - logits(blind))
            if corruption.exclude_mask:
                mixed = mixed.masked_fill(torch.arange(mixed.shape[-1]) == MASK, -torch.inf)
            logp = (mixed / corruption.temperature).log_softmax(-1)
            for c in range(length):
                if corruption.weight[n, j, c] != 0:
                    row = logp[corruption.score_from + c]
                    logprobs[n, j, c] = row[corruption.target_ids[n, j, c]]
                    entropy[n, j, c] = torch.special.entr(row.exp()).sum()
    return logprobs, entropy


def gradients(policy: Policy, value: Tensor) -> list[Tensor]:
    weights = [p for p in policy.parameters() if p.requires_grad]
    seed = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return list(torch.autograd.grad((value * seed).sum(), weights))


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize(("seed", "exclude_mask"), [(0, False), (1, False), (2, False), (2, True)])
def test_scores_and_gradients_are_those_of_a_full_log_softmax(seed: int, exclude_mask: bool, guidance: float) -> None:
    policy = small_policy()
    rollout, corruption = random_case(seed)
    corruption = replace(corruption, guidance=guidance, exclude_mask=exclude_mask)
    expected, entropy = longhand(policy, corruption)
    scores = score(policy, rollout, corruption, want_entropy=True)
    torch.testing.assert_close(scores.logprobs, expected, atol=1e-10, rtol=1e-10)
    assert scores.entropy is not None
    torch.testing.assert_close(scores.entropy, entropy, atol=1e-10, rtol=1e-10)
    for ours, theirs in zip(gradients(policy, scores.logprobs), gradients(policy, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_and_recomputation_change_nothing(size: int, guidance: float) -> None:
    policy = small_policy()
    rollout, corruption = random_case(5)
    corruption = replace(corruption, guidance=guidance)
    whole = score(policy, rollout, corruption).logprobs
    parts = score(policy, rollout, corruption, views_per_chunk=size).logprobs
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(policy, parts), gradients(policy, whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_recomputation_repeats_the_dropout_of_the_first_pass() -> None:
    policy = add_lora(small_policy(torch.float32), LoraSettings("all_linear", 2, 4.0, 0.5), seed=0).train()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
    rollout, corruption = random_case(6)
    torch.manual_seed(0)
    together = gradients(policy, score(policy, rollout, corruption, views_per_chunk=1).logprobs)
    torch.manual_seed(0)
    parts = score(policy, rollout, corruption, views_per_chunk=1).logprobs
    torch.manual_seed(123)  # whatever is drawn between forward and backward
    for ours, theirs in zip(gradients(policy, parts), together, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_a_shared_view_scores_like_a_copy_for_each_rollout() -> None:
    policy, group = small_policy(), 3
    rollout, corruption = random_case(7, rows=6, views=2, k=1)
    shared = replace(corruption, view_of=torch.arange(6)[:, None] // group, weight=torch.ones_like(corruption.weight))
    copied = replace(shared, noised_ids=shared.noised_ids.repeat_interleave(group, 0), view_of=torch.arange(6)[:, None])
    a, b = score(policy, rollout, shared).logprobs, score(policy, rollout, copied).logprobs
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(policy, a), gradients(policy, b), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


class CountingPolicy(Policy):
    """Notes the shape of every forward."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.network, head_budget=policy.head_budget)
        self.shapes: list[tuple[int, int]] = []

    def hidden(self, ids, attention=None, position_ids=None, keep=None, cache=None):
        self.shapes.append((len(ids), keep.shape[1]))
        return super().hidden(ids, attention, position_ids, keep, cache)


@torch.no_grad()
def test_only_views_and_positions_that_are_scored_are_computed() -> None:
    policy = CountingPolicy(small_policy())
    rollout, corruption = random_case(8, rows=6, views=3, k=1)
    corruption = replace(corruption, view_of=torch.tensor([[0], [0], [0], [2], [2], [-1]]))
    score(policy, rollout, replace(corruption, weight=torch.ones_like(corruption.weight)))
    assert policy.shapes == [(2, COMPLETION)]  # view 1 and the row without a view never run
    # Left-to-right factorisation: one view a token, each scoring one position.
    policy.shapes.clear()
    rows = 2
    views = rows * COMPLETION
    one_each = Corruption(
        torch.full((views, PROMPT + COMPLETION), MASK),
        torch.arange(views).view(rows, COMPLETION),
        rollout.completion_ids[:rows, None].expand(-1, COMPLETION, -1),
        torch.eye(COMPLETION).expand(rows, -1, -1),
        PROMPT,
    )
    scores = score(policy, rollout_of(torch.zeros(rows, PROMPT + COMPLETION, dtype=torch.int64), PROMPT), one_each)
    assert policy.shapes == [(views, 1)]
    assert torch.equal(scores.logprobs != 0, one_each.weight != 0)


def test_left_padding_and_masks_per_query_are_honoured() -> None:
    policy = small_policy()
    rollout, corruption = random_case(9)
    generator = torch.Generator().manual_seed(0)
    for shape in [(6, PROMPT + COMPLETION), (6, PROMPT + COMPLETION, PROMPT + COMPLETION)]:
        attention = torch.rand(shape, generator=generator) > 0.3
        masked = replace(corruption, attention=attention, position_ids=torch.arange(12).flip(0).expand(6, -1))
        expected, _ = longhand(policy, masked)
        torch.testing.assert_close(score(policy, rollout, masked, views_per_chunk=2).logprobs, expected)
    everything = replace(corruption, attention=torch.ones(6, PROMPT + COMPLETION, dtype=torch.bool))
    assert torch.equal(score(policy, rollout, everything).logprobs, score(policy, rollout, corruption).logprobs)


@torch.no_grad()
def test_left_padding_does_not_change_logprobs() -> None:
    policy = small_policy(torch.float32)
    rollout, corruption = random_case(10, rows=3, views=3, k=1)
    corruption = replace(corruption, view_of=torch.arange(3)[:, None])
    pads = 4
    padded = replace(
        corruption,
        noised_ids=torch.cat((torch.full((3, pads), 21), corruption.noised_ids), 1),
        attention=torch.arange(pads + PROMPT + COMPLETION).expand(3, -1) >= pads,
        score_from=PROMPT + pads,
    )
    a, b = score(policy, rollout, corruption).logprobs, score(policy, rollout, padded).logprobs
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    seen = Policy(policy.network, attend_padding=True)
    assert (score(seen, rollout, padded).logprobs - a).abs().max() > 1e-3  # d1's unmasked pads do change them


def test_nothing_to_score_is_zero_and_needs_no_forward_but_has_gradients() -> None:
    """A micro-batch in which no token was masked: its loss has a backward pass, for which other processes wait."""
    policy = CountingPolicy(small_policy())
    rollout, corruption = random_case(12)
    corruption = replace(corruption, view_of=torch.full_like(corruption.view_of, -1))
    with torch.no_grad():
        scores = score(policy, rollout, corruption, True)
    assert not policy.shapes and not scores.logprobs.any()
    scores = score(policy, rollout, corruption, True)
    assert not scores.logprobs.any()
    assert not any(gradient.any() for gradient in gradients(policy, scores.logprobs))
