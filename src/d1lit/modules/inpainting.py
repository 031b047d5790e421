"""Inpainting (IGPO, arXiv 2509.10396): a group in which every rollout fails is helped by pieces of a worked answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.draws import random_subset
from d1lit.modules.refilling import picked
from d1lit.types import (
    Draws,
    Example,
    LogProbEstimator,
    MaskPredictor,
    PromptBatch,
    Rollout,
    Sampler,
    Verdict,
)

INPAINTING = -1
"""The inner update under which helped rollouts draw; the rollout itself draws under 0, updates under 0 and above."""

WorkedAnswer = Callable[[Example], Sequence[int]]
"""The ids of a row's worked answer; none where the row has none."""


@runtime_checkable
class CompletingSampler(Sampler, Protocol):
    """A sampler that can fill up a canvas on which tokens stand already."""

    @property
    def blank_only(self) -> str | None:
        """Key and kind of the part of it that cannot; None: nothing is in the way."""
        ...

    def complete(
        self, policy: MaskPredictor, prompts: PromptBatch, group_size: int, draws: Draws, canvas: Int[Tensor, "N C"]
    ) -> Rollout:
        """A completion a row, the tokens that are no masks being kept."""
        ...


@dataclass(frozen=True)
class Inpainting:
    """Where all rollouts of a group are wrong, each is drawn again around chunks of the row's worked answer (IGPO).

    The answer is cut into chunks of random length, a rest below the least length being left out; of a rollout's
    chunks a share, drawn for itself, is put on its canvas where they stand in the answer. Of a group's right ones the
    first `max_replaced` take the place of the wrong ones of the same row ids; which are right is exchangeable.
    The whole answer is cut, its result too; what the canvas does not hold is left out.
    Differs from the published code: there the gaps between chunks are stretched, by at most 1.5, towards the canvas's
    length, the last 30 tokens of which stay free, and a process's whole batch has to be wrong.
    """

    least_share: float
    """Of the chunks; a rollout's share is uniform between the two, and at least one chunk is given."""
    most_share: float
    least_chunk: int
    """Tokens; a chunk's length is uniform between the two."""
    most_chunk: int
    max_replaced: int
    """Rollouts of a group."""

    def __post_init__(self) -> None:
        if not 0 < self.least_share <= self.most_share <= 1:
            cause = f"{self.least_share} to {self.most_share} is no range of shares"
            raise ValueError(f"stages.grpo.module.inpainting.least_share: {cause}. Try: 0.1 to 0.5, the paper's")
        if not 1 <= self.least_chunk <= self.most_chunk:
            cause = f"{self.least_chunk} to {self.most_chunk} is no range of lengths"
            raise ValueError(f"stages.grpo.module.inpainting.least_chunk: {cause}. Try: 4 to 8, the paper's")
        if self.max_replaced < 1:
            raise ValueError(
                f"stages.grpo.module.inpainting.max_replaced: {self.max_replaced} is below 1. Try: 1, the paper's"
            )

    def canvas(
        self,
        prompts: PromptBatch,
        answers: Sequence[Sequence[int]],
        group_size: int,
        length: int,
        mask_token_id: int,
        draws: Draws,
    ) -> Int[Tensor, "N C"]:
        """A completion to begin with for each rollout: masks, and between them the chunks drawn for it.

        Args:
            prompts: of the groups; draws hang on the row ids of their rollouts.
            answers: ids of each prompt's worked answer.
            group_size: rollouts of each prompt, adjacent.
            length: of a completion.
            mask_token_id: what stands where nothing is given.
            draws: of this step.
        """
        device = prompts.prompt_ids.device
        tokens = torch.full((len(answers), length), mask_token_id, dtype=prompts.prompt_ids.dtype, device=device)
        for row, answer in enumerate(answers):
            kept = tokens.new_tensor(list(answer[:length]))
            tokens[row, : len(kept)] = kept
        lengths = torch.tensor([min(len(answer), length) for answer in answers], device=device)
        row_ids = (prompts.row_ids[:, None] * group_size + torch.arange(group_size, device=device)).flatten()
        share, sizes, keys = (
            draws.uniform(f"inpainting.{name}", row_ids, shape, dtype=torch.float64)
            for name, shape in (("share", ()), ("size", (length,)), ("chunk", (length,)))
        )
        given = self.given(lengths.repeat_interleave(group_size), share, sizes, keys)
        return torch.where(given, tokens.repeat_interleave(group_size, 0), mask_token_id)

    def given(
        self,
        lengths: Int[Tensor, " n"],
        share: Float[Tensor, " n"],
        sizes: Float[Tensor, "n C"],
        keys: Float[Tensor, "n C"],
    ) -> Bool[Tensor, "n C"]:
        """Which places are given, from uniforms: for the share, for each chunk's length, and for drawing among them."""
        size = self.least_chunk + (sizes * (self.most_chunk - self.least_chunk + 1)).long()
        ends = size.cumsum(1)
        whole = torch.minimum(ends, lengths[:, None]) - (ends - size) >= self.least_chunk
        wanted = self.least_share + share * (self.most_share - self.least_share)
        count = (wanted * whole.sum(1)).ceil().long()
        chosen = random_subset(keys, count, whole)
        place = torch.arange(sizes.shape[1], device=sizes.device)
        chunk = (place[:, None] >= ends[:, None, :]).sum(2)  # the chunks that end at or before each place
        return chosen.gather(1, chunk) & (place < lengths[:, None])

    def helped(
        self, verdicts: Sequence[Verdict], answers: Sequence[Sequence[int]], group_size: int, length: int
    ) -> Bool[Tensor, " B"]:
        """The groups whose rollouts were all judged and are all wrong, and whose answer holds a chunk on the canvas."""
        groups = [verdicts[start : start + group_size] for start in range(0, len(verdicts), group_size)]
        return torch.tensor(
            [
                min(len(answer), length) >= self.least_chunk and all(is_wrong(verdict) for verdict in group)
                for group, answer in zip(groups, answers, strict=True)
            ]
        )

    def replacements(self, verdicts: Sequence[Verdict], group_size: int) -> list[int]:
        """Of drawn-again groups, the rows that are taken: each group's first right ones."""
        rows = []
        for start in range(0, len(verdicts), group_size):
            right = [n for n in range(start, start + group_size) if is_right(verdicts[n])]
            rows += right[: self.max_replaced]
        return rows


