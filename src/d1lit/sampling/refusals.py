"""What a block sampler refuses: values outside their range, and parts that do not fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d1lit.sampling.commit import CommitAll, CumulativeEntropyBounded, EntropyBounded
from d1lit.sampling.confidence import NegativeEntropy
from d1lit.sampling.memory import PredictionChange, StableThreshold
from d1lit.sampling.sharing import check_tree

if TYPE_CHECKING:
    from d1lit.sampling.block import BlockSampler


def check_sampler(sampler: BlockSampler) -> None:
    """Refuse values outside their range, and parts that do not fit each other.

    Raises:
        ValueError: naming the key, the value and the cure.
    """
    for key in ("completion_length", "num_steps", "block_length"):
        if getattr(sampler, key) < 1:
            raise ValueError(f"sampler.{key}: {getattr(sampler, key)} must be at least 1. Try: a positive number.")
    if sampler.completion_length % sampler.block_length:
        raise ValueError(
            f"sampler.block_length: {sampler.block_length} does not divide completion_length"
            f" {sampler.completion_length}. Try: a divisor of {sampler.completion_length}."
        )
    for key in ("temperature", "guidance"):
        if getattr(sampler, key) < 0:
            raise ValueError(f"sampler.{key}: {getattr(sampler, key)} must not be below 0. Try: 0.")
    if sampler.rows_per_forward is not None and sampler.rows_per_forward < (2 if sampler.guidance else 1):
        raise ValueError(
            f"sampler.rows_per_forward: {sampler.rows_per_forward} leaves no room for a row"
            " (a guided one counts twice). Try: 2 or more."
        )
    _check_parts(sampler)
    if sampler.tree is not None:
        quotas = sampler.commit.quotas(sampler.block_length, sampler.steps_per_block)
        room = None if sampler.rows_per_forward is None else sampler.room_for(sampler.rows_per_forward)
        whole = None if quotas is None else quotas * sampler.num_blocks
        check_tree(sampler.tree, whole, room, sampler.cache is not None)


def _check_parts(sampler: BlockSampler) -> None:
    """Refuse parts that do not fit each other."""
    bounded = isinstance(sampler.commit, EntropyBounded | CumulativeEntropyBounded)
    if bounded and not isinstance(sampler.confidence, NegativeEntropy):
        raise ValueError(
            f"sampler.confidence: {type(sampler.confidence).__name__} is no entropy, which"
            f" {type(sampler.commit).__name__} bounds. Try: NegativeEntropy."
        )
    if isinstance(sampler.commit, StableThreshold) != isinstance(sampler.memory, PredictionChange):
        raise ValueError("sampler.memory: StableThreshold reads what PredictionChange keeps. Try: both or neither.")
    if sampler.remask is not None and sampler.commit.quotas(sampler.block_length, sampler.steps_per_block) is not None:
        raise ValueError(
            f"sampler.remask: {type(sampler.commit).__name__} fixes so many tokens whatever is remasked. "
            "Try: the commit rule of the same paper, or a threshold."
        )
    if sampler.edit is not None:
        _check_edit(sampler)
    if isinstance(sampler.commit, CommitAll) and sampler.remask is None:
        raise ValueError("sampler.remask: CommitAll fixes all at once without one. Try: LowestConfidence.")
    if sampler.verifies and (sampler.guidance or sampler.cache is not None):
        raise ValueError(
            f"sampler.remask: {type(sampler.remask).__name__} lays a hidden copy of the block behind the canvas, which"
            " guidance and caches do not know. Try: guidance=0 and no cache."
        )
    if sampler.block_causal and sampler.verifies:
        raise ValueError("sampler.block_causal: a hidden copy of the block would see all of it. Try: no such remask.")
    if sampler.any_order and (sampler.block_causal or sampler.cache is not None or sampler.remask is not None):
        raise ValueError(
            "sampler.any_order: what a token sees is settled when it is committed, which remask rules undo, and"
            " neither caches nor block_causal know of it. Try: any_order=false, or none of these."
        )
    if sampler.cache is not None and sampler.memory is not None and sampler.memory.looks_ahead:
        raise ValueError("sampler.cache: a memory that looks beyond the block needs all of it. Try: no cache.")
    if sampler.record_predictions:
        _check_recording(sampler)


def _check_edit(sampler: BlockSampler) -> None:
    """Refuse parts that an edit rule does not go with."""
    if sampler.commit.quotas(sampler.block_length, sampler.steps_per_block) is not None:
        raise ValueError(
            f"sampler.edit: {type(sampler.commit).__name__} plans the steps of a block, and edits take more. "
            "Try: sampler.commit._target_=d1lit.sampling.Threshold, or another rule that decides from predictions."
        )
    if sampler.remask is not None or sampler.memory is not None or sampler.any_order:
        raise ValueError(
            "sampler.edit: remask rules and memories reckon with tokens that stay as they were fixed, and so does"
            " any_order. Try: none of these."
        )
    if sampler.is_approximate:
        raise ValueError(
            "sampler.edit: how far an approximate cache strays is told by replaying the commit steps, which edits"
            " undo. Try: no cache, or block_causal=true for a network trained so."
        )


def _check_recording(sampler: BlockSampler) -> None:
    """Refuse parts that predict the active block alone, or more than its masks."""
    narrow = sampler.memory is not None and not sampler.memory.looks_ahead
    parts = {"cache": sampler.cache, "edit": sampler.edit, "memory": sampler.memory if narrow else None}
    for key, part in parts.items():
        if part is not None:
            raise ValueError(
                f"sampler.{key}: {type(part).__name__} looks at the active block alone, and what every step predicts"
                " is asked for on the whole canvas. Try: sampler=low_confidence, or sampler=rcr."
            )
