"""Replayed forwards against plain ones. Without a GPU the recorder is a stand-in that reads and writes fixed places too."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d1lit.data import EncodedRow, prompt_batch
from d1lit.draws import CounterDraws
from d1lit.models import KVCache, LoraSettings, Policy, add_lora
from d1lit.models.graphs import ForwardGraphs, Replay, Run
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.sampling import (
    BlockSampler,
    DualCache,
    EvenSchedule,
    FixedQuota,
    InverseCDF,
    PrefixCache,
    Threshold,
    TokenProbability,
)


def gpu(test: Any) -> Any:
    """Runs where there is a GPU: `pytest -m gpu`."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")(test))


MASK, EOS, VOCABULARY = 66, 65, 67


class Tape:
    """Runs again instead of replaying; what a graph could not do without being recorded anew, it does not do either."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, run: Run, pool: Any) -> tuple[Replay, list[Tensor]]:
        self.records += 1
        places = list(run())

        def replay() -> None:
            self.replays += 1
            for place, value in zip(places, run(), strict=True):
                place.copy_(value)

        for place in places:
            place.fill_(-1)  # recording computes nothing
        return replay, places


def network(shift: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    config = tiny_config(VOCABULARY, MASK, EOS, EOS, 32, 2, 2, 64, 100.0, 128, 0.3)
    config.shift = shift
    built = fresh_network(config, 0, dtype)
    torch.nn.Module.to(built, device)
    return Policy(built).eval()


def sampler(cache: Any = None, commit: Any = None, **changes: Any) -> BlockSampler:
    plain = BlockSampler(
        completion_length=16,
        num_steps=8,
        block_length=8,
        temperature=0.0,
        guidance=0.0,
        proposal=InverseCDF(),
        confidence=TokenProbability(),
        commit=commit or FixedQuota(EvenSchedule()),
        stop_at_eos=False,
        cache=cache,
    )
    return replace(plain, **changes)


def prompts(count: int, length: int, padded: bool, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(count + length)
    rows = [torch.randint(0, 60, (length - (n if padded else 0),), generator=generator).tolist() for n in range(count)]
    return prompt_batch([EncodedRow(row, {}) for row in rows], range(count), EOS).to(torch.device(device))


def with_tape(policy: Policy, **settings: Any) -> Tape:
    tape = Tape()
    policy.graphs = ForwardGraphs(device_type="cpu", record=tape, **settings)
    return tape


CASES = {
    "exact": sampler(),
    "exact, drawn": sampler(temperature=0.9),
    "guided": sampler(guidance=1.5),
    "prefix cache": sampler(PrefixCache(KVCache)),
    "dual cache": sampler(DualCache(KVCache), temperature=0.9),
    "dual cache, threshold": sampler(DualCache(KVCache), Threshold(0.2)),
    "waiting rows": sampler(rows_per_forward=2, stop_at_eos=True),
}


@pytest.mark.parametrize(
    ("name", "shift", "padded"),
    [(name, False, True) for name in CASES] + [("exact", True, False), ("dual cache", True, False)],
)
def test_the_same_tokens_and_the_same_counts(name: str, shift: bool, padded: bool) -> None:
    batches = [prompts(2, 10, padded), prompts(1, 12, padded), prompts(2, 10, padded)]
    plain, replayed = network(shift), network(shift)
    tape = with_tape(replayed)
    for number, batch in enumerate(batches):
        expected = CASES[name](plain, batch, 2, CounterDraws(number))
        found = CASES[name](replayed, batch, 2, CounterDraws(number))
        assert torch.equal(expected.completion_ids, found.completion_ids)
        assert torch.equal(expected.commit_step, found.commit_step)
        torch.testing.assert_close(expected.sampled_logprobs, found.sampled_logprobs)
        assert expected.num_forwards == found.num_forwards
    assert vars(plain.work) == vars(replayed.work)
    assert 0 < tape.records < tape.replays


def test_the_steps_of_a_block_share_a_recording() -> None:
    policy = network()
    tape = with_tape(policy)
    for seed in range(3):
        sampler()(policy, prompts(2, 10, False), 1, CounterDraws(seed))
    assert tape.records == 1, "8, 6, 4 and 2 kept positions are all filled up to 32"
    assert tape.replays == 3 * 8 - 1


def test_what_is_handed_out_is_not_written_to_again() -> None:
    policy, ids = network(), torch.randint(0, 60, (2, 9))
    with_tape(policy)
    with torch.inference_mode():
        first = [policy.hidden(ids) for _ in range(3)][-1]
        before = first.clone()
        policy.hidden(ids.flip(1))
    assert torch.equal(first, before)


def test_a_cache_that_was_overwritten_is_not_read() -> None:
    policy = network()
    with_tape(policy)
    one, other, span = torch.randint(0, 60, (2, 12)), torch.randint(0, 60, (2, 12)), torch.randint(0, 60, (2, 4))
    with torch.inference_mode():
        policy.hidden(one, cache=KVCache())  # the first of its shape runs plainly
        older, newer = KVCache(), KVCache()
        policy.hidden(one, cache=older)
        kept = older.select(torch.tensor([1]))
        policy.hidden(other, cache=newer)
        policy.hidden(span, cache=newer.at(4, 8))
        with pytest.raises(RuntimeError, match="overwrote"):
            policy.hidden(span, cache=older.at(4, 8))
        alone = KVCache()
        network().hidden(one[1:], cache=alone)
        rest = network().hidden(span[1:], cache=alone.at(4, 8))
        torch.testing.assert_close(policy.hidden(span[1:], cache=kept.at(4, 8)), rest)


def test_merged_adapter_and_trained_weights_are_seen() -> None:
    policy = add_lora(network(), LoraSettings("paper", 4, 8, 0.0), seed=1).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    tape = with_tape(policy)
    ids = torch.randint(0, 60, (2, 9))

    def check() -> None:
        with torch.inference_mode():
            found = [policy.hidden(ids) for _ in range(3)][-1]
        torch.testing.assert_close(found, policy.hidden(ids).detach())

    check()
    with policy.merged():
        check()
    assert tape.records == 2
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    check()
    assert tape.records == 2, "weights that change in place need no new recording"
    torch.nn.Module.to(policy, torch.float64)
    check()
    assert tape.records == 3 and policy.graphs is not None and policy.graphs.num_graphs == 1


def test_without_gradients_forwards_are_replayed_in_either_mode() -> None:
    policy, ids = network(), torch.randint(0, 60, (2, 9))
    tape = with_tape(policy)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        for shift in range(3):
            with mode():
                found = policy.hidden(ids + shift, cache=None)
            assert not found.requires_grad
            torch.testing.assert_close(found, network().hidden(ids + shift).detach())
    assert tape.records == 2
    with torch.no_grad():
        cache = KVCache()
        for _ in range(3):
            policy.hidden(ids, cache=cache)
    assert tape.records == 2, "caches belong to rollouts"


def test_under_autocast_a_recording_casts_the_trained_weights_anew() -> None:
    policy, ids = network(), torch.randint(0, 60, (2, 9))
    tape = with_tape(policy)
    for dtype in (torch.bfloat16, torch.float16):
        for scale in (1.0, 0.5):
            with torch.no_grad():
                policy.network.model.layers[0].mlp.up_proj.weight.mul_(scale)
            with torch.autocast("cpu", dtype):
                with torch.inference_mode():
                    found = [policy.hidden(ids) for _ in range(3)][-1]
                assert torch.equal(found, policy.hidden(ids))
    assert tape.records == 2


def test_reasons_for_falling_back_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(0, 60, (2, 9))

    def reasons(graphs: ForwardGraphs, lengths: range = range(9, 10)) -> list[str]:
        policy = network()
        policy.graphs = graphs
        caplog.clear()
        with torch.inference_mode(), caplog.at_level(logging.WARNING):
            for _ in range(3):
                for length in lengths:
                    expected = network().hidden(ids[:, :length])
                    torch.testing.assert_close(policy.hidden(ids[:, :length]), expected)
        return [record.message for record in caplog.records]

    def refuses(run: Run, pool: Any) -> tuple[Replay, list[Tensor]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    (line,) = reasons(ForwardGraphs())
    assert line == "model.cuda_graphs: the network is on cpu; forwards are launched one kernel at a time"
    (line,) = reasons(ForwardGraphs(device_type="cpu", record=refuses))
    assert "recording failed (operation not permitted when stream is capturing)" in line
    (line,) = reasons(ForwardGraphs(device_type="cpu", record=Tape(), max_graphs=2), range(4, 9))
    assert "2 shapes are recorded already" in line


def test_prompts_are_padded_up_to_a_multiple() -> None:
    rows = [EncodedRow([1, 2, 3], {}), EncodedRow([4, 5, 6, 7, 8], {})]
    plain, padded = prompt_batch(rows, range(2), EOS), prompt_batch(rows, range(2), EOS, length_multiple=4)
    assert plain.prompt_ids.shape == (2, 5) and padded.prompt_ids.shape == (2, 8)
    assert torch.equal(padded.prompt_ids[:, 3:], plain.prompt_ids)
    assert torch.equal(padded.prompt_mask[:, 3:], plain.prompt_mask) and not padded.prompt_mask[:, :3].any()
    assert torch.equal(prompt_batch(rows, range(2), EOS, 5).prompt_ids, plain.prompt_ids)
    policy = network()
    expected, found = (sampler()(policy, batch, 1, CounterDraws(0)) for batch in (plain, padded))
    assert torch.equal(expected.completion_ids, found.completion_ids)


FUSED = """
import logging, torch
from d1lit.models.kernels import PLAIN, fused
from tests.test_graphs import network
logging.basicConfig()
kernels = fused("cpu", torch.float32)
assert (kernels is PLAIN) == {fails}
plain, quick = network(), network()
quick.network.use(kernels)
ids = torch.randint(0, 60, (2, 9))
expected, found = plain.hidden(ids), quick.hidden(ids)
torch.testing.assert_close(expected, found)
# Not the sum of squares: behind a norm that is a constant, and its gradient nothing but rounding.
share = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
(expected * share).sum().backward()
(found * share).sum().backward()
for ours, theirs in zip(quick.parameters(), plain.parameters(), strict=True):
    assert (ours.grad is None) == (theirs.grad is None)
    if ours.grad is not None:
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), "the bound of every gradient here"
"""


@pytest.mark.nightly
def test_compiled_kernels_compute_the_same() -> None:
    """In a process of its own: the tests' checks of every function's shapes are nothing to compile."""
    done = subprocess.run([sys.executable, "-c", FUSED.format(fails=False)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_compiler_the_plain_kernels_run(monkeypatch, caplog) -> None:
    from d1lit.models import kernels

    def compiled(function: Any) -> Any:
        def call(*args: Any) -> Tensor:
            raise RuntimeError("no compiler found\ndetails")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with caplog.at_level(logging.WARNING):
        assert kernels.fused.__wrapped__("cpu", torch.float32) is kernels.PLAIN
    assert [r.message for r in caplog.records] == ["model.compile: no compiler found; the network runs uncompiled"]


# ------------------------------------------------------------------------------------------------------------ on a GPU


@gpu
@pytest.mark.parametrize("name", list(CASES))
def test_graphs_give_the_tokens_of_plain_forwards(name: str) -> None:
    plain, replayed = network(device="cuda"), network(device="cuda")
    replayed.graphs = ForwardGraphs()
    for seed in range(3):
        batch = prompts(3, 10, True, "cuda")
        expected = CASES[name](plain, batch, 2, CounterDraws(seed))
        found = CASES[name](replayed, batch, 2, CounterDraws(seed))
        assert torch.equal(expected.completion_ids, found.completion_ids)
    assert replayed.graphs.num_graphs > 0


@gpu
def test_draws_are_those_of_the_processor() -> None:
    rows = torch.arange(1000)
    for dtype in (torch.float32, torch.float64):
        here = CounterDraws(3).uniform("proposal", rows, (7,), step=5, dtype=dtype)
        assert torch.equal(here, CounterDraws(3).uniform("proposal", rows.cuda(), (7,), step=5, dtype=dtype).cpu())


@gpu
@pytest.mark.parametrize("cache", [None, DualCache(KVCache)], ids=["exact", "dual cache"])
def test_the_steps_of_a_block_wait_for_nothing(cache: Any) -> None:
    from d1lit.sampling.rows import lay_out

    policy, chosen = network(device="cuda", dtype=torch.bfloat16), sampler(cache, temperature=0.9)
    rows = lay_out(prompts(3, 10, True, "cuda"), 2, 16, MASK, 0)
    wave = chosen._wave(rows, dict.fromkeys(range(6), 0))
    with torch.inference_mode():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            chosen._fill_block(policy, rows, wave, CounterDraws(0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool((rows.commit_step[:, :8] >= 0).all())
