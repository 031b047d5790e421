"""Does the cosine predict the outcome? Every pair trains the same model, with a learning rate of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pairs import Recorder, pairs
from updates import collect, loss_of
from world import PROMPTS, Setting, World, expected_reward

from d1lit.draws import CounterDraws

RATES = (1e-4, 3e-4, 1e-3)
GROUP_SIZE = 8


def train(name: str, start: World, setting: Setting, rate: float, steps: int, seed: int) -> float:
    """J after `steps` on-policy updates, one group of each prompt in each."""
    world, recorder = copy.deepcopy(start), Recorder()
    pair = pairs(setting, recorder)[name]
    optimizer = torch.optim.AdamW(world.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        batch = collect(world, setting, GROUP_SIZE, torch.arange(len(PROMPTS)), CounterDraws(seed, step=step), recorder)
        optimizer.zero_grad()
        loss_of(pair, world, batch, start)[0].backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), 0.2)
        optimizer.step()
    with torch.no_grad():
        return float(expected_reward(world, setting))


def outcome(name: str, start: World, setting: Setting, steps: int, tuning_seeds: int, seeds: int) -> dict[str, Any]:
    """The best rate of a pair on seeds of their own, and J reached on fresh seeds at that rate."""
    tried = {
        rate: sum(train(name, start, setting, rate, steps, 100 + s) for s in range(tuning_seeds)) / tuning_seeds
        for rate in RATES
    }
    best = max(tried, key=lambda rate: tried[rate])
    reached = [train(name, start, setting, best, steps, 200 + s) for s in range(seeds)]
    spread = torch.tensor(reached)
    return {
        "rate": best,
        "tuning": {f"{rate:g}": value for rate, value in tried.items()},
        "reached": reached,
        "mean": float(spread.mean()),
        "error": float(spread.std() / len(reached) ** 0.5),
    }


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, equal values sharing their mean rank."""
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below + (equal + 1) / 2


def rank_correlation(x: Sequence[float], y: Sequence[float], draws: int = 10_000) -> dict[str, float]:
    """Spearman's, with a bootstrap interval over the pairs and a two-sided permutation p."""
    first, second = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def correlate(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = ranks(a), ranks(b)
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    value, n = correlate(first, second), len(first)
    rank_x, rank_y = ranks(first), ranks(second)
    rank_x, rank_y = rank_x - rank_x.mean(), rank_y - rank_y.mean()
    shuffled = torch.stack([rank_y[torch.randperm(n, generator=generator)] for _ in range(draws)]) @ rank_x
    p = float((shuffled.abs() >= (rank_x @ rank_y).abs() - 1e-9).double().mean())
    boot = []
    for _ in range(2000):
        index = torch.randint(n, (n,), generator=generator)
        boot.append(correlate(first[index], second[index]))
    low, high = torch.tensor(boot).nan_to_num().quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"spearman": value, "low": low, "high": high, "p": p, "pairs": n}
