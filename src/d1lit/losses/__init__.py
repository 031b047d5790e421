"""Losses: supervised (masked cross-entropy) and policy losses. Pure tensors in, tensors out."""

from d1lit.losses.clipped import ClippedPolicyLoss, SequenceClippedLoss
from d1lit.losses.compatibility import (
    BranchingAdvantage,
    SteppingSampler,
    check_pair,
    check_place,
    check_steps,
    check_trajectory,
    check_tree,
    of_steps,
    recording,
    stepping,
)
from d1lit.losses.supervised import MaskedCrossEntropy

__all__ = [
    "BranchingAdvantage",
    "ClippedPolicyLoss",
    "MaskedCrossEntropy",
    "SequenceClippedLoss",
    "SteppingSampler",
    "check_pair",
    "check_place",
    "check_steps",
    "check_trajectory",
    "check_tree",
    "of_steps",
    "recording",
    "stepping",
]
