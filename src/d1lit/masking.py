"""The forward process: how the time t is drawn, and which tokens are hidden at that time.

Times and masks are separate choices, and both draw through `Draws` alone. A sampler of times (`types.TimeSampler`) gets
`row_ids`, which identify the rows for their own random numbers, and `places`, their places 0 .. num_places - 1 in the
GLOBAL batch, which stratified samplers need; so one process and eight see the same times.

What the network sees of a row (`types.RowView`) is a third choice: for most the noised row, for networks that attend
block by block or in the order of commitment also the clean one.

A mask (`types.MaskRule`) says which tokens it hides, and by its `weight` what the schedule's weight of each is
multiplied by: so chosen that a token's weight has the expectation 1, as the likelihood bound wants it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.attention import block_streams, order_streams, target_blocks
from d1lit.draws import random_subset
from d1lit.types import AttentionPattern, Draws, NoisedRows, SeenRows, TimeSampler

Rows = Int[Tensor, " n"]
Times = Float[Tensor, " n"]
Probs = Float[Tensor, " n"]
Tokens = Bool[Tensor, "n T"]

# ---------------------------------------------------------------------------------------------------------------- times


def _scaled(unit: Times, low: float, high: float) -> Times:
    """Times of [0, 1] moved into [low, high]."""
    return low + (high - low) * unit


@dataclass(frozen=True)
class UniformTimes:
    """t ~ U(low, high), independently for each row; d1 and LLaDA: low = 1e-3, high = 1."""

    low: float
    high: float = 1.0

    def __call__(self, draws: Draws, row_ids: Rows, places: Rows, num_places: int) -> Times:
        """One time for each row."""
        return _scaled(draws.uniform("time", row_ids, ()), self.low, self.high)


@dataclass(frozen=True)
class StratifiedTimes:
    """One uniform for each row, each in its own stratum: t_i = (i + u_i) / n (what MDLM's code calls antithetic)."""

    low: float
    high: float = 1.0

    def __call__(self, draws: Draws, row_ids: Rows, places: Rows, num_places: int) -> Times:
        """One time for each row; every stratum of the global batch is met once."""
        inside = draws.uniform("time", row_ids, ())
        return _scaled((inside / num_places + places / num_places) % 1, self.low, self.high)


@dataclass(frozen=True)
class LowDiscrepancyTimes:
    """One uniform for the whole batch: t_i = (u + i / n) mod 1 (the reading of MDLM's paper, arXiv 2406.07524)."""

    low: float
    high: float = 1.0

    def __call__(self, draws: Draws, row_ids: Rows, places: Rows, num_places: int) -> Times:
        """One time for each row, evenly spaced over the global batch."""
        start = draws.batch("time", ()).to(row_ids.device)
        return _scaled((start + places / num_places) % 1, self.low, self.high)


@dataclass(frozen=True)
class AntitheticTimes:
    """Pairs of rows with times mirrored about the middle of the range: u and 1 - u."""

    low: float
    high: float = 1.0

    def __call__(self, draws: Draws, row_ids: Rows, places: Rows, num_places: int) -> Times:
        """One time for each row; places 2 j and 2 j + 1 mirror each other."""
        first = draws.batch("time", ((num_places + 1) // 2,)).to(row_ids.device)[places // 2]
        return _scaled(torch.where(places % 2 == 0, first, 1 - first), self.low, self.high)


@dataclass(frozen=True)
class GridTimes:
    """The fixed grid of a validation set: linspace(0, 1, n) scaled into the range (d1: low = 1e-3). Draws nothing."""

    low: float
    high: float = 1.0

    def __call__(self, draws: Draws, row_ids: Rows, places: Rows, num_places: int) -> Times:
        """One time for each row, by its place alone."""
        grid = torch.linspace(0, 1, num_places, device=row_ids.device)
        return _scaled(grid[places], self.low, self.high)


@dataclass(frozen=True)
class LogUniformMaskTimes:
    """Another sampler's times warped so that log(mask probability) is uniform (MDLM's importance sampling).

    For the log-linear schedule with the same eps, from the probability at sigma = eps to that at t = 1.
    """

    times: TimeSampler
    eps: float

    def __call__(self, draws: Draws, row_ids: Rows, places: Rows, num_places: int) -> Times:
        """One time for each row."""
        t = self.times(draws, row_ids, places, num_places)
        lowest, highest = math.log(-math.expm1(-self.eps)), math.log1p(-self.eps)
        return torch.exp(t * highest + (1 - t) * lowest) / (1 - self.eps)


# ---------------------------------------------------------------------------------------------------------------- masks


def bernoulli_mask(draws: Draws, stream: str, row_ids: Rows, mask_prob: Probs, allowed: Tokens) -> Tokens:
    """Hide each allowed token on its own with its row's probability: hidden where the uniform is below it."""
    uniform = draws.uniform(stream, row_ids, (allowed.shape[1],))
    return (uniform < mask_prob[:, None]) & allowed


def complementary_mask(is_masked: Tokens, allowed: Tokens) -> Tokens:
    """The allowed tokens that the first mask of the pair left visible: together they hide each token once."""
    return allowed & ~is_masked


@dataclass(frozen=True)
class BernoulliMask:
    """Each token is hidden on its own with probability mask_prob (LLaDA, d1)."""

    def __call__(self, draws: Draws, row_ids: Rows, mask_prob: Probs, is_maskable: Tokens) -> Tokens:
        """Which tokens are hidden."""
        return bernoulli_mask(draws, "mask", row_ids, mask_prob, is_maskable)

    def weight(self, draws: Draws, row_ids: Rows, mask_prob: Probs, is_maskable: Tokens) -> Float[Tensor, "n T"]:
        """The schedule's weight as it is."""
        return torch.ones_like(is_maskable, dtype=mask_prob.dtype)


@dataclass(frozen=True)
class ExactCountMask:
    """ceil(mask_prob * maskable tokens) tokens are hidden, at least one: no row goes without a loss.

    Under the linear schedule every number from 1 to all is equally probable and weighs (all / number): LLaDA's discrete
    form of the bound (arXiv 2502.09992).
    """

    def __call__(self, draws: Draws, row_ids: Rows, mask_prob: Probs, is_maskable: Tokens) -> Tokens:
        """Which tokens are hidden."""
        count = self._count(mask_prob, is_maskable)
        return random_subset(draws.uniform("mask", row_ids, (is_maskable.shape[1],)), count, is_maskable)

    def weight(self, draws: Draws, row_ids: Rows, mask_prob: Probs, is_maskable: Tokens) -> Float[Tensor, "n T"]:
        """Expected number of hidden tokens over their real number."""
        real = self._count(mask_prob, is_maskable)
        return (mask_prob * is_maskable.sum(1) / real)[:, None].expand(is_maskable.shape)

    def _count(self, mask_prob: Probs, is_maskable: Tokens) -> Int[Tensor, " n"]:
        return torch.ceil(mask_prob * is_maskable.sum(1)).to(torch.int64).clamp(min=1)


@dataclass(frozen=True)
class BlockMask:
    """One random block of the maskable tokens is noised; earlier tokens stay clean, later ones are all hidden.

    Only the noised block is scored, for all blocks: its weight is times their number.
    """

    block_length: int

    def __call__(self, draws: Draws, row_ids: Rows, mask_prob: Probs, is_maskable: Tokens) -> Tokens:
        """Which tokens are hidden."""
        block, chosen, _ = self._blocks(draws, row_ids, is_maskable)
        inside = bernoulli_mask(draws, "mask", row_ids, mask_prob, block == chosen)
        return inside | (block > chosen)

    def weight(self, draws: Draws, row_ids: Rows, mask_prob: Probs, is_maskable: Tokens) -> Float[Tensor, "n T"]:
        """The number of blocks in the noised one, 0 outside it: later blocks, all hidden, say nothing at this time."""
        block, chosen, num_blocks = self._blocks(draws, row_ids, is_maskable)
        return (block == chosen) * num_blocks.to(mask_prob.dtype)

    def _blocks(
        self, draws: Draws, row_ids: Rows, is_maskable: Tokens
    ) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n 1"], Int[Tensor, "n 1"]]:
        """Block of each token, counted from the row's first maskable one; the one to noise; how many there are."""
        block = target_blocks(is_maskable, self.block_length)
        num_blocks = block.amax(1, keepdim=True).clamp(min=0) + 1
        chosen = (draws.uniform("block", row_ids, (1,)) * num_blocks).to(torch.int64)
        return block, chosen, num_blocks


def apply_mask(ids: Int[Tensor, "n T"], is_masked: Tokens, mask_token_id: int) -> Int[Tensor, "n T"]:
    """The ids with the hidden ones replaced by [MASK]."""
    return torch.where(is_masked, mask_token_id, ids)


# --------------------------------------------------------------------------------------------------------- what is seen


@dataclass(frozen=True)
class WholeRow:
    """The noised row, all of it seen by all of it (LLaDA, d1)."""

    @property
    def pattern(self) -> None:
        """Everybody sees everything."""

    def __call__(self, rows: NoisedRows, draws: Draws) -> SeenRows:
        """Each token is predicted at its place."""
        noised = apply_mask(rows.ids, rows.is_masked, rows.mask_token_id)
        return SeenRows(noised, rows.attention, None, _places(rows.ids))

    def length(self, prompt_length: int, num_targets: int) -> int:
        """The row's own."""
        return prompt_length + num_targets


@dataclass(frozen=True)
class BlockStreams:
    """The noised row and its clean targets, attended as `attention.block_streams` (BD3LM, arXiv 2503.09573).

    One pass learns every block given the clean ones before it, which is how a sampler with `block_causal` decodes.
    Differs from the paper: all blocks of a row are noised at one time t, not each at its own.
    """

    block_length: int

    @property
    def pattern(self) -> AttentionPattern:
        """Block by block."""
        return AttentionPattern("blocks", self.block_length)

    def __call__(self, rows: NoisedRows, draws: Draws) -> SeenRows:
        """Each token is predicted at its place in the noised row."""
        start, noised = rows.first_target, apply_mask(rows.ids, rows.is_masked, rows.mask_token_id)
        return SeenRows(
            torch.cat([noised, rows.ids[:, start:]], dim=1),
            block_streams(target_blocks(rows.is_target, self.block_length), rows.is_seen, start),
            _twice_placed(rows.ids, start),
            _places(rows.ids),
        )

    def length(self, prompt_length: int, num_targets: int) -> int:
        """The targets twice."""
        return prompt_length + 2 * num_targets


@dataclass(frozen=True)
class OrderStreams:
    """The clean row and a mask slot for each target, attended as `attention.order_streams` (d2, arXiv 2509.21474).

    Each token is learnt at its turn in a random order of the targets, given those before it: with every target hidden
    the loss is the negative log-likelihood of an order drawn at random, in one pass.
    """

    @property
    def pattern(self) -> AttentionPattern:
        """In the order of commitment."""
        return AttentionPattern("order")

    def __call__(self, rows: NoisedRows, draws: Draws) -> SeenRows:
        """Each token is predicted at its slot; targets that are not hidden come first in the order."""
        start, width = rows.first_target, rows.ids.shape[1]
        key = draws.uniform("order", rows.row_ids, (width,)) + rows.is_masked
        turn = torch.where(rows.is_target, key, torch.inf).argsort(1).argsort(1)
        slots = torch.full_like(rows.ids[:, start:], rows.mask_token_id)
        return SeenRows(
            torch.cat([rows.ids, slots], dim=1),
            order_streams(torch.where(rows.is_target, turn, -1), rows.is_seen, start),
            _twice_placed(rows.ids, start),
            (_places(rows.ids) + width - start).clamp(min=width),
        )

    def length(self, prompt_length: int, num_targets: int) -> int:
        """The targets twice."""
        return prompt_length + 2 * num_targets


def _places(ids: Int[Tensor, "n T"]) -> Int[Tensor, " T"]:
    return torch.arange(ids.shape[1], device=ids.device)


def _twice_placed(ids: Int[Tensor, "n T"], start: int) -> Int[Tensor, "n S"]:
    """Positions of a row and of its columns from `start` on, once more."""
    place = _places(ids)
    return torch.cat([place, place[start:]]).expand(len(ids), -1)


# ------------------------------------------------------------------------------------------------------------- extras


def context_adaptive_weight(is_masked: Tokens, geometric_prob: float) -> Float[Tensor, "n T"]:
    """Dream's CART weight (arXiv 2508.15487): half the geometric mass that clean neighbours put on a hidden token.

    0.5 * sum over clean i of p (1 - p)^(|n - i| - 1) for a hidden n, 0 for a clean one; a row without clean tokens
    weighs nothing.
    """
    place = torch.arange(is_masked.shape[1], device=is_masked.device)
    distance = (place[:, None] - place[None, :]).abs()
    kernel = geometric_prob * (1 - geometric_prob) ** (distance - 1).clamp(min=0).to(torch.float32)
    near = (~is_masked).to(kernel.dtype) @ kernel.fill_diagonal_(0)
    return 0.5 * near * is_masked
