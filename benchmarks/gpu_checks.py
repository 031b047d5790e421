"""What has to be right on a GPU before its speed means anything: each check gives its figures and a verdict.

Run by `gpu.py`. On a CPU the checks run as well (a test does so), with plain forwards where there is nothing to record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import textbook
import torch
from measuring import random_prompts, relative_difference
from scoring import random_rows
from torch.profiler import ProfilerActivity, profile

from d1lit.draws import CounterDraws
from d1lit.models import KVCache, Policy
from d1lit.models.graphs import ForwardGraphs
from d1lit.models.kernels import PLAIN, fused
from d1lit.models.presets import fresh_network, tiny_config
from d1lit.sampling import BlockSampler, DualCache, EvenSchedule, FixedQuota, InverseCDF, TokenProbability
from d1lit.sampling.parts import Prediction
from d1lit.sampling.rows import lay_out
from d1lit.scoring import score

Check = Callable[["Bench"], dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """A small network on the CPU, from which every check makes its own."""

    device: str
    is_tiny: bool

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Vocabulary, prompt, completion."""
        return (67, 8, 16) if self.is_tiny else (4096, 40, 64)

    def policy(self, dtype: torch.dtype, device: str | None = None) -> Policy:
        """The same weights in a number type on a device."""
        vocabulary, _, _ = self.lengths
        width, layers = (64, 2) if self.is_tiny else (512, 6)
        mask, eos = vocabulary - 1, vocabulary - 2
        config = tiny_config(vocabulary, mask, eos, eos, width, layers, width // 64, 3 * width, 1e4, 4096, 0.05)
        network = fresh_network(config, 0)
        with torch.no_grad():
            network.head_weight[-1] = 0.0
        torch.nn.Module.to(network, device or self.device, dtype)
        return Policy(network).eval()

    def sampler(self, temperature: float, cached: bool) -> BlockSampler:
        """Four tokens a step."""
        _, _, completion = self.lengths
        return BlockSampler(
            completion, completion // 4, completion // 2, temperature, 0.0, InverseCDF(), TokenProbability(),
            FixedQuota(EvenSchedule()), False, DualCache(KVCache) if cached else None,
        )  # fmt: skip


def draws_are_equal(bench: Bench) -> dict[str, Any]:
    """Counter-based numbers on the device and on the CPU, bit for bit."""
    rows = torch.arange(4096)
    different = 0
    for dtype in (torch.float32, torch.float64):
        here, there = (
            CounterDraws(7, 3, 2).uniform("proposal", ids, (65,), step=9, dtype=dtype).cpu()
            for ids in (rows, rows.to(bench.device))
        )
        different += int((here != there).sum())
    return {"numbers": 2 * 4096 * 65, "different": different, "ok": different == 0}


def scoring_is_right(bench: Bench) -> dict[str, Any]:
    """Log-probabilities and gradients of the device in fp32 and bf16 against float64 on the CPU."""
    _, prompt, completion = bench.lengths

    @dataclass(frozen=True)
    class Case:
        size: Any
        groups: int = 1
        group_size: int = 3
        prompt_length: int = prompt
        completion_length: int = completion

    exact = bench.policy(torch.float64, "cpu")
    case = Case(exact.shape)
    rows = random_rows(exact, case, "cpu")
    weights = torch.rand(rows.rollout.completion_ids.shape, generator=torch.Generator().manual_seed(4))

    def run(policy: Policy, plainly: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        own = random_rows(policy, case, policy.device.type)
        if plainly:
            values = textbook.completion_logprobs(policy, own.noised_ids, own.rollout.completion_ids)
        else:
            values = score(policy, own.rollout, own.corruption).logprobs[:, 0]
        matrices = [p for p in policy.network.model.layers.parameters() if p.dim() == 2]
        loss = (values * weights.to(values.device, values.dtype)).sum()
        return values.detach().cpu().double(), [g.cpu() for g in torch.autograd.grad(loss, matrices)]

    truth, true_gradients = run(exact, plainly=True)
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, plainly in (("ours", False), ("textbook", True)):
            policy = bench.policy(dtype)
            policy.network.head_weight.requires_grad_(False)
            values, gradients = run(policy, plainly)
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            result[f"{label}: largest difference, nats"] = float((values - truth).abs().max())
            result[f"{label}: gradient, relative"] = relative_difference(gradients, true_gradients)
    result["ok"] = (
        result["float32 ours: largest difference, nats"] < 1e-4
        and result["float32 ours: gradient, relative"] < 1e-3
        and result["bfloat16 ours: gradient, relative"] < 1.5 * result["bfloat16 textbook: gradient, relative"]
    )
    return result


def replays_are_equal(bench: Bench) -> dict[str, Any]:
    """Tokens with recorded forwards against plain ones, and plain ones in fp32 against the CPU's.

    With the kept positions as they are, the same kernels run and every token must be equal. Filled up to a multiple of
    32, as by default, products have another shape and may round otherwise: in bf16 one tie that falls the other way
    changes all that follows in its row, so the share of equal tokens is a figure there and no verdict.
    """
    _, prompt, completion = bench.lengths
    prompts = random_prompts(4, prompt, bench.lengths[0], bench.device)
    result: dict[str, Any] = {"tokens": 3 * 8 * completion}
    same_shape, filled_up = [], []
    for dtype, cached, temperature in product((torch.float32, torch.bfloat16), (False, True), (0.0, 0.9)):
        plain, sampler = bench.policy(dtype), bench.sampler(temperature, cached)
        expected = [sampler(plain, prompts, 2, CounterDraws(seed)).completion_ids for seed in range(3)]
        for multiple in (1, 32):
            replayed = bench.policy(dtype)
            replayed.graphs = ForwardGraphs(keep_multiple=multiple)
            found = [sampler(replayed, prompts, 2, CounterDraws(seed)).completion_ids for seed in range(3)]
            equal = sum(int((a == b).sum()) for a, b in zip(found, expected, strict=True)) / result["tokens"]
            name = f"{str(dtype)[6:]}, {'dual cache' if cached else 'exact'}, T {temperature}, multiple {multiple}"
            result[name] = f"{equal:.3f} ({replayed.graphs.num_graphs} graphs)"
            if multiple == 1:
                same_shape.append(equal)
            elif dtype == torch.float32:
                filled_up.append(equal)
    here = random_prompts(4, prompt, bench.lengths[0], "cpu")
    sampler = bench.sampler(0.0, False)
    tokens = sampler(bench.policy(torch.float32), prompts, 1, CounterDraws(0)).completion_ids.cpu()
    expected_here = sampler(bench.policy(torch.float32, "cpu"), here, 1, CounterDraws(0)).completion_ids
    result["fp32 against the CPU, T 0"] = float((tokens == expected_here).float().mean())
    result["ok"] = min(same_shape) == 1.0 and min(filled_up) > 0.97 and result["fp32 against the CPU, T 0"] > 0.97
    return result


def draws_follow_the_law(bench: Bench) -> dict[str, Any]:
    """Chi-square of the inverse CDF at temperature 0.9 on the device: smallest p of six seeds."""
    vocabulary, cells = (4001, 400_000) if bench.device == "cuda" else (101, 20_000)
    kinds = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0])
    logits = torch.full((vocabulary,), -20.0)
    places = torch.linspace(0, vocabulary - 2, len(kinds)).long()
    logits[places] = kinds
    expected = torch.softmax(kinds.double() / 0.9, 0)
    logits = logits.to(bench.device)
    values = []
    for seed in range(6):
        counts = torch.zeros(vocabulary, dtype=torch.float64)
        for part in torch.arange(cells, device=bench.device).split(20_000):
            uniforms = CounterDraws(seed).uniform("proposal", part, ())
            many = logits.expand(len(part), -1)
            prediction = Prediction(many, many, vocabulary - 1)
            drawn = InverseCDF().draw(prediction, 0.9, uniforms).tokens
            counts += torch.bincount(drawn, minlength=vocabulary).cpu().double()
        found = counts[places]
        statistic = ((found - cells * expected) ** 2 / (cells * expected)).sum()
        degrees = torch.tensor((len(kinds) - 1) / 2, dtype=torch.float64)
        values.append(float(torch.special.gammaincc(degrees, statistic / 2)))
    return {"cells": cells, "p": [round(value, 4) for value in values], "ok": min(values) > 1e-3}


