"""How much of the change of J over a real optimizer step the exact gradient explains; the rest are jumps at ties."""

from __future__ import annotations

import copy

import torch
from pairs import Recorder, pairs
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from updates import collect, loss_of
from world import PROMPTS, Setting, World, expected_reward, flat_gradient

from d1lit.draws import CounterDraws


def _moved(world: World, weights: torch.Tensor) -> World:
    other = copy.deepcopy(world)
    vector_to_parameters(weights, other.parameters())
    return other


def _measured(world: World, setting: Setting) -> torch.Tensor:
    """J over two of the prompts, which differ in their rule: each costs an enumeration a node."""
    return expected_reward(world, setting, PROMPTS[[0, -1]])


def steps_explained(
    start: World, setting: Setting, name: str, rate: float, steps: int, nodes: int
) -> dict[str, float | list[dict[str, float]]]:
    """Each AdamW step of a training run: its change of J, the first-order prediction, and the gradient's path integral.

    The integral by the midpoint rule is what J changes by between its jumps; under random order, where J has none, the
    difference that remains is the error of the rule.
    """
    world, recorder = copy.deepcopy(start), Recorder()
    pair = pairs(setting, recorder)[name]
    optimizer = torch.optim.AdamW(world.parameters(), lr=rate, weight_decay=0.0)
    rows = []
    for step in range(steps):
        before = parameters_to_vector(world.parameters()).detach().clone()
        value = _measured(world, setting)
        gradient = flat_gradient(value, world)
        batch = collect(world, setting, 8, torch.arange(len(PROMPTS)), CounterDraws(7, step=step), recorder)
        optimizer.zero_grad()
        loss_of(pair, world, batch, start)[0].backward()
        optimizer.step()
        moved = parameters_to_vector(world.parameters()).detach() - before
        integral = 0.0
        for node in range(nodes):
            there = _moved(world, before + (node + 0.5) / nodes * moved)
            integral += float(flat_gradient(_measured(there, setting), there) @ moved) / nodes
        with torch.no_grad():
            change = float(_measured(world, setting) - value)
        rows.append({"change": change, "first_order": float(gradient @ moved), "integral": integral})
    changes, first, smooth = (torch.tensor([row[key] for row in rows]) for key in ("change", "first_order", "integral"))
    whole = float((changes**2).sum())
    return {
        "steps": rows,
        "first_order_r2": 1 - float(((changes - first) ** 2).sum()) / whole,
        "integral_r2": 1 - float(((changes - smooth) ** 2).sum()) / whole,
        "mean_abs_change": float(changes.abs().mean()),
        "mean_abs_jump": float((changes - smooth).abs().mean()),
    }
