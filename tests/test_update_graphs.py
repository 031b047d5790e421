"""Replayed forward and backward passes against plain ones. Without a GPU the recorder is a stand-in, as in test_graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.models import LoraSettings, Policy, add_lora
from d1lit.models.graphs import ForwardGraphs
from d1lit.models.update_graphs import Forward, Replay
from d1lit.scoring import score
from tests.test_graphs import gpu, network
from tests.test_scoring import PROMPT, random_case


class PairTape:
    """Runs again instead of replaying, from and to fixed places; recording itself computes nothing."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, forward: Forward, backward: Replay, pool: Any) -> tuple[Replay, Replay, Tensor]:
        self.records += 1
        place = forward().clone()
        backward()

        def replay() -> None:
            self.replays += 1
            place.copy_(forward())

        place.fill_(-1)
        return replay, backward, place


def adapted(device: str = "cpu", dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Policy:
    """With an adapter that is not zero."""
    policy = add_lora(network(device=device, dtype=dtype), LoraSettings("paper", 4, 8, dropout), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy.eval()


def graphs_for(device: str, keep_multiple: int) -> tuple[ForwardGraphs, PairTape]:
    tape = PairTape()
    if device == "cuda":
        return ForwardGraphs(keep_multiple=keep_multiple), tape
    return ForwardGraphs(device_type="cpu", record_pair=tape, keep_multiple=keep_multiple), tape


def train(policy: Policy, device: str, autocast: bool) -> list[list[Tensor]]:
    """Three optimizer steps of three micro-batches of two shapes; the gradients of each step.

    Steps are short, so that a rounding of the first does not grow into another course of training.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5)
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(3):
        for micro in range(3):
            ids = torch.randint(0, 60, (2, 12 + micro % 2), generator=generator).to(device)
            seen = (torch.arange(ids.shape[1]) >= 2).expand(ids.shape).to(device)
            keep = torch.randint(0, 12, (2, 5), generator=generator).to(device)
            weight = torch.randn(2, 5, 32, generator=generator).to(device)
            with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
                hidden = policy.hidden(ids, seen, keep=keep)
            (hidden.float() * weight).mean().backward()
        found.append([parameter.grad.clone() for parameter in trained if parameter.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    return found


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Of the gradients of any parameter, relative to its norm (or to a hundredth of the largest parameter's)."""
    assert len(one) == len(other) > 0
    least = 0.01 * max(float(theirs.norm()) for theirs in other)
    pairs = zip(one, other, strict=True)
    return max(float((ours - theirs).norm()) / max(float(theirs.norm()), least) for ours, theirs in pairs)


ROUNDING = {False: 1e-4, True: 5e-2}
"""Under autocast products are in bfloat16, which has eight bits: a rounding is 4e-3, and there are some in a row."""


def compare(device: str, make: Callable[[], Policy], autocast: bool, keep_multiple: int) -> None:
    plain, replayed = make(), make()
    replayed.graphs, tape = graphs_for(device, keep_multiple)
    expected, found = train(plain, device, autocast), train(replayed, device, autocast)
    assert replayed.graphs.num_graphs == 2
    assert device == "cuda" or tape.replays == 9 - 2, "all but the first of each shape"
    for ours, theirs in zip(found, expected, strict=True):
        # Products of another shape, or by another of a GPU's algorithms, round otherwise.
        assert largest_difference(ours, theirs) <= (0 if keep_multiple == 1 and device == "cpu" else ROUNDING[autocast])
    assert vars(plain.work) == vars(replayed.work)


@pytest.mark.parametrize("keep_multiple", [1, 32])
@pytest.mark.parametrize(("make", "autocast"), [(adapted, False), (adapted, True), (network, False)])
def test_gradients_are_those_of_plain_passes(make: Callable[[], Policy], autocast: bool, keep_multiple: int) -> None:
    compare("cpu", make, autocast, keep_multiple)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fault", ["a kept position", "a micro-batch", "rounding"])
def test_the_comparison_tells_a_fault_from_rounding(fault: str, autocast: bool, monkeypatch) -> None:
    """Rounding of the size of a number type passes; one of thirty kept positions left out does not."""
    hidden, calls = Policy.hidden, []

    def faulty(policy: Policy, ids: Tensor, attention: Tensor | None, keep: Tensor) -> Tensor:
        result = hidden(policy, ids, attention, keep=keep)
        calls.append(ids)
        if fault == "rounding":
            noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(len(calls)))
            return result * (1 + noise * (2.0**-9 if autocast else 2.0**-24))
        if len(calls) != 5:
            return result
        blind = torch.ones(result.shape)
        blind[(0, 1) if fault == "a kept position" else slice(None)] = 0
        return result * blind + (result * (1 - blind)).detach()

    expected = train(adapted(), "cpu", autocast)
    monkeypatch.setattr(Policy, "hidden", faulty)
    found = train(adapted(), "cpu", autocast)
    differences = [largest_difference(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    assert (max(differences) <= ROUNDING[autocast]) == (fault == "rounding"), differences


def reasons(policy: Policy, run: Callable[[Policy], Tensor], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged while the gradients stay those of plain passes."""
    policy.graphs, _ = graphs_for("cpu", 32)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            gradients = []
            for graphs in (policy.graphs, None):
                kept, policy.graphs = policy.graphs, graphs
                torch.manual_seed(0)
                run(policy).backward()
                policy.graphs = kept
                gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
                policy.zero_grad()
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return [record.message for record in caplog.records]


def test_what_cannot_be_replayed_runs_plainly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    rollout, corruption = random_case(0)

    def once(policy: Policy) -> Tensor:
        return policy.hidden(ids).square().sum()

    def twice(policy: Policy) -> Tensor:
        return (policy.hidden(ids) * policy.hidden(ids.flip(1))).sum()

    def in_chunks(policy: Policy) -> Tensor:
        return score(policy, rollout, corruption, views_per_chunk=2).logprobs.sum()

    assert reasons(adapted(), once, caplog) == []
    (line,) = reasons(adapted(), twice, caplog)
    assert "backward pass of the forward before is still to come" in line
    (line,) = reasons(adapted(), in_chunks, caplog)
    assert "recomputed or kept elsewhere" in line
    dropping = adapted(dropout=0.5).train()
    (line,) = reasons(dropping, once, caplog)
    assert "dropout" in line
    dropping.graphs, _ = graphs_for("cpu", 32)
    with torch.no_grad():
        found = [dropping.hidden(ids) for _ in range(4)]
    assert dropping.graphs.num_graphs == 0 and not torch.equal(found[2], found[3])
    recomputing = adapted().train()
    recomputing.network.gradient_checkpointing_enable({"use_reentrant": False})
    (line,) = reasons(recomputing, once, caplog)
    assert "model.gradient_checkpointing" in line


def test_a_forward_without_a_backward_pass_is_no_hindrance_and_a_second_backward_pass_is_an_error() -> None:
    policy, ids = adapted(), torch.randint(0, 60, (2, 9))
    policy.graphs, tape = graphs_for("cpu", 32)
    for _ in range(4):
        policy.hidden(ids)
    assert tape.replays == 3
    loss = policy.hidden(ids).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after its first backward pass"):
        loss.backward()


def test_weights_that_move_are_noticed_and_failures_leave_rollouts_alone(caplog: pytest.LogCaptureFixture) -> None:
    policy, ids = adapted(), torch.randint(0, 60, (2, 9))
    policy.graphs, tape = graphs_for("cpu", 32)
    for _ in range(3):
        policy.hidden(ids).sum().backward()
    torch.nn.Module.to(policy, torch.float64)
    for _ in range(3):
        found = policy.hidden(ids)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, policy.network.hidden(ids))
    assert tape.records == 2

    def refuses(forward: Forward, backward: Replay, pool: Any) -> tuple[Replay, Replay, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    policy.graphs = ForwardGraphs(device_type="cpu", record_pair=refuses, record=lambda run, pool: (run, run()))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            policy.hidden(ids).sum().backward()
    assert [r.message for r in caplog.records] == [
        "model.cuda_graphs: recording an update failed (operation not permitted when stream is capturing); "
        "forwards are launched one kernel at a time"
    ]
    with torch.inference_mode():
        for _ in range(3):
            policy.hidden(ids)
    assert policy.graphs.num_graphs == 1


# ------------------------------------------------------------------------------------------------------------ on a GPU


@gpu
@pytest.mark.parametrize("keep_multiple", [1, 32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "all weights"])
def test_graphs_give_the_gradients_of_plain_passes(whole: bool, autocast: bool, keep_multiple: int) -> None:
    compare("cuda", lambda: network(device="cuda") if whole else adapted("cuda"), autocast, keep_multiple)


@gpu
def test_guided_and_chunked_scores_on_a_gpu() -> None:
    from dataclasses import replace

    rollout, corruption = random_case(0)
    corruption = replace(
        corruption, noised_ids=corruption.noised_ids.cuda(), view_of=corruption.view_of.cuda(), guidance=0.5,
        target_ids=corruption.target_ids.cuda(), weight=corruption.weight.float().cuda(),
    )  # fmt: skip
    assert rollout.prompt_ids.shape[1] == PROMPT
    plain, replayed = adapted("cuda"), adapted("cuda")
    replayed.graphs = ForwardGraphs()
    for views_per_chunk in (None, 2):
        for _ in range(3):
            for policy in (plain, replayed):
                score(policy, rollout, corruption, views_per_chunk=views_per_chunk).logprobs.sum().backward()
    for ours, theirs in zip(replayed.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
