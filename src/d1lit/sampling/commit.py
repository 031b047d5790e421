"""Commit rules: which masked positions of the active block are fixed in one denoising step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.sampling.parts import Cells


def ranks(scores: Float[Tensor, "n M"]) -> Int[Tensor, "n M"]:
    """Place of each score in its row, 0 for the highest; equal scores rank left to right."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.zeros_like(order).scatter_(1, order, places)


def even_quotas(tokens: int, num_steps: int) -> tuple[int, ...]:
    """`tokens` spread over the steps, the remainder on the first ones (get_num_transfer_tokens of LLaDA)."""
    whole, rest = divmod(tokens, num_steps)
    return tuple(whole + (step < rest) for step in range(num_steps))


def dream_quotas(tokens: int, num_steps: int, eps: float) -> tuple[int, ...]:
    """int(remaining * (1 - s/t)) on a grid of times from 1 to eps; the last step takes all that is left."""
    times = torch.linspace(1, eps, num_steps + 1).tolist()
    quotas: list[int] = []
    for t, s in pairwise(times[:-1]):
        quotas.append(int((tokens - sum(quotas)) * (1 - s / t)))
    return (*quotas, tokens - sum(quotas))


@runtime_checkable
class QuotaSchedule(Protocol):
    """How many tokens of a block each of its steps fixes."""

    def quotas(self, block_length: int, num_steps: int) -> tuple[int, ...]:
        """One number a step, summing to the block length."""
        ...


@dataclass(frozen=True)
class EvenSchedule:
    """The same number every step, the remainder first (LLaDA, d1)."""

    def quotas(self, block_length: int, num_steps: int) -> tuple[int, ...]:
        """Steps beyond the number of tokens fix nothing."""
        return even_quotas(block_length, num_steps)


@dataclass(frozen=True)
class DreamSchedule:
    """Dream's schedule (arXiv 2508.15487): truncation makes early steps fix too few, and the last takes the rest."""

    eps: float
    """Last time of the grid."""

    def quotas(self, block_length: int, num_steps: int) -> tuple[int, ...]:
        """Zero for steps that truncation leaves empty."""
        return dream_quotas(block_length, num_steps, self.eps)


@dataclass(frozen=True)
class FixedQuota:
    """The most confident positions, as many as the schedule says."""

    schedule: QuotaSchedule

    def quotas(self, block_length: int, num_steps: int) -> tuple[int, ...]:
        """The schedule's."""
        return self.schedule.quotas(block_length, num_steps)

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """Top of the scores, leftmost on ties."""
        assert cells.quota is not None
        return (ranks(scores) < cells.quota) & cells.candidates


