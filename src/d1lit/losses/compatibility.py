"""Which estimator, loss and sampler may be put together."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from d1lit.losses.clipped import ClippedPolicyLoss, SequenceClippedLoss
from d1lit.losses.policy_gradient import MaskwiseBoundLoss
from d1lit.losses.terms import k1, k3
from d1lit.types import Advantage, AttendingSampler, LogProbEstimator, OrderLaw, PolicyLoss, Sampler, Tree


@runtime_checkable
class SteppingSampler(Sampler, Protocol):
    """A sampler that says what its steps do; one that does not is taken for a plain one, in whatever order."""

    @property
    def reviser(self) -> Any:
        """The part that may hide a token again, or replace it; None where there is none."""
        ...

    @property
    def order_law(self) -> OrderLaw | None:
        """How the positions of a step are drawn; None where they go by rank, or in numbers that predictions decide."""
        ...

    @property
    def guidance(self) -> float:
        """Classifier-free guidance scale; 0 for none."""
        ...

    @property
    def tree(self) -> Tree | None:
        """How the rollouts of a group branch off each other; None where they are independent."""
        ...

    @property
    def record_trace(self) -> bool:
        """Whether it keeps the canvas after every step."""
        ...

    @property
    def record_predictions(self) -> bool:
        """Whether it keeps what every step proposes."""
        ...


@runtime_checkable
class BranchingAdvantage(Advantage, Protocol):
    """An advantage that may have a number for each edge of a tree."""

    @property
    def tree(self) -> Tree | None:
        """Whose edges; None where it has one number a rollout."""
        ...


@runtime_checkable
class Recording(Protocol):
    """A sampler that can keep what every denoising step predicts."""

    def with_predictions(self) -> Sampler:
        """The same sampler, keeping it."""
        ...


_OF_STEPS = ("reviser", "order_law", "guidance", "tree", "record_trace", "record_predictions")


def stepping(sampler: Sampler) -> SteppingSampler | None:
    """The sampler, if it says what its steps do; None for one that says nothing of it.

    Raises:
        ValueError: for one that says a part of it, whose other part nobody would look for.
    """
    missing = [name for name in _OF_STEPS if not hasattr(sampler, name)]
    if not missing:
        assert isinstance(sampler, SteppingSampler)
        return sampler
    if len(missing) < len(_OF_STEPS):
        told = ", ".join(name for name in _OF_STEPS if name not in missing)
        raise ValueError(
            f"sampler: {type(sampler).__name__} has {told} but not {', '.join(missing)}, which say together what its "
            "steps do. Try: all of them, or none [E207]"
        )
    return None


def of_steps(advantage: Advantage | None) -> bool:
    """Whether an advantage asks for the rewards of what every denoising step predicted."""
    return getattr(advantage, "of_steps", False)


def recording(sampler: Sampler, estimator: LogProbEstimator, advantage: Advantage | None) -> Sampler:
    """The sampler, keeping the predictions of every step where estimator or advantage want them.

    Raises:
        ValueError: if it cannot.
    """
    if not (of_steps(advantage) or estimator.traits.needs_predictions):
        return sampler
    if not isinstance(sampler, Recording):
        raise ValueError(
            f"sampler: {type(sampler).__name__} keeps no predictions of its steps (no `with_predictions`). "
            "Try: sampler=low_confidence [E207]"
        )
    return sampler.with_predictions()


def check_steps(
    sampler: Sampler, estimator: LogProbEstimator, advantage: Advantage | None, loss: PolicyLoss
) -> Sampler:
    """Refuse an advantage of denoising steps where nobody tells steps apart; the sampler, keeping what is wanted.

    Raises:
        ValueError: naming the key, the value and the cure.
    """
    if of_steps(advantage):
        cause = f"{type(advantage).__name__} gives one number a denoising step"
        steps = stepping(sampler)
        if steps is not None and steps.tree is not None:
            raise ValueError(
                f"advantage: {cause}, and the rollouts of sampler.tree count by edges. Try: sampler.tree=null [E207]"
            )
        if "step" not in estimator.traits.parts:
            told = f"{type(estimator).__name__} does not say which step a unit belongs to"
            raise ValueError(f"advantage: {cause}, and {told}. Try: estimator=mdpo [E207]")
        if not loss.traits.takes_unit_advantages:
            told = f"{type(loss).__name__} takes one a rollout"
            raise ValueError(f"advantage: {cause}, and {told}. Try: loss=mdpo, loss=clipped or loss=reinforce [E207]")
    return recording(sampler, estimator, advantage)


def check_trajectory(estimator: LogProbEstimator, sampler: Sampler) -> None:
    """Refuse an estimator of other trajectories than the sampler's.

    Which are: those of one that remasks or edits, that draws its order otherwise, attends otherwise or is guided.

    The steps recorded are those of the last time each token was written; the canvases they imply never stood before the
    network, so the replayed likelihood is that of no trajectory.

    Raises:
        ValueError: naming both.
    """
    steps = stepping(sampler)
    if estimator.traits.needs_trace and steps is not None and steps.reviser is not None:
        raise ValueError(
            f"estimator: {type(estimator).__name__} with {type(steps.reviser).__name__} is refused: it replays the "
            "rollout's commit steps, and a sampler that remasks or edits passes through other canvases. "
            "Try: estimator=one_step or estimator=elbo, or a sampler without a remask or edit rule [E207]"
        )
    asked = estimator.traits.order
    if asked is not None and steps is not None and steps.order_law != asked:
        cure = "sampler=order_head" if asked.score == "head" else "sampler=plackett_luce_logprob"
        found = "not drawn so many at a time" if steps.order_law is None else steps.order_law
        raise ValueError(
            f"estimator: {type(estimator).__name__} scores positions {asked}, and the sampler's are {found}. "
            f"Try: {cure} [E207]"
        )
    _check_pattern(estimator, sampler)
    replays = estimator.traits.needs_trace or estimator.traits.needs_predictions
    if replays and steps is not None and steps.guidance > 0:
        raise ValueError(
            f"sampler.guidance: {steps.guidance:g}, and {type(estimator).__name__} replays the steps without it. "
            "Try: sampler.guidance=0, or estimator=one_step with estimator.guidance [E207]"
        )


def _check_pattern(estimator: LogProbEstimator, sampler: Sampler) -> None:
    """Refuse an estimator whose views are attended otherwise than the sampler's canvases."""
    there = sampler.pattern if isinstance(sampler, AttendingSampler) else None
    own = estimator.traits.pattern
    by_sampler = own is None and there is not None and there.kind == "blocks"  # its `attended` sees to that
    if own == there or by_sampler:
        return
    cures = {"blocks": "sampler=block_diffusion, and its block_length", "order": "sampler=any_order"}
    cure = "estimator=any_order" if own is None else cures[own.kind]
    raise ValueError(
        f"estimator: {type(estimator).__name__} attends {own or 'as the sampler'}, which here is "
        f"{there or 'to the whole canvas'}, so it would score what another attention says. Try: {cure} [E207]"
    )


