"""Losses: supervised (masked cross-entropy) and policy losses. Pure tensors in, tensors out."""

from d1lit.losses.clipped import ClippedPolicyLoss, SequenceClippedLoss
from d1lit.losses.pairs import check_pair
from d1lit.losses.supervised import masked_cross_entropy

__all__ = ["ClippedPolicyLoss", "SequenceClippedLoss", "check_pair", "masked_cross_entropy"]
