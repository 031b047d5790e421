"""Token editing: against a loop over rows, what is recorded, when it ends, and what may not move a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.losses import check_trajectory
from d1lit.models.cache import KVCache
from d1lit.sampling import (
    CommitAll,
    CreditFusion,
    DualCache,
    EvenSchedule,
    LowestConfidence,
    Threshold,
    TokenEditing,
)
from d1lit.types import PromptBatch, Rollout
from tests.end_to_end.small import small_policy
from tests.test_sampling import SmallNetwork, prompts, sampler


def editing(threshold: float = 0.0, num_checks: int = 3, commit: float = 0.2, **changes: Any) -> Any:
    return sampler(commit=Threshold(commit), edit=TokenEditing(threshold, num_checks), **changes)


def loop(network: Any, prompt: Tensor, rule: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The joint threshold for one row at temperature 0, written out: tokens, records, and the canvas after each step."""
    mask, start = network.mask_token_id, len(prompt)
    length, size = rule.completion_length, rule.block_length
    canvas = torch.cat([prompt, torch.full((length,), mask)])
    record = {"commit_step": torch.full((length,), -1), "sampled_logprobs": torch.zeros(length)}
    record |= {name: torch.zeros(length) for name in ("confidence", "entropy")}
    seen: list[Tensor] = []
    for first in range(0, length, size):
        checks = 0
        while True:
            here = range(start + first, start + first + size)
            hidden = [p for p in here if canvas[p] == mask]
            if not hidden and checks == rule.edit.num_checks:
                break
            logits = network.head(network.hidden(canvas[None]))[0]
            probs = logits.softmax(-1)
            logits[:, mask] = -torch.inf
            allowed = logits.log_softmax(-1)
            sure = {p: float(probs[p, allowed[p].argmax()]) for p in hidden}
            written = [p for p in hidden if sure[p] >= rule.commit.threshold or sure[p] == max(sure.values())]
            for p in here:
                best = int(allowed[p].argmax())
                if p not in hidden and canvas[p] != best and float(allowed[p, best].exp()) > rule.edit.threshold:
                    written.append(p)
            for p in written:
                canvas[p] = best = int(allowed[p].argmax())
                record["commit_step"][p - start] = len(seen)
                record["sampled_logprobs"][p - start] = allowed[p, best]
                record["confidence"][p - start] = probs[p, best]
                record["entropy"][p - start] = -(probs[p] * probs[p].log()).sum()
            seen.append(canvas[start:].clone())
            checks += not hidden
            if not hidden and not written:
                break
    return canvas[start:], record, seen


def num_edits(made: Rollout, mask: int) -> int:
    assert made.trace is not None
    before, after = made.trace[:-1], made.trace[1:]
    return int(((before != after) & (before != mask) & (after != mask)).sum())


@pytest.mark.parametrize(("threshold", "num_checks"), [(0.0, 3), (0.0, 0), (0.5, 8)])
@torch.no_grad()
def test_it_equals_a_loop_over_rows(threshold: float, num_checks: int) -> None:
    batch, edits = prompts(3, 5), 0
    for seed in range(2):
        network = SmallNetwork(seed).eval()
        rule = editing(threshold, num_checks, stop_at_eos=False, record_trace=True)
        made = rule(network, batch, 1, CounterDraws(0))
        assert made.trace is not None
        for row in range(3):
            tokens, record, seen = loop(network, batch.prompt_ids[row], rule)
            assert torch.equal(made.completion_ids[row], tokens)
            for name, values in record.items():
                torch.testing.assert_close(getattr(made, name)[row], values, atol=1e-5, rtol=1e-5)
            shown = made.trace[: len(seen), row]
            assert torch.equal(shown, torch.stack(seen))
            assert bool((made.trace[len(seen) :, row] == tokens).all())
        edits += num_edits(made, network.mask_token_id)
    print(f"threshold {threshold}, {num_checks} checks: {edits} edits")
    assert edits


@torch.no_grad()
def test_every_block_ends() -> None:
    """A network that never settles takes at most a step a token and the checks; one that is content, one check."""
    for num_checks in (0, 1, 5):
        network = SmallNetwork(1).eval()
        rule = editing(0.0, num_checks, commit=2.0, record_trace=True, stop_at_eos=False)
        made = rule(network, prompts(6, 5), 1, CounterDraws(0))
        assert made.trace is not None
        assert len(made.trace) <= rule.num_blocks * (rule.block_length + num_checks)
        assert bool((made.completion_ids != network.mask_token_id).all())
        assert bool((made.commit_step >= 0).all())
        if num_checks == 5:
            assert len(made.trace) > rule.num_blocks * (rule.block_length + 1)  # some row was not settled by one check
    content = editing(0.999, 5, commit=2.0)(SmallNetwork(1).eval(), prompts(6, 5), 1, CounterDraws(0))
    plain = sampler(commit=Threshold(2.0))(SmallNetwork(1).eval(), prompts(6, 5), 1, CounterDraws(0))
    assert torch.equal(content.completion_ids, plain.completion_ids)
    assert content.num_forwards == plain.num_forwards + 2  # one token a step, so all rows are checked together


