"""What the policy optimisation refuses before there is a network: values and pairs of parts that cannot learn."""

from __future__ import annotations

from typing import Any

from d1lit.advantages import LengthPenalty
from d1lit.losses import check_pair, check_steps, check_trajectory, check_tree, of_steps, stepping
from d1lit.modules.inpainting import Inpainting, check_inpainting
from d1lit.types import Advantage, LogProbEstimator, PolicyLoss, Sampler


def check_grpo(
    estimator: LogProbEstimator,
    loss: PolicyLoss,
    sampler: Sampler,
    group_size: int,
    num_inner_updates: int,
    reference_sync_every: int | None = None,
    reference_sync_weight: float = 1.0,
    views_per_chunk: int | None = None,
    allow_unsound_pair: bool = False,
    num_refills: int = 0,
    length_penalty: LengthPenalty | None = None,
    kl_in_reward: float = 0.0,
    advantage: Advantage | None = None,
    inpainting: Inpainting | None = None,
    **others: Any,
) -> None:
    """Refuse what cannot learn, before there is a network.

    Raises:
        ValueError: naming the key, the value and the cure.
    """
    check_pair(estimator, loss, allow=allow_unsound_pair)
    check_trajectory(estimator, sampler)
    check_tree(sampler, estimator, advantage, loss, group_size)
    sampler = check_steps(sampler, estimator, advantage, loss)
    if of_steps(advantage) and (length_penalty is not None or kl_in_reward):
        key = "kl_in_reward" if kl_in_reward else "length_penalty"
        cause = f"{type(advantage).__name__} reads the rewards of every step's text, and this part judges no text"
        raise ValueError(f"module.{key}: {cause}. Try: {'loss.beta, or 0' if kl_in_reward else 'null'} [E207]")
    _check_rewards(estimator, sampler, num_refills, kl_in_reward, inpainting is not None)
    if num_inner_updates < 1:
        raise ValueError(f"module.num_inner_updates: {num_inner_updates} is below 1. Try: 1 or more")
    if reference_sync_every is not None and reference_sync_every < 1:
        cause = f"module.reference_sync_every: {reference_sync_every} is below 1"
        raise ValueError(f"{cause}. Try: 1 or more optimizer steps, or null for a reference that stays")
    if reference_sync_every is not None and not (kl_in_reward or loss.traits.needs_reference):
        cause = f"module.reference_sync_every: {reference_sync_every}, but this loss has no reference to move"
        raise ValueError(f"{cause}. Try: loss.beta=0.04, or null")
    if not 0 <= reference_sync_weight <= 1:
        cause = f"module.reference_sync_weight: {reference_sync_weight} is not in [0, 1]"
        raise ValueError(f"{cause}. Try: 1, which copies the policy")
    if views_per_chunk is not None and views_per_chunk < 1:
        raise ValueError(f"module.views_per_chunk: {views_per_chunk} is below 1. Try: null (all at once), or 8")
    if loss.traits.group_size not in (None, group_size):
        cause = f"module.group_size: {group_size}, but {type(loss).__name__} takes {loss.traits.group_size}"
        raise ValueError(f"{cause}. Try: {loss.traits.group_size} [E207]")
    if group_size < 2:
        raise ValueError(
            f"module.group_size: {group_size} leaves nothing to compare a rollout with (advantages would be 0). "
            "Try: 2 or more"
        )
    if inpainting is not None:
        check_inpainting(inpainting, estimator, sampler, group_size)


def _check_rewards(
    estimator: LogProbEstimator, sampler: Sampler, num_refills: int, kl_in_reward: float, inpaints: bool
) -> None:
    """Refuse what cannot be done to rollouts and their rewards before there are advantages."""
    if num_refills < 0:
        raise ValueError(f"module.num_refills: {num_refills} is below 0. Try: 0 (no dynamic sampling), or 2")
    if kl_in_reward < 0 or (kl_in_reward and estimator.traits.needs_advantages):
        cause = f"{kl_in_reward} is below 0" if kl_in_reward < 0 else f"{type(estimator).__name__} needs advantages"
        raise ValueError(f"module.kl_in_reward: {cause}, which come after the reward. Try: loss.beta, or 0")
    if kl_in_reward and estimator.traits.tree is not None:
        cause = f"the tokens of {type(estimator).__name__} weigh by their edges, so their sum is no KL of a completion"
        raise ValueError(f"module.kl_in_reward: {cause}. Try: loss.beta, or estimator=cj")
    key = "num_refills" if num_refills else "inpainting" if inpaints else None
    steps = stepping(sampler)
    if key is None or steps is None:
        return
    if steps.record_trace:
        cause = f"traces of different lengths do not mix, as module.{key} would have them"
        raise ValueError(f"sampler.record_trace: {cause}. Try: false [E207]")
    if steps.record_predictions:
        cause = "the predictions that advantage or estimator ask for are of the rollouts as they were drawn"
        raise ValueError(f"module.{key}: {cause}. Try: {'0' if num_refills else 'null'} [E207]")