@dataclass(frozen=True)
class CommitAll:
    """Every masked position of the block at once; a remask rule then says what stays."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        """How many are masked depends on what was remasked."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """All candidates."""
        return cells.candidates


@dataclass(frozen=True)
class RandomReveal:
    """Each masked position on its own with probability 1 - s/t; the last step takes all (Dream's "origin")."""

    eps: float
    """Last time of the grid."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        """Chance decides."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """An independent coin for each candidate."""
        times = torch.linspace(1, self.eps, cells.num_steps + 1).tolist()
        last = cells.step >= cells.num_steps - 1
        chance = 1.0 if last else 1 - times[cells.step + 1] / times[cells.step]
        return (cells.uniform("order") < chance) & cells.candidates


@dataclass(frozen=True)
class Threshold:
    """Every position whose confidence reaches the threshold, and always the best one (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """Confidence at or above the threshold, or the row's best."""
        return ((scores >= self.threshold) | (ranks(scores) == 0)) & cells.candidates


@dataclass(frozen=True)
class WinoThreshold:
    """WINO's draft (arXiv 2507.18578): every confidence above the threshold, but no more than a share of the masks.

    The best one is always fixed. As published the cap is 0.7 of the masked positions, at least 5 and at most 20.
    """

    threshold: float
    share: float
    least: int
    most: int

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """The most confident within the cap."""
        cap = (cells.candidates.sum(1, keepdim=True) * self.share).to(torch.int64).clamp(min=self.least, max=self.most)
        places = ranks(scores)
        return (((scores > self.threshold) & (places < cap)) | (places == 0)) & cells.candidates


@dataclass(frozen=True)
class Factor:
    """The best n - 1 positions before the first c_(n) < 1 - factor / (n + 1) (Fast-dLLM, arXiv 2505.22618).

    The best one is always fixed.
    Differs from the published code: there a first failure that is the very last candidate is fixed too, so of two
    candidates both always are; `fixes_last` does so.
    """

    factor: float
    fixes_last: bool = False

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """The longest prefix of the sorted confidences that passes."""
        places = ranks(scores)
        count = cells.candidates.sum(1, keepdim=True)
        fails = (scores < 1 - self.factor / (places + 2)) & (places > 0) & cells.candidates
        width = scores.shape[1]
        first = torch.where(fails, places, width).amin(1, keepdim=True)
        if self.fixes_last:
            first = torch.where(first == count - 1, count, first)
        return (places < first) & cells.candidates


@dataclass(frozen=True)
class Hierarchical:
    """The best position of every unbroken run of masks, and everything sure (dInfer, arXiv 2510.08666).

    Tokens far apart constrain each other less, so one of each run may be fixed together. Differs from the published
    code: equal confidences within a run fix the leftmost one, not all.
    """

    threshold: float | None
    """Every position above it is fixed too; None: none."""
    run_threshold: float
    """A run's best position must be above it; the row's best one is always fixed."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """Runs are counted from left to right; a gap in the positions starts a new one."""
        open_ = cells.candidates
        follows = torch.zeros_like(open_)
        follows[:, 1:] = open_[:, :-1] & (cells.positions.diff(dim=1) == 1)
        run = (open_ & ~follows).cumsum(1)
        places = ranks(scores)
        best_of_run = torch.full_like(places, places.shape[1]).scatter_reduce_(
            1, (run - 1).clamp(min=0), torch.where(open_, places, places.shape[1]), "amin"
        )
        selected = (places == best_of_run.gather(1, (run - 1).clamp(min=0))) & (scores > self.run_threshold)
        if self.threshold is not None:
            selected = selected | (scores > self.threshold)
        return (selected | (places == 0)) & open_


@dataclass(frozen=True)
class EntropyBounded:
    """The largest set, in order of entropy, with sum H - max H <= gamma (entropy-bounded sampler, arXiv 2505.24857).

    Reads the confidence as minus an entropy in nats: pair it with NegativeEntropy.
    """

    gamma: float
    """Nats of entropy the positions fixed together may share."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """In ascending order the largest entropy of a prefix is its last, so the bound is on the sum before it."""
        return _entropy_prefix(scores, cells, self.gamma, count_last=False)


@dataclass(frozen=True)
class CumulativeEntropyBounded:
    """The largest set with sum H < gamma, and at least one: how dLLM-RL reads the entropy-bounded sampler.

    Differs from the paper: the last entropy counts too, so typically one token fewer is fixed.
    Reads the confidence as minus an entropy in nats: pair it with NegativeEntropy.
    """

    gamma: float
    """Nats of entropy the positions fixed together may hold."""

    def quotas(self, block_length: int, num_steps: int) -> None:
        """The predictions decide."""
        return None

    def select(self, scores: Float[Tensor, "n M"], cells: Cells) -> Bool[Tensor, "n M"]:
        """The prefix of ascending entropies whose running sum stays below gamma."""
        return _entropy_prefix(scores, cells, self.gamma, count_last=True)


def _entropy_prefix(scores: Float[Tensor, "n M"], cells: Cells, gamma: float, count_last: bool) -> Bool[Tensor, "n M"]:
    """The prefix of ascending entropies within the bound; the first position always belongs to it."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    entropy = torch.where(ordered.isinf(), 0.0, -ordered)
    running = entropy.cumsum(1)
    within = running < gamma if count_last else running - entropy <= gamma
    within[:, 0] = True
    return torch.zeros_like(within).scatter_(1, order, within) & cells.candidates
