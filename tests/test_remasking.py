"""Samplers that remask or remember earlier steps: against loops, closed forms, and what may not move a token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.losses.compatibility import check_trajectory
from d1lit.models.cache import KVCache
from d1lit.sampling import (
    CommitAll,
    CreditFusion,
    DualCache,
    EvenSchedule,
    FixedQuota,
    LowestConfidence,
    PredictionChange,
    PrefixCache,
    ReMDM,
    StableThreshold,
    Threshold,
    Unverified,
    WinoThreshold,
    remdm,
)
from d1lit.sampling.commit import even_quotas
from d1lit.types import PromptBatch
from tests.end_to_end.small import small_policy
from tests.test_sampling import SmallNetwork, prompts, sampler


def greedy_step(network: Any, canvas: Tensor) -> tuple[Tensor, Tensor]:
    """Most probable tokens (never the mask) and their probabilities at every place of one row."""
    probs = network.head(network.hidden(canvas[None]))[0].softmax(-1)
    allowed = probs.clone()
    allowed[:, network.mask_token_id] = -1
    tokens = allowed.argmax(-1)
    return tokens, probs.gather(1, tokens[:, None])[:, 0]


def one_prompt(batch: PromptBatch, row: int) -> Tensor:
    return batch.prompt_ids[row]


def rcr_loop(network: Any, prompt: Tensor, length: int, block: int, steps: int) -> Tensor:
    """RCR for one row, written out."""
    mask, start = network.mask_token_id, len(prompt)
    canvas = torch.cat([prompt, torch.full((length,), mask)])
    kept = torch.zeros(length)
    for first in range(0, length, block):
        quotas = even_quotas(block, steps)
        for step in range(steps):
            tokens, confidence = greedy_step(network, canvas)
            for p in range(first, first + block):
                if canvas[start + p] == mask:
                    canvas[start + p], kept[p] = tokens[start + p], confidence[start + p]
            order = sorted(range(first, first + block), key=lambda p: (float(kept[p]), p))
            for p in order[: sum(quotas[step + 1 :])]:
                canvas[start + p] = mask
    return canvas[start:]


def klass_loop(network: Any, prompt: Tensor, length: int, block: int, steps: int, rule: StableThreshold) -> Tensor:
    """KLASS with a history of two for one row, each block beginning anew, written out."""
    mask, start = network.mask_token_id, len(prompt)
    canvas = torch.cat([prompt, torch.full((length,), mask)])
    for first in range(0, length, block):
        seen: list[Tensor] = []
        step = 0
        while bool((canvas[start + first : start + first + block] == mask).any()):
            probs = network.head(network.hidden(canvas[None]))[0].softmax(-1)[start:]
            tokens, confidence = (value[start:] for value in greedy_step(network, canvas))
            open_ = [p for p in range(first, first + block) if canvas[start + p] == mask]
            ready = []
            for p in open_:
                if len(seen) < 2 or confidence[p] <= rule.threshold:
                    continue
                kls = [(b[p] * (b[p] / a[p]).log()).sum() for a, b in ((seen[-2], seen[-1]), (seen[-1], probs))]
                ready += [p] if max(kls) < rule.kl_threshold else []
            quota = even_quotas(block, steps)[min(step, steps - 1)]
            best = sorted(open_, key=lambda p: -float(confidence[p]))[: max(1, quota)]
            for p in ready or best:
                canvas[start + p] = tokens[p]
            seen.append(probs)
            step += 1
    return canvas[start:]


@torch.no_grad()
def test_rcr_equals_a_loop_over_rows() -> None:
    batch, moved = prompts(3, 5), 0
    for seed in range(6):
        network = SmallNetwork(seed).eval()
        rcr = sampler(commit=CommitAll(), remask=LowestConfidence(EvenSchedule()))
        made = rcr(network, batch, 1, CounterDraws(0))
        for row in range(3):
            assert torch.equal(made.completion_ids[row], rcr_loop(network, one_prompt(batch, row), 16, 8, 4))
        plain = sampler()(network, batch, 1, CounterDraws(0))
        assert made.num_forwards == plain.num_forwards
        moved += int((made.commit_step != plain.commit_step).sum())
    assert moved  # some token was fixed early and remasked later


@torch.no_grad()
def test_klass_equals_a_loop_over_rows() -> None:
    network, batch = SmallNetwork(5).eval(), prompts(3, 5)
    rule = StableThreshold(threshold=0.15, kl_threshold=0.5, most_stable_only=False)
    made = sampler(num_steps=16, commit=rule, memory=PredictionChange(2, looks_ahead=False))(
        network, batch, 1, CounterDraws(0)
    )
    for row in range(3):
        assert torch.equal(made.completion_ids[row], klass_loop(network, one_prompt(batch, row), 16, 8, 8, rule))
    assert made.num_forwards < 16  # some steps fixed more than one token


@torch.no_grad()
def test_wino_ends_verifies_and_leaves_the_canvas_alone() -> None:
    policy = small_policy()
    ids = torch.tensor([[3, 4, 5, 6], [4, 4, 6, 3]])
    batch = PromptBatch(ids, torch.tensor([[True] * 4, [False] + [True] * 3]), torch.arange(2))
    draft = WinoThreshold(0.05, share=0.7, least=5, most=20)
    plain = sampler(commit=draft)(policy, batch, 1, CounterDraws(0))
    never = sampler(commit=draft, remask=Unverified(0.0))(policy, batch, 1, CounterDraws(0))
    # Nobody sees the hidden copy: with nothing to remask the draft's tokens and confidences are those without it.
    assert torch.equal(plain.completion_ids, never.completion_ids)
    torch.testing.assert_close(plain.confidence, never.confidence)
    assert never.num_tokens_forward > plain.num_tokens_forward
    always = sampler(commit=draft, remask=Unverified(1.1), record_trace=True)(policy, batch, 1, CounterDraws(0))
    assert bool((always.completion_ids != policy.mask_token_id).all())
    assert always.trace is not None and len(always.trace) <= 16  # no more steps than tokens
    masked = (always.trace == policy.mask_token_id).sum(2)
    assert bool((masked.diff(dim=0) >= 0).any()) or len(always.trace) > len(plain.commit_step[0].unique())
    alone = sampler(commit=draft, remask=Unverified(1.1))(
        policy, PromptBatch(ids[1:, 1:], batch.prompt_mask[1:, 1:], torch.tensor([1])), 1, CounterDraws(0)
    )
    assert torch.equal(alone.completion_ids[0], always.completion_ids[1])


@torch.no_grad()
def test_a_verified_probability_is_that_of_the_token_hidden_from_the_network() -> None:
    """In a block of one the hidden copy sees all but its own token: the token's probability with itself masked."""
    policy = small_policy()
    seen: list[Tensor] = []

    class Watching:
        verifies, runs_all_steps = True, True

        def remask(self, standing):
            seen.append(standing.verified)
            return torch.zeros_like(standing.cells.candidates)

    ids = torch.tensor([[3, 4, 5]])
    made = sampler(completion_length=2, block_length=2, num_steps=2, commit=FixedTwo(), remask=Watching())(
        policy, PromptBatch(ids, torch.ones_like(ids).bool(), torch.arange(1)), 1, CounterDraws(0)
    )
    assert seen[-1] is not None
    # Step 2 stood with the leftmost token fixed; its copy saw the prompt, the other place's mask and its copy's mask.
    canvas = torch.cat([ids, torch.full((1, 2), policy.mask_token_id)], 1)
    layout = torch.cat([canvas, torch.full((1, 2), policy.mask_token_id)], 1)
    layout[0, 3] = made.completion_ids[0, 0]
    attention = torch.zeros(1, 7, 7, dtype=torch.bool)
    attention[0, :5, :5] = True
    attention[0, 5:] = True
    attention[0, 5, 3] = attention[0, 6, 4] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    logits = policy.head(policy.hidden(layout, attention, positions))
    expected = logits[0, 5].softmax(-1)[made.completion_ids[0, 0]]
    torch.testing.assert_close(seen[-1][0, 0], expected)


