"""The elementwise work between a block's products of matrices: norm, rotary embedding and gate, plain or fused.

On a GPU these move memory and compute nothing to speak of: run one operation at a time they take a good part of a
block's time, fused by torch.compile a small one. Only they are compiled: as free functions they are traced once for
all layers, whatever adapter, cache or checkpointing stands around them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_log = logging.getLogger(__name__)
_RECOMPILATIONS = 64
"""Sizes, grad modes and number types that one function may be compiled for; torch's 8 would silently stop fusing."""


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """x / rms(x) * weight, the quotient in fp32 whatever the number type of the activations."""
    exact = x if x.dtype == torch.float64 else x.float()
    normalised = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def rotate(
    x: Float[Tensor, "R H Q E"], cos: Float[Tensor, "... Q E"], sin: Float[Tensor, "... Q E"], in_fp32: bool
) -> Float[Tensor, "R H Q E"]:
    """Rotary embedding of queries or keys."""
    dtype = torch.float32 if in_fp32 and x.dtype != torch.float64 else x.dtype
    cos, sin, exact = cos.to(dtype), sin.to(dtype), x.to(dtype)
    first, second = exact.chunk(2, dim=-1)
    return (exact * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def gated(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """silu(gate) * up."""
    return F.silu(gate) * up


@dataclass(frozen=True)
class Kernels:
    """One of each."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    gate: Callable[[Tensor, Tensor], Tensor]


PLAIN = Kernels(rms_norm, rotate, gated)


@cache
def fused(device_type: str, dtype: torch.dtype) -> Kernels:
    """Compiled for a device, or the plain ones, with the reason logged, where nothing can be compiled.

    Equal to the plain ones up to rounding: what they round between two operations stays in fp32 here.
    """
    torch._dynamo.config.recompile_limit = max(_RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    kernels = Kernels(torch.compile(rms_norm), torch.compile(rotate), torch.compile(gated))
    try:
        x = torch.ones(2, 2, 4, 8, device=device_type, dtype=dtype)
        kernels.gate(kernels.rotate(kernels.norm(x, x[0, 0, 0], 1e-5), x, x, True), x)
    except Exception as error:  # whatever a missing compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.warning("model.compile: %s; the network runs uncompiled", reason)
        return PLAIN
    return kernels
