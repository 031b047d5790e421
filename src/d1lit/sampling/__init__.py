"""The reverse process: one block sampler put together from orthogonal parts."""

from d1lit.sampling.bfloat16 import HalfGumbel, HalfTokenProbability
from d1lit.sampling.block import BlockSampler
from d1lit.sampling.cache import DualCache, PrefixCache
from d1lit.sampling.commit import (
    CommitAll,
    CumulativeEntropyBounded,
    DreamSchedule,
    EntropyBounded,
    EvenSchedule,
    Factor,
    FixedQuota,
    Hierarchical,
    RandomReveal,
    Threshold,
    WinoThreshold,
)
from d1lit.sampling.confidence import (
    LeftToRight,
    Margin,
    Negated,
    NegativeEntropy,
    PlackettLuce,
    RandomOrder,
    SampledLogProb,
    TokenProbability,
)
from d1lit.sampling.edit import TokenEditing
from d1lit.sampling.filters import Filtered
from d1lit.sampling.memory import CreditFusion, PredictionChange, StableThreshold
from d1lit.sampling.proposal import Gumbel, InverseCDF
from d1lit.sampling.remask import LowestConfidence, Unverified
from d1lit.sampling.remdm import ReMDM
from d1lit.sampling.replay import ApproximateSampler, approximation_nats, replayed_logprobs

__all__ = [
    "ApproximateSampler",
    "BlockSampler",
    "CommitAll",
    "CreditFusion",
    "CumulativeEntropyBounded",
    "DreamSchedule",
    "DualCache",
    "EntropyBounded",
    "EvenSchedule",
    "Factor",
    "Filtered",
    "FixedQuota",
    "Gumbel",
    "HalfGumbel",
    "HalfTokenProbability",
    "Hierarchical",
    "InverseCDF",
    "LeftToRight",
    "LowestConfidence",
    "Margin",
    "Negated",
    "NegativeEntropy",
    "PlackettLuce",
    "PredictionChange",
    "PrefixCache",
    "RandomOrder",
    "RandomReveal",
    "ReMDM",
    "SampledLogProb",
    "StableThreshold",
    "Threshold",
    "TokenEditing",
    "TokenProbability",
    "Unverified",
    "WinoThreshold",
    "approximation_nats",
    "replayed_logprobs",
]
