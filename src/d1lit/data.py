"""What one micro-batch is: pure functions of (seed, position in the run, rank), so order never depends on the machine.

Row order is a stream of permutations, one an epoch, of the row numbers; update s of a run with a global batch of B rows
takes rows s*B .. s*B+B-1 of the stream. Ranks and micro-batches only slice that batch. Resuming is starting the count
elsewhere: nothing but the number of finished batches has to be remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from d1lit.draws import CounterDraws
from d1lit.types import Example, PromptBatch


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut over ranks and micro-batches."""

    batch_size: int
    """Rows (SFT) or prompts (RL) of one optimizer step, over all ranks."""
    micro_batch_size: int
    """Rows or prompts that one rank handles at a time."""
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        share = self.world_size * self.micro_batch_size
        if self.batch_size % share:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % (m * self.world_size) == 0]
            cure = f"micro_batch_size={max(m for m in fits if m <= self.micro_batch_size) if fits else '?'}"
            if not fits:
                cure = f"a batch_size that is a multiple of {self.world_size}"
            raise ValueError(
                f"batch_size: {self.batch_size} is not a multiple of micro_batch_size * devices = "
                f"{self.micro_batch_size} * {self.world_size}. Try: {cure} [E208]"
            )

    @property
    def num_micro(self) -> int:
        """Micro-batches that one rank accumulates for one optimizer step."""
        return self.batch_size // (self.world_size * self.micro_batch_size)

    def rank_slice(self) -> slice:
        """This rank's rows of a global batch."""
        per_rank = self.batch_size // self.world_size
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    def micro_slice(self, micro: int) -> slice:
        """The rows of micro-batch `micro` of this rank, within the global batch."""
        start = self.rank_slice().start + micro * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