def steps_wait_for_nothing(bench: Bench) -> dict[str, Any]:
    """A block's steps under torch's check for synchronisation, plain and recorded, exact and cached."""
    if bench.device != "cuda":
        return {"ok": True, "note": "nothing to wait for without a GPU"}
    _, prompt, completion = bench.lengths
    done = []
    for cached in (False, True):
        for replays in (False, True):
            policy, sampler = bench.policy(torch.bfloat16), bench.sampler(0.9, cached)
            prompts = random_prompts(4, prompt, bench.lengths[0], bench.device)
            if replays:
                policy.graphs = ForwardGraphs()
                for _ in range(3):
                    sampler(policy, prompts, 2, CounterDraws(0))
            with torch.inference_mode():
                rows = lay_out(prompts, 2, completion, policy.mask_token_id, 0)
                wave = sampler._wave(rows, dict.fromkeys(range(8), 0))
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    sampler._fill_block(policy, rows, wave, CounterDraws(0))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            done.append(f"{'dual cache' if cached else 'exact'}{', replayed' if replays else ''}")
    return {"without a wait": done, "ok": len(done) == 4}


def attention_kernels(bench: Bench) -> dict[str, Any]:
    """Which attention kernel runs with nothing hidden, with padded prompts, and with the mask ignored as d1 does."""
    _, prompt, _ = bench.lengths
    policy = bench.policy(torch.bfloat16)
    ids = random_prompts(4, prompt, bench.lengths[0], bench.device).prompt_ids
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[0, :3] = False
    result: dict[str, Any] = {}
    for name, mask in (("nothing hidden", None), ("padded", seen)):
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device == "cuda" else [])
        with torch.inference_mode(), profile(activities=activities) as recorded:
            policy.hidden(ids, mask)
        words = ("flash", "fmha", "attention", "cudnn")
        names = {event.key for event in recorded.key_averages() if any(word in event.key.lower() for word in words)}
        result[name] = sorted(key[:90] for key in names if key != "aten::scaled_dot_product_attention")
    return {**result, "ok": bool(result["nothing hidden"])}


