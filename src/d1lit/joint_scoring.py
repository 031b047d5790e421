"""Old and reference log-probabilities of all inner updates of a rollout, in few forwards.

They need no gradient, so nothing is kept of a view, and many views fit where one fits with gradients. A forward of one
view, which is what a group's shared prompt mask makes of an inner update, leaves a GPU idle most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from d1lit.processes import all_gather_objects
from d1lit.scoring import score
from d1lit.types import Context, Corruption, LogProbEstimator, LogProbs, MaskPredictor, Rollout, Scores

FORWARD_BUDGET = 2**30
"""Bytes that the activations of joined views may take where those of one inner update take less."""


@runtime_checkable
class SizedPredictor(MaskPredictor, Protocol):
    """A mask predictor that can say how much memory a view takes, so that a budget in bytes says how many to join."""

    def view_bytes(self, length: int) -> int:
        """Estimated peak bytes of activations for one view of `length` tokens, without gradient."""
        ...


def joined(corruptions: Sequence[Corruption]) -> Corruption:
    """One corruption whose K axis holds those of all, one after the other."""
    first = corruptions[0]
    counts = [len(corruption.noised_ids) for corruption in corruptions]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    view_of = [
        torch.where(corruption.view_of < 0, -1, corruption.view_of + start)
        for corruption, start in zip(corruptions, starts, strict=True)
    ]
    return replace(
        first,
        noised_ids=torch.cat([c.noised_ids for c in corruptions]),
        view_of=torch.cat(view_of, dim=1),
        target_ids=torch.cat([c.target_ids for c in corruptions], dim=1),
        weight=torch.cat([c.weight for c in corruptions], dim=1),
        attention=_joined_rows([c.attention for c in corruptions]),
        position_ids=_joined_rows([c.position_ids for c in corruptions]),
    )


def _joined_rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def may_join(corruptions: Sequence[Corruption]) -> bool:
    """Whether one call of `score` can serve all: the same canvas, softmax, guidance and kind of mask."""

    def kind(c: Corruption) -> tuple[object, ...]:
        attention = None if c.attention is None else c.attention.shape[1:]
        canvas, places = c.noised_ids.shape[1], (c.target_ids.shape[0], c.target_ids.shape[2])
        softmax = c.temperature, c.exclude_mask, c.guidance
        return c.score_from, softmax, canvas, places, attention, c.position_ids is None

    return len({kind(corruption) for corruption in corruptions}) == 1


def score_together(
    policy: MaskPredictor, rollout: Rollout, corruptions: Sequence[Corruption], views_per_chunk: int | None = None
) -> list[Scores]:
    """As `score` of each corruption, up to rounding, in as few forwards as a budget in bytes allows; no gradient.

    A forward holds the views of whole corruptions, and every process the same number of them: where parameters are
    sharded all run as many forwards.
    """
    if not corruptions:
        return []
    at_once = min(all_gather_objects(_at_once(policy, corruptions, views_per_chunk)))
    result = []
    with torch.no_grad():
        for start in range(0, len(corruptions), at_once):
            part = corruptions[start : start + at_once]
            found = score(policy, rollout, joined(part), views_per_chunk=views_per_chunk)
            sizes = [corruption.view_of.shape[1] for corruption in part]
            result += [Scores(logprobs) for logprobs in found.logprobs.split(sizes, dim=1)]
    return result


def _at_once(policy: MaskPredictor, corruptions: Sequence[Corruption], views_per_chunk: int | None) -> int:
    """Corruptions of one forward, about as many in each."""
    if not may_join(corruptions):
        return 1
    views = max(len(corruption.noised_ids) for corruption in corruptions)
    each = 0
    if isinstance(policy, SizedPredictor):
        each = policy.view_bytes(corruptions[0].noised_ids.shape[1]) * (2 if corruptions[0].guidance else 1)
    return corruptions_at_once(len(corruptions), views, each, views_per_chunk)


def corruptions_at_once(count: int, views: int, view_bytes: int, views_per_chunk: int | None) -> int:
    """How many corruptions of so many views share a forward: as few forwards as can be, about as many in each.

    Args:
        count: corruptions.
        views: of one corruption.
        view_bytes: of activations, without gradients; 0 where nobody knows.
        views_per_chunk: the most that a forward may hold, if that was said.
    """
    room = FORWARD_BUDGET // view_bytes if view_bytes else 0
    most = max(1, (room if views_per_chunk is None else views_per_chunk) // max(1, views))
    num_forwards = math.ceil(count / most)
    return math.ceil(count / num_forwards)


def likelihoods(
    policy: MaskPredictor,
    estimator: LogProbEstimator,
    contexts: Sequence[Context],
    corruptions: Sequence[Corruption],
    views_per_chunk: int | None = None,
) -> list[LogProbs]:
    """What an estimator makes of the scores of each of its corruptions of one rollout."""
    if not contexts:
        return []
    scores = score_together(policy, contexts[0].rollout, corruptions, views_per_chunk)
    return [
        estimator.combine(one.logprobs, corruption, context)
        for one, corruption, context in zip(scores, corruptions, contexts, strict=True)
    ]