@dataclass(frozen=True)
class RowOrder:
    """The stream of permutations of `num_rows` row numbers under one seed."""

    num_rows: int
    seed: int
    stream: str = "order"

    @lru_cache(maxsize=4)  # noqa: B019  (instances are frozen, few and small)
    def _epoch(self, epoch: int) -> list[int]:
        return CounterDraws(self.seed).permutation(self.stream, self.num_rows, epoch).tolist()

    def batch(self, number: int, batch_size: int) -> list[int]:
        """Row numbers of global batch `number`."""
        positions = range(number * batch_size, (number + 1) * batch_size)
        return [self._epoch(p // self.num_rows)[p % self.num_rows] for p in positions]


# ----------------------------------------------------------------------------------------------------------- RL prompts


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Token lists to one left-padded tensor (its length a multiple of `multiple`) and the mask of its real tokens."""
    longest = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, longest - len(row) :] = True
    return ids, mask


@dataclass(frozen=True)
class EncodedRow:
    """A task row with its prompt as token ids."""

    prompt_ids: Sequence[int]
    example: Example
    completion_ids: Sequence[int] = ()
    """The demonstration to imitate (SFT); without its end-of-sequence token."""


def prompt_batch(
    rows: Sequence[EncodedRow], row_ids: Sequence[int], pad_id: int, length_multiple: int = 1
) -> PromptBatch:
    """Rows to a left-padded batch whose draws hang on `row_ids`."""
    ids, mask = left_pad([row.prompt_ids for row in rows], pad_id, length_multiple)
    return PromptBatch(ids, mask, torch.tensor(list(row_ids), dtype=torch.int64), tuple(row.example for row in rows))


@dataclass(frozen=True)
class InnerUpdate:
    """Which part of the diffu-GRPO cycle a batch is: rollout `step`, inner update `inner`, micro-batch `micro`."""

    step: int
    """Of the run as draws count it: the number of the rollout, not of the optimizer step."""
    inner: int
    micro: int
    num_micro: int
    prompts: PromptBatch | None
    """All prompts of this rank for the rollout; only at inner 0 of micro-batch 0, where they are needed."""
    reserves: tuple[PromptBatch, ...] = ()
    """As many prompts again, once for each time that groups without spread may be replaced."""


@dataclass
class PromptCycles(Dataset):
    """Batches of diffu-GRPO in inner-major order: inner 0 of every micro-batch, then inner 1, ...

    So all micro-batches of an optimizer step share their inner index (d1's advances per micro-batch), and every
    rollout of an update is collected under the same weights.
    """

    rows: Sequence[EncodedRow]
    plan: BatchPlan
    num_inner_updates: int
    num_updates: int
    """Optimizer steps of the stage; the last rollout may be used for fewer than `num_inner_updates`."""
    pad_id: int
    seed: int
    length_multiple: int = 1
    """Prompts are padded up to a multiple, so that few shapes occur."""
    num_refills: int = 0
    """How often a rollout may replace its groups without spread; each time another batch of rows is set aside."""
    order: RowOrder = field(init=False)

    def __post_init__(self) -> None:
        self.order = RowOrder(len(self.rows), self.seed, "prompts")

    def __len__(self) -> int:
        return self.num_updates * self.plan.num_micro

    def __getitem__(self, index: int) -> InnerUpdate:
        update, micro = divmod(index, self.plan.num_micro)
        step, inner = divmod(update, self.num_inner_updates)
        prompts, reserves, size = None, (), self.plan.batch_size
        if inner == 0 and micro == 0:
            # Padded alike on every rank: masks of prompt tokens are drawn by place.
            rows = [self.rows[n] for n in self.order.batch(step, size * (1 + self.num_refills))]
            mine = self.plan.rank_slice()
            whole = prompt_batch(rows, range(len(rows)), self.pad_id, self.length_multiple)
            prompts, *spare = (
                whole.rows(n * size + mine.start, n * size + mine.stop) for n in range(1 + self.num_refills)
            )
            reserves = tuple(spare)
        return InnerUpdate(step, inner, micro, self.plan.num_micro, prompts, reserves)


# ------------------------------------------------------------------------------------------------------ SFT completions


@dataclass(frozen=True)
class CompletionBatch:
    """Demonstrations of one micro-batch."""

    ids: Int[Tensor, "B T"]
    is_target: Bool[Tensor, "B T"]
    """Positions that may be masked and are learnt: the completion and its end-of-sequence padding."""
    attention: Bool[Tensor, "B T"] | None
    row_ids: Int[Tensor, " B"]
    """Place of each row in the global batch; draws hang on it."""
    update: int
    """Which optimizer step of the stage; draws hang on it."""
    num_targets: int
    """Target positions in the GLOBAL batch, over ranks and micro-batches."""
    num_rows: int
    """Rows in the GLOBAL batch."""
    names: tuple[str, ...] = ()
    """The id of each row in its data, to speak of it."""


Layout = Callable[[Sequence[EncodedRow], int, int], tuple[Tensor, Tensor, Tensor | None]]


def canvas_layout(
    rows: Sequence[EncodedRow], eos_id: int, pad_id: int, completion_length: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Prompts padded on the left, completions filled with end-of-sequence up to `completion_length`: a rollout's shape.

    The network then learns to end a completion within the canvas that rollouts and evaluation will give it.

    Raises:
        ValueError: if a completion with its end-of-sequence token is longer than the canvas.
    """
    for row in rows:
        if len(row.completion_ids) + 1 > completion_length:
            raise ValueError(
                f"completion_length: {completion_length} tokens cannot hold the demonstration of row "
                f"{row.example.get('id')!r} ({len(row.completion_ids)} tokens and the end). Try: a longer one, or "
                "data.overlong=drop [E307]"
            )
    prompt_ids, prompt_mask = left_pad([row.prompt_ids for row in rows], pad_id)
    completions = torch.full((len(rows), completion_length), eos_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        completions[i, : len(row.completion_ids)] = torch.tensor(list(row.completion_ids), dtype=torch.int64)
    ids = torch.cat([prompt_ids, completions], dim=1)
    everywhere = torch.ones_like(completions, dtype=torch.bool)
    is_target = torch.cat([torch.zeros_like(prompt_mask), everywhere], dim=1)
    attention = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, everywhere], dim=1)
    return ids, is_target, attention


def right_padded_layout(
    rows: Sequence[EncodedRow], eos_id: int, pad_id: int, max_length: int, pad_to_max: bool, learn_padding: bool
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Prompt and completion joined, cut at `max_length`, filled on the right with end-of-sequence.

    d1's SFT (SFT/sft_trainer.py) pads every row to 4096 and learns the padding, as LLaDA was trained; with
    `learn_padding` false only the first end-of-sequence is learnt and the rest is hidden from attention.

    Raises:
        ValueError: for a prompt that leaves no token to learn (d1 trains on such a row, which teaches nothing).
    """
    for row in rows:
        if len(row.prompt_ids) >= max_length:
            raise ValueError(
                f"max_length: {max_length} tokens cannot hold the prompt of row {row.example.get('id')!r} "
                f"({len(row.prompt_ids)} tokens) and a token to learn. Try: a longer one, or data.overlong=drop [E307]"
            )
    joined = [(list(r.prompt_ids) + list(r.completion_ids) + [eos_id])[:max_length] for r in rows]
    length = max_length if pad_to_max else max(map(len, joined))
    ids = torch.full((len(rows), length), eos_id, dtype=torch.int64)
    is_target = torch.zeros((len(rows), length), dtype=torch.bool)
    attention = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (row, tokens) in enumerate(zip(rows, joined, strict=True)):
        ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        is_target[i, len(row.prompt_ids) : length if learn_padding else len(tokens)] = True
        attention[i, : len(tokens)] = True
    return ids, is_target, None if learn_padding or bool(attention.all()) else attention


@dataclass
class CompletionRows(Dataset):
    """Micro-batches of demonstrations, padded alike over the whole global batch so that the cut changes nothing."""

    rows: Sequence[EncodedRow]
    plan: BatchPlan
    num_updates: int
    layout: Layout
    eos_id: int
    pad_id: int
    seed: int
    order: RowOrder = field(init=False)

    def __post_init__(self) -> None:
        self.order = RowOrder(len(self.rows), self.seed, "demonstrations")

    def __len__(self) -> int:
        return self.num_updates * self.plan.num_micro

    def __getitem__(self, index: int) -> CompletionBatch:
        update, micro = divmod(index, self.plan.num_micro)
        rows = [self.rows[n] for n in self.order.batch(update, self.plan.batch_size)]
        return completion_batch(rows, self.plan.micro_slice(micro), update, self.layout, self.eos_id, self.pad_id)


def completion_batch(
    rows: Sequence[EncodedRow], part: slice, update: int, layout: Layout, eos_id: int, pad_id: int
) -> CompletionBatch:
    """The rows of `part`, laid out together with the whole global batch `rows`."""
    ids, is_target, attention = layout(rows, eos_id, pad_id)
    return CompletionBatch(
        ids[part],
        is_target[part],
        None if attention is None else attention[part],
        torch.arange(len(rows))[part],
        update,
        int(is_target.sum()),
        len(rows),
        tuple(str(row.example.get("id")) for row in rows[part]),
    )


# --------------------------------------------------------------------------------------------------------------- loader


@dataclass
class ResumableOrder(Sampler[int]):
    """Counts batches from `start`, but is as long as the whole stage: Lightning's loops count from zero."""

    length: int
    start: int = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))

    def __len__(self) -> int:
        return self.length


def batch_loader(dataset: Dataset, length: int, start: int = 0) -> DataLoader:
    """A loader that yields dataset[start], dataset[start + 1], ... as they are."""
    return DataLoader(dataset, batch_size=None, sampler=ResumableOrder(length, start), collate_fn=_as_is)


def _as_is(item: Any) -> Any:
    return item


def moved(record: Any, device: torch.device) -> Any:
    """A record of this module with its tensors on `device`."""
    changes: dict[str, Any] = {
        name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor | PromptBatch)
    }
    if isinstance(record, InnerUpdate):
        changes["reserves"] = tuple(prompts.to(device) for prompts in record.reserves)
    return type(record)(**{**vars(record), **changes})
