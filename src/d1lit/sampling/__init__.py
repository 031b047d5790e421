"""The reverse process: one block sampler put together from orthogonal parts."""

from d1lit.sampling.block import BlockSampler
from d1lit.sampling.cache import DualCache, PrefixCache
from d1lit.sampling.commit import (
    CumulativeEntropyBounded,
    DreamSchedule,
    EntropyBounded,
    EvenSchedule,
    Factor,
    FixedQuota,
    Hierarchical,
    RandomReveal,
    Threshold,
)
from d1lit.sampling.confidence import (
    LeftToRight,
    Margin,
    NegativeEntropy,
    PlackettLuce,
    RandomOrder,
    SampledLogProb,
    TokenProbability,
)
from d1lit.sampling.filters import Filtered
from d1lit.sampling.proposal import Gumbel, InverseCDF
from d1lit.sampling.replay import ApproximateSampler, approximation_nats, replayed_logprobs

__all__ = [
    "ApproximateSampler",
    "BlockSampler",
    "CumulativeEntropyBounded",
    "DreamSchedule",
    "DualCache",
    "EntropyBounded",
    "EvenSchedule",
    "Factor",
    "Filtered",
    "FixedQuota",
    "Gumbel",
    "Hierarchical",
    "InverseCDF",
    "LeftToRight",
    "Margin",
    "NegativeEntropy",
    "PlackettLuce",
    "PrefixCache",
    "RandomOrder",
    "RandomReveal",
    "SampledLogProb",
    "Threshold",
    "TokenProbability",
    "approximation_nats",
    "replayed_logprobs",
]