@torch.no_grad()
def test_edits_are_greedy_at_any_temperature_and_draw_nothing() -> None:
    network, batch = SmallNetwork(3).eval(), prompts(8, 5)
    made = editing(0.0, 4, temperature=1.5, record_trace=True, stop_at_eos=False)(network, batch, 1, CounterDraws(0))
    assert made.trace is not None
    before, after = made.trace[:-1], made.trace[1:]
    changed = ((before != after) & (before != network.mask_token_id)).nonzero().tolist()
    assert len(changed) > 10
    for step, row, place in changed:
        canvas = torch.cat([batch.prompt_ids[row], before[step, row]])
        logits = network.head(network.hidden(canvas[None]))[0, 5 + place]
        logits[network.mask_token_id] = -torch.inf
        assert int(after[step, row, place]) == int(logits.argmax())
        if made.commit_step[row, place] == step + 1:  # the last to be written there: recorded as at temperature 0
            torch.testing.assert_close(made.sampled_logprobs[row, place], logits.log_softmax(-1).max())


@torch.no_grad()
def test_neither_neighbours_nor_padding_nor_room_move_a_token() -> None:
    policy = small_policy()
    ids = torch.tensor([[3, 4, 5, 6], [4, 4, 6, 3], [7, 9, 2, 2]])
    batch = PromptBatch(ids, torch.tensor([[True] * 4, [False] + [True] * 3, [True] * 4]), torch.arange(3))
    for temperature in (0.0, 1.0):
        whole = editing(temperature=temperature)(policy, batch, 2, CounterDraws(0))
        few = editing(temperature=temperature, rows_per_forward=2)(policy, batch, 2, CounterDraws(0))
        assert torch.equal(whole.completion_ids, few.completion_ids)
        assert torch.equal(whole.commit_step, few.commit_step)
        lone = PromptBatch(ids[1:2, 1:], batch.prompt_mask[1:2, 1:], torch.tensor([1]))
        alone = editing(temperature=temperature)(policy, lone, 2, CounterDraws(0))
        assert torch.equal(alone.completion_ids, whole.completion_ids[2:4])


@torch.no_grad()
def test_an_exact_cache_changes_nothing() -> None:
    policy, batch = small_policy(), prompts(4, 5, vocabulary=20)
    settings: dict[str, Any] = {"block_causal": True, "temperature": 1.0}
    plain = editing(**settings)(policy, batch, 1, CounterDraws(0))
    cached = editing(**settings, cache=DualCache(KVCache))(policy, batch, 1, CounterDraws(0))
    assert torch.equal(plain.completion_ids, cached.completion_ids)
    torch.testing.assert_close(plain.sampled_logprobs, cached.sampled_logprobs)
    assert cached.num_tokens_forward < plain.num_tokens_forward


def test_an_editing_sampler_has_no_steps_to_replay() -> None:
    with pytest.raises(ValueError, match=r"^estimator: TraceEstimator with TokenEditing is refused.*edits.*Try: "):
        check_trajectory(TraceEstimator(shrink=1, temperature=1.0), editing())


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, "edit: FixedQuota plans the steps"),
        ({"commit": CommitAll(), "remask": LowestConfidence(EvenSchedule())}, "edit: remask rules"),
        ({"commit": Threshold(0.9), "memory": CreditFusion(1.0, 0.2, 0.8)}, "edit: remask rules"),
        ({"commit": Threshold(0.9), "any_order": True}, "edit: remask rules"),
        ({"commit": Threshold(0.9), "cache": DualCache(KVCache)}, "edit: how far an approximate cache"),
        ({"commit": CommitAll()}, "remask: CommitAll fixes all at once"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=rf"^sampler\.{cause}.*Try: "):
        sampler(edit=TokenEditing(0.0, 16), **changes)


@pytest.mark.parametrize(
    ("threshold", "num_checks", "key"), [(1.0, 1, "threshold"), (-0.1, 1, "threshold"), (0.0, -1, "num_checks")]
)
def test_values_out_of_range_are_refused(threshold: float, num_checks: int, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^sampler\.edit\.{key}: .*Try: "):
        TokenEditing(threshold, num_checks)
