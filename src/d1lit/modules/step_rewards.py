"""Rewards of what every denoising step predicted, for advantages that ask for them (MDPO, arXiv 2508.13148)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from d1lit.modules.experience import reward_batch
from d1lit.processes import all_gather_objects, gathered_rows
from d1lit.rewards.parts import RewardParts
from d1lit.types import RewardBatch, Rollout


def step_rewards(rollout: Rollout, reward: RewardParts, decode: Callable[[Tensor], str], step: int) -> RewardBatch:
    """[N S F], of all ranks: the canvas that every step found, all masks filled by its proposals, judged.

    A text that a rollout keeps over several steps is judged once. A step that a rollout did not take is not valid.
    """
    record = rollout.steps
    clean, taken = record.clean.transpose(0, 1).cpu(), record.taken.T
    place: dict[tuple[int, str], int] = {}  # of each text of a row among those to judge
    places = [
        [place.setdefault((n, decode(ids)), len(place)) if there else 0 for ids, there in zip(row, steps, strict=True)]
        for n, (row, steps) in enumerate(zip(clean, taken.tolist(), strict=True))
    ]
    verdicts = reward.grade([text for _, text in place], [rollout.examples[n] for n, _ in place])
    judged, index = reward_batch(verdicts, reward.weights, rollout.device, step), torch.tensor(places)
    assert judged.asked is not None
    # Every process has as many columns as the longest rollout of all has steps.
    missing = max(all_gather_objects(len(clean[0]))) - len(clean[0])
    value, valid, asked = (
        gathered_rows(pad(part[index.to(part.device)], (0, 0, 0, missing)))
        for part in (judged.value, judged.valid, judged.asked)
    )
    there = gathered_rows(pad(taken, (0, missing)))
    return replace(judged, value=value, valid=valid & there[..., None], asked=asked)