def check_place(estimator: LogProbEstimator, is_shifted: bool) -> None:
    """Refuse an estimator whose scored places see each a context of their own on a network that predicts one place on.

    There a token is predicted from the place before it, which sees the context of another token.

    Raises:
        ValueError: naming the estimator.
    """
    if estimator.traits.needs_own_place and is_shifted:
        raise ValueError(
            f"estimator: {type(estimator).__name__} needs a network that predicts a token at its own place, not at the "
            "one before. Try: model=llada_8b, or estimator=step_merge [E207]"
        )


def check_tree(
    sampler: Sampler, estimator: LogProbEstimator, advantage: Advantage | None, loss: PolicyLoss, group_size: int
) -> None:
    """Refuse parts that do not agree on how the rollouts of a group branch.

    Raises:
        ValueError: naming the key, the value and the cure.
    """
    steps = stepping(sampler)
    there = None if steps is None else steps.tree
    if there is not None and there.leaves != group_size:
        kind = f"a tree of {there.branching} branches and {there.height} levels"
        cause = f"{group_size}, but {kind} has {there.leaves} leaves"
        raise ValueError(f"module.group_size: {cause}. Try: {there.leaves}, or another tree [E207]")
    edges = advantage.tree if isinstance(advantage, BranchingAdvantage) else None
    for key, asked in (("estimator", estimator.traits.tree), ("advantage", edges), ("loss", loss.traits.tree)):
        if asked is not None and asked != there:
            found = "do not branch" if there is None else f"branch by {there.branching} over {there.height} levels"
            raise ValueError(
                f"{key}.tree: {asked.branching} branches over {asked.height} levels, but the sampler's rollouts "
                f"{found}. Try: sampler=tree, with scale.tree for all parts [E207]"
            )
    if edges is None:
        if loss.traits.tree is not None:
            name = getattr(advantage, "__name__", type(advantage).__name__)
            raise ValueError(
                f"advantage: {name} has no number for an edge, which the loss reads. Try: advantage=tree [E207]"
            )
        return
    if estimator.traits.unit != "token" or "step" in estimator.traits.parts:
        has = "counts by steps" if "step" in estimator.traits.parts else "has no tokens"
        cause = f"{type(advantage).__name__} gives one number a token, and {type(estimator).__name__} {has}"
        raise ValueError(f"advantage: {cause}. Try: estimator=tree_edges [E207]")
    if not loss.traits.takes_unit_advantages:
        cause = f"{type(advantage).__name__} gives one number a token, and {type(loss).__name__} takes one a rollout"
        raise ValueError(f"advantage: {cause}. Try: loss=tree, loss=clipped or loss=reinforce [E207]")


