"""Which estimator, loss and sampler may be put together."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class GivesParts(Protocol):
    """An estimator whose likelihood comes with named parts beside its value."""

    @property
    def parts(self) -> frozenset[str]:
        """Their names."""
        ...


@runtime_checkable
class NeedsParts(Protocol):
    """A loss that reads such parts."""

    @property
    def needs_parts(self) -> frozenset[str]:
        """Their names."""
        ...


@runtime_checkable
class GivesBack(Protocol):
    """A sampler that may hide a token again."""

    @property
    def gives_back(self) -> bool:
        """Whether it does."""
        ...

    @property
    def remask(self) -> Any:
        """The part that decides."""
        ...


def check_trajectory(estimator: Any, sampler: Any) -> None:
    """Refuse an estimator that replays commit steps on a sampler that gives tokens back.

    The steps recorded are those of the last time each token was fixed; the canvases they imply never stood before the
    network, so the replayed likelihood is that of no trajectory.

    Raises:
        ValueError: naming both.
    """
    if getattr(estimator, "needs_trace", False) and isinstance(sampler, GivesBack) and sampler.gives_back:
        raise ValueError(
            f"estimator: {type(estimator).__name__} with {type(sampler.remask).__name__} is refused: it replays the "
            "rollout's commit steps, and a sampler that gives tokens back passes through other canvases. "
            "Try: estimator=one_step or estimator=elbo, or a sampler without a remask rule [E207]"
        )


def check_pair(estimator: Any, loss: Any, allow: bool = False) -> None:
    """Refuse a loss that treats the estimator's likelihood as something it is not.

    A loss that clips every token needs token likelihoods. On one ELBO a sequence it is the combination that ESPO's
    ablation (arXiv 2512.03759) shows to collapse; a loss over whole sequences makes no sense of single steps.

    Args:
        estimator: anything with `unit`.
        loss: anything with `units`, the units it accepts.
        allow: put them together all the same.

    Raises:
        ValueError: if the pair is refused and not allowed, or if the loss reads a part that the estimator lacks.
    """
    if allow or estimator.unit in loss.units:
        _check_parts(estimator, loss)
        return
    loss_name, estimator_name = type(loss).__name__, type(estimator).__name__
    if estimator.unit == "sequence":
        reason = "clips token by token; on one ELBO a sequence that is known to collapse (ESPO, arXiv 2512.03759)"
        cure = "loss=espo, loss=gspo or loss=reinforce, or allow_unsound_pair=true"
    else:
        reason = f"takes {' or '.join(sorted(loss.units))} likelihoods, which are not {estimator.unit} ones"
        cure = "an estimator of that unit, or allow_unsound_pair=true"
    raise ValueError(f"loss: {loss_name} with {estimator_name} is refused: {loss_name} {reason}. Try: {cure} [E207]")


_WITH_PART = {"elbo": "spg", "of_step": "drift", "order": "ordered_trace", "tokens": "ordered_trace"}
"""An estimator whose likelihood has the part."""


def _check_parts(estimator: Any, loss: Any) -> None:
    given = estimator.parts if isinstance(estimator, GivesParts) else frozenset()
    if isinstance(loss, NeedsParts) and not loss.needs_parts <= given:
        missing = sorted(loss.needs_parts - given)
        raise ValueError(
            f"loss: {type(loss).__name__} with {type(estimator).__name__} is refused: the loss reads "
            f"{', '.join(missing)}, which that estimator has not. "
            f"Try: estimator={_WITH_PART.get(missing[0], '...')} [E207]"
        )
