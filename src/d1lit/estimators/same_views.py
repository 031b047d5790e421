"""A wrapper that draws its views once a rollout, instead of anew at every inner update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from d1lit.types import Context, Corruption, EstimatorTraits, LogProbEstimator, LogProbs


@dataclass(frozen=True)
class SameViews:
    """Another estimator whose inner updates all see the views of the first.

    d1 (arXiv 2504.12216) compares this, "fixed" prompt masks, with masks drawn anew at every inner update.
    """

    inner: LogProbEstimator

    @property
    def traits(self) -> EstimatorTraits:
        """Those of the wrapped estimator."""
        return self.inner.traits

    def corrupt(self, context: Context) -> Corruption:
        """The views of inner update 0 of this rollout."""
        return self.inner.corrupt(_at_first(context))

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """As the wrapped estimator."""
        return self.inner.combine(view_logprobs, corruption, _at_first(context))


def _at_first(context: Context) -> Context:
    return replace(context, inner=0, draws=context.draws.at(inner=0))