def fused_kernels_agree(bench: Bench) -> dict[str, Any]:
    """Hidden states with compiled elementwise work against plain, both against float64."""
    if bench.device != "cuda":
        return {"ok": True, "note": "compiled on a GPU only: on a CPU it takes minutes"}
    _, prompt, _ = bench.lengths
    result: dict[str, Any] = {}
    ids = random_prompts(4, prompt, bench.lengths[0], "cpu").prompt_ids
    with torch.inference_mode():
        truth = bench.policy(torch.float64, "cpu").hidden(ids)
        for dtype in (torch.float32, torch.bfloat16):
            kernels = fused(bench.device, dtype)
            for name, chosen in (("plain", PLAIN), ("fused", kernels)):
                policy = bench.policy(dtype)
                policy.network.use(chosen)
                found = policy.hidden(ids.to(bench.device)).cpu()
                result[f"{str(dtype)[6:]} {name}, relative"] = relative_difference([found], [truth])
            result[f"{str(dtype)[6:]} is compiled"] = kernels is not PLAIN
    result["ok"] = result["bfloat16 is compiled"] and (
        result["bfloat16 fused, relative"] < 1.2 * result["bfloat16 plain, relative"]
        and result["float32 fused, relative"] < 1e-5
    )
    return result


QUICK = ("scoring against float64", "replayed forwards give the same tokens")
"""What `gpu.py --only quick_checks` runs."""
CHECKS: dict[str, Check] = {
    "draws on the device = draws on the CPU": draws_are_equal,
    "scoring against float64": scoring_is_right,
    "attention kernels": attention_kernels,
    "a block's steps wait for nothing": steps_wait_for_nothing,
    "replayed forwards give the same tokens": replays_are_equal,
    "inverse CDF follows the law": draws_follow_the_law,
    "fused kernels agree": fused_kernels_agree,
}