def check_pair(estimator: LogProbEstimator, loss: PolicyLoss, allow: bool = False) -> None:
    """Refuse a loss that treats the estimator's likelihood as something it is not, and pairs known not to learn.

    A loss over tokens needs token likelihoods. On one ELBO a sequence it is the combination that ESPO's ablation (arXiv
    2512.03759) shows to collapse; a loss over whole sequences makes no sense of single steps.

    Args:
        estimator: gives the likelihood.
        loss: is to read it.
        allow: put them together all the same.

    Raises:
        ValueError: if the pair is refused and not allowed, or if the loss reads a part that the estimator lacks.
    """
    unsound = None if allow else _wrong_unit(estimator, loss) or _known_not_to_learn(estimator, loss)
    if unsound is None:
        _check_parts(estimator, loss)
        return
    reason, cure = unsound
    raise ValueError(
        f"loss: {type(loss).__name__} with {type(estimator).__name__} is refused: {reason}. "
        f"Try: {cure}, or stages.grpo.module.allow_unsound_pair=true [E207]"
    )


def _wrong_unit(estimator: LogProbEstimator, loss: PolicyLoss) -> tuple[str, str] | None:
    """Reason and cure where the loss does not take what the estimator gives."""
    unit, units = estimator.traits.unit, loss.traits.units
    if unit in units:
        return None
    name, asked = type(loss).__name__, " or ".join(sorted(units))
    if unit != "sequence":
        return f"{name} takes {asked} likelihoods, which are not {unit} ones", "an estimator of that unit"
    cure = "loss=espo, loss=gspo or loss=reinforce"
    if isinstance(_innermost(loss), ClippedPolicyLoss | MaskwiseBoundLoss):
        collapse = "on one ELBO a sequence that is known to collapse (ESPO, arXiv 2512.03759)"
        return f"{name} clips token by token; {collapse}", cure
    return f"{name} weighs {asked} likelihoods; one ELBO a sequence has none", cure


def _known_not_to_learn(estimator: LogProbEstimator, loss: PolicyLoss) -> tuple[str, str] | None:
    """Reason and cure for a pair whose units fit and that others have seen fail."""
    inner, traits = _innermost(loss), estimator.traits
    kl = getattr(inner, "kl", None)
    if isinstance(inner, SequenceClippedLoss) and traits.is_mean_field:
        reason = "a ratio of sequences from mean-field log-probs does not learn (ESPO's ablation, arXiv 2512.03759)"
        return reason, "estimator=espo, or loss=clipped"
    if traits.unit in ("sequence", "view") and loss.traits.needs_reference and getattr(kl, "func", kl) in (k1, k3):
        reason = "the KL estimators k1 and k3 fail on likelihood bounds (ESPO's ablation, arXiv 2512.03759)"
        return reason, "loss.kl._target_=d1lit.losses.terms.k2, or loss.beta=0"
    if traits.is_upper_bound:
        reason = "an upper bound alone for A <= 0 collapses after some hundred steps (SPG's authors and users)"
        return reason, "estimator.mix_weight=0.5"
    return None


def _innermost(loss: Any) -> Any:
    """The loss inside all wrappers."""
    while hasattr(loss, "loss"):
        loss = loss.loss
    return loss


_WITH_PART = {
    "edge": "tree_edges",
    "elbo": "spg",
    "of_step": "drift",
    "order": "ordered_trace",
    "tokens": "ordered_trace",
}
"""An estimator whose likelihood has the part."""


def _check_parts(estimator: LogProbEstimator, loss: PolicyLoss) -> None:
    missing = sorted(loss.traits.needs_parts - estimator.traits.parts)
    if missing:
        raise ValueError(
            f"loss: {type(loss).__name__} with {type(estimator).__name__} is refused: the loss reads "
            f"{', '.join(missing)}, which that estimator has not. "
            f"Try: estimator={_WITH_PART.get(missing[0], '...')} [E207]"
        )