class FixedTwo:
    """Leftmost token first, one a step."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        return None

    def select(self, scores: Tensor, cells: Any) -> Tensor:
        return cells.candidates & (cells.candidates.cumsum(1) == 1)


@pytest.mark.parametrize(
    "rule",
    [
        ReMDM(partial(remdm.capped, eta=0.3), eps=0.01),
        ReMDM(partial(remdm.rescaled, eta=0.5), eps=0.01),
        ReMDM(remdm.forward_backward, eps=0.1),
        ReMDM(partial(remdm.capped, eta=0.2), eps=0.01, loop=remdm.Loop(t_on=0.7, t_off=0.3, alpha_on=0.6)),
    ],
    ids=["cap", "rescale", "forward_backward", "loop"],
)
@torch.no_grad()
def test_remdm_leaves_the_marginals_alone(rule: ReMDM) -> None:
    """Whatever sigma, the share of masked tokens after each step is 1 - alpha of its time."""
    network, steps, rows, length = SmallNetwork(1, vocabulary=7, width=4), 8, 400, 8
    made = sampler(
        completion_length=length, block_length=length, num_steps=steps, commit=rule, remask=rule, record_trace=True
    )(network, prompts(rows, 2, vocabulary=7), 1, CounterDraws(7))
    assert made.trace is not None and len(made.trace) == steps
    times = torch.linspace(1, rule.eps, steps + 1, dtype=torch.float64).tolist()
    given_back = 0
    for step in range(steps - 1):
        masked = made.trace[step] == network.mask_token_id
        alpha = 1 - times[step + 1] if rule.loop is None else rule.loop.alpha(times[step + 1])
        if rule.loop is not None and rule.loop.t_off < times[step] <= rule.loop.t_on:
            alpha = rule.loop.alpha_on
        error = (alpha * (1 - alpha) / (rows * length)) ** 0.5
        assert abs(float(masked.float().mean()) - (1 - alpha)) < 4.5 * error + 1e-9, step
        if step:
            given_back += int((masked & (made.trace[step - 1] != network.mask_token_id)).sum())
    assert given_back > 50
    assert bool((made.trace[-1] != network.mask_token_id).all())


@torch.no_grad()
def test_credit_moves_towards_what_came_out_on_top() -> None:
    network, batch = SmallNetwork(2), prompts(4, 5)
    plain = sampler()(network, batch, 1, CounterDraws(0))
    none = sampler(memory=CreditFusion(alpha=0.0, gamma=0.2, decay=0.8))(network, batch, 1, CounterDraws(0))
    assert torch.equal(plain.completion_ids, none.completion_ids)
    much = sampler(memory=CreditFusion(alpha=3.0, gamma=0.2, decay=0.8))(network, batch, 1, CounterDraws(0))
    assert float(much.confidence.mean()) > float(plain.confidence.mean())
    few = sampler(memory=CreditFusion(alpha=3.0, gamma=0.2, decay=0.8), rows_per_forward=1)
    assert torch.equal(few(network, batch, 1, CounterDraws(0)).completion_ids, much.completion_ids)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"remask": Unverified(0.9)}, "remask: FixedQuota fixes so many"),
        ({"commit": CommitAll()}, "remask: CommitAll fixes all at once"),
        (
            {"commit": Threshold(0.9), "remask": Unverified(0.9), "guidance": 1.0},
            "remask: Unverified lays a hidden copy",
        ),
        ({"commit": Threshold(0.9), "memory": PredictionChange(2, True)}, "memory: StableThreshold reads"),
        ({"commit": StableThreshold(0.9, 0.01, False)}, "memory: StableThreshold reads"),
        (
            {
                "commit": StableThreshold(0.9, 0.01, False),
                "memory": PredictionChange(2, True),
                "cache": DualCache(lambda: None),  # type: ignore[arg-type, return-value]
            },
            "cache: a memory that looks beyond",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=rf"^sampler\.{cause}.*Try: "):
        sampler(**changes)


def test_a_shifted_network_cannot_verify() -> None:
    policy = small_policy()
    policy.network.config.shift = True
    wino = sampler(commit=Threshold(0.9), remask=Unverified(0.9))
    with pytest.raises(ValueError, match=r"^sampler\.remask: Unverified needs a network .*Try: "):
        wino(policy, prompts(1, 4), 1, CounterDraws(0))


def test_a_sampler_that_remasks_has_no_steps_to_replay() -> None:
    giving = sampler(commit=CommitAll(), remask=LowestConfidence(EvenSchedule()))
    with pytest.raises(ValueError, match=r"^estimator: TraceEstimator .*LowestConfidence.*Try: "):
        check_trajectory(TraceEstimator(shrink=1, temperature=1.0), giving)
    check_trajectory(TraceEstimator(shrink=1, temperature=1.0), sampler(commit=FixedQuota(EvenSchedule())))


# ------------------------------------------------------------------------------------------- block diffusion decoding


@torch.no_grad()
def test_block_diffusion_decoding_equals_a_loop_over_truncated_sequences() -> None:
    """Each block is decoded as if nothing stood behind it, and a cache changes nothing."""
    policy = small_policy()
    ids = torch.tensor([[3, 4, 5, 6], [4, 4, 6, 3], [7, 9, 2, 2]])
    batch = PromptBatch(ids, torch.ones_like(ids).bool(), torch.arange(3))
    settings: dict[str, Any] = {"completion_length": 12, "block_length": 4, "num_steps": 6, "block_causal": True}
    made = sampler(**settings)(policy, batch, 1, CounterDraws(0))
    for row in range(3):
        canvas = ids[row]
        for _ in range(3):
            first = len(canvas)
            canvas = torch.cat([canvas, torch.full((4,), policy.mask_token_id)])
            block = ((torch.arange(len(canvas)) - 4) // 4).clamp(min=-1)
            attention = (block[None, :] <= block[:, None])[None]
            for _ in range(2):
                probs = policy.head(policy.hidden(canvas[None], attention))[0].softmax(-1)
                probs[:, policy.mask_token_id] = 0
                best, token = probs.max(-1)
                best = torch.where(canvas == policy.mask_token_id, best, -1.0)
                for place in best[first:].argsort(descending=True, stable=True)[:2].tolist():
                    canvas[first + place] = token[first + place]
        assert torch.equal(made.completion_ids[row], canvas[4:])
    plain = sampler(**{**settings, "block_causal": False})(policy, batch, 1, CounterDraws(0))
    assert not torch.equal(plain.completion_ids, made.completion_ids)
    padded = PromptBatch(
        torch.cat([torch.zeros(3, 2, dtype=torch.int64), ids], 1),
        torch.cat([torch.zeros(3, 2), torch.ones(3, 4)], 1).bool(),
        batch.row_ids,
    )
    assert torch.equal(sampler(**settings)(policy, padded, 1, CounterDraws(0)).completion_ids, made.completion_ids)
    for cache in (PrefixCache(KVCache), DualCache(KVCache)):
        cached = sampler(**settings, cache=cache)
        got = cached(policy, batch, 1, CounterDraws(0))
        assert not cached.is_approximate
        assert torch.equal(got.completion_ids, made.completion_ids)
        torch.testing.assert_close(got.sampled_logprobs, made.sampled_logprobs)
        assert got.num_tokens_forward < made.num_tokens_forward
