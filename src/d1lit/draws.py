"""Counter-based random numbers: a value is a hash of what it is for, so no order, rank, chunk or worker can move it.

The construction is the usual one of counter-based generators (Salmon et al., SC'11): a key and a counter are mixed by a
bijection with good avalanche. The mixer is the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA'14),
applied twice along the chain key -> row -> index. Integer arithmetic only, so CPU and GPU agree bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def _key(*words: object) -> int:
    """A signed 64-bit key from a tuple of words; the separator keeps ("a", 1, 2) and ("a", 12) apart."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _to_unit_interval(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Odd multiples of a half step, so that 0 and 1 are never returned and log(u), log(1 - u) are finite."""
    precision = 52 if dtype == torch.float64 else 23
    return (_shift_right(bits, 64 - precision).to(dtype) + 0.5) * 2.0**-precision


@dataclass(frozen=True)
class CounterDraws:
    """Uniform random numbers addressed by (seed, stream, step, inner, sub-step, global row, index)."""

    seed: int
    step: int = 0
    """Rollout or optimizer step of the run."""
    inner: int = 0
    """Inner update of that rollout."""

    def at(self, *, step: int | None = None, inner: int | None = None) -> CounterDraws:
        """The same source at another step or inner update."""
        return replace(self, step=self.step if step is None else step, inner=self.inner if inner is None else inner)

    def uniform(
        self,
        stream: str,
        rows: Int[Tensor, " n"],
        shape: tuple[int, ...],
        step: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "n ..."]:
        """Uniforms in (0, 1), a block of `shape` for each row id.

        Args:
            stream: what the numbers are for ("prompt_mask", "proposal", ...).
            rows: global row ids; a row's numbers do not depend on the other rows.
            shape: shape of one row's block.
            step: a counter below the run's step, such as the denoising step.
            dtype: torch.float32 (23 random bits) or torch.float64 (52).
        """
        size = 1
        for extent in shape:
            size *= extent
        key = _key(self.seed, stream, self.step, self.inner, step)
        row_keys = _mix(rows.to(torch.int64) * _GOLDEN + key)
        index = torch.arange(1, size + 1, device=rows.device, dtype=torch.int64) * _GOLDEN
        return _to_unit_interval(_mix(row_keys[:, None] + index[None, :]), dtype).reshape(len(rows), *shape)

    def batch(self, stream: str, shape: tuple[int, ...], step: int = 0) -> Float[Tensor, "..."]:
        """Uniforms for the whole global batch, on the CPU: the same on every rank."""
        return self.uniform(stream, torch.zeros(1, dtype=torch.int64), shape, step)[0]

    def permutation(self, stream: str, size: int, step: int = 0) -> Int[Tensor, " size"]:
        """A uniformly random order of range(size)."""
        keys = self.uniform(stream, torch.zeros(1, dtype=torch.int64), (size,), step, torch.float64)[0]
        return torch.argsort(keys, stable=True)

    def torch_seed(self, stream: str) -> int:
        """A seed for a torch.Generator, for the few library calls that insist on one."""
        return _key(self.seed, stream, self.step, self.inner) & (2**63 - 1)


def random_subset(
    uniform: Float[Tensor, "n T"], count: Int[Tensor, " n"], allowed: Bool[Tensor, "n T"]
) -> Bool[Tensor, "n T"]:
    """Exactly `count` of the allowed entries of each row (or all, if fewer): those with the smallest uniforms."""
    order = torch.argsort(torch.where(allowed, uniform, torch.inf), dim=1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(allowed.shape[1], device=allowed.device).expand_as(order))
    return (rank < count[:, None]) & allowed


def spread_counts(
    start: Int[Tensor, "*n"],
    index: Int[Tensor, "*n"],
    num_strata: int,
    period: Int[Tensor, "*n"],
    round_sums: bool = False,
) -> Int[Tensor, "*n"]:
    """Whole numbers spread evenly over a period from a random start, unreduced: start + round(index period / strata).

    Numbers of masked tokens for likelihood bounds: one uniform start, one stratum for each sample; reduced modulo the
    period, every stratum's number is uniform by itself.

    Args:
        start: uniform over the period.
        index: the stratum of each number.
        num_strata: how many strata there are.
        period: how many numbers there are to choose from.
        round_sums: round start + index period / strata instead, halves to even, as LLaDA's likelihood code does
            (arXiv 2502.09992). Where period / strata is a half, that meets every second number up to three times as
            often as its neighbours, so the bound's estimate is biased.
    """
    hop = index * (period.to(torch.float64) / num_strata)
    return torch.round(start + hop).to(torch.int64) if round_sums else start + torch.round(hop).to(torch.int64)