def is_right(verdict: Verdict) -> bool:
    """Fully right by the task's grader."""
    return verdict.outcome == "ok" and verdict.value >= verdict.out_of


def is_wrong(verdict: Verdict) -> bool:
    """Judged, and not right: a judge that failed says neither."""
    return verdict.outcome not in ("timeout", "error") and not is_right(verdict)


def prompts_of(prompts: PromptBatch, wanted: Bool[Tensor, " B"]) -> PromptBatch:
    """Some of the prompts."""
    places = wanted.nonzero()[:, 0]
    here = places.to(prompts.row_ids.device)
    examples = tuple(prompts.examples[n] for n in places.tolist())
    return PromptBatch(prompts.prompt_ids[here], prompts.prompt_mask[here], prompts.row_ids[here], examples)


def replaced(rollout: Rollout, more: Rollout, rows: Sequence[int]) -> tuple[Rollout, list[int]]:
    """The rollouts, those that share a row id with the named rows of `more` given up for these; and where they stand.

    All others stay as they are, bit for bit; what both cost adds up.
    """
    place = {row_id: n for n, row_id in enumerate(rollout.row_ids.tolist())}
    where = [place[more.row_ids[row].item()] for row in rows]
    source = list(range(len(place)))
    for here, row in zip(where, rows, strict=True):
        source[here] = len(place) + row
    return picked(rollout, more, source, "module.inpainting"), where


def with_verdicts(
    verdicts: dict[str, list[Verdict]], others: dict[str, list[Verdict]], where: Sequence[int]
) -> dict[str, list[Verdict]]:
    """The verdicts, with others in some places."""
    changed = {name: list(column) for name, column in verdicts.items()}
    for name, column in others.items():
        for here, verdict in zip(where, column, strict=True):
            changed[name][here] = verdict
    return changed


def check_inpainting(rule: Inpainting, estimator: LogProbEstimator, sampler: Sampler, group_size: int) -> None:
    """Refuse what cannot start from given tokens, or would take them for drawn ones.

    Raises:
        ValueError: naming the key, the value and the cure.
    """
    if not isinstance(sampler, CompletingSampler):
        cause = f"{type(sampler).__name__} cannot start from a canvas with tokens"
        raise ValueError(f"module.inpainting: {cause}. Try: null, or a sampler with the method `complete`")
    if sampler.blank_only is not None:
        cause = "reckons with the tokens that the sampler fixed, not with those that were given"
        raise ValueError(
            f"sampler.{sampler.blank_only} {cause}. Try: a sampler without it, or module.inpainting=null [E207]"
        )
    if estimator.traits.needs_trace:
        raise ValueError(
            f"estimator: {type(estimator).__name__} with module.inpainting is refused: it replays the steps that drew "
            "the tokens, and no step drew those that were given. Try: estimator=one_step or estimator=elbo, or "
            "stages.grpo.module.inpainting=null [E207]"
        )
    length = getattr(sampler, "completion_length", rule.least_chunk)
    if rule.least_chunk > length:
        cause = f"{rule.least_chunk} tokens are more than the {length} of a completion, so no chunk would be given"
        raise ValueError(f"module.inpainting.least_chunk: {cause}. Try: 4, the paper's")
    if rule.max_replaced >= group_size:
        cause = f"{rule.max_replaced} of {group_size} rollouts would leave no wrong one to compare with"
        raise ValueError(f"module.inpainting.max_replaced: {cause}. Try: {group_size - 1} or less")
