"""What a stage trains on, and its batches as Lightning wants them, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from d1lit.data import BatchPlan, CompletionRows, EncodedRow, Layout, PromptCycles, batch_loader, moved
from d1lit.models import encode_text
from d1lit.tasks import AnyTask, Task, Template, encode_prompts


@dataclass(frozen=True)
class StageRows:
    """A stage's rows as ids."""

    rows: Sequence[EncodedRow]
    asked: int
    """How many there were before those that are too long were left out."""
    cut: int = 0
    """Demonstrations whose completion loses its end, in a layout that cuts."""

    @property
    def dropped(self) -> int:
        """Rows left out because prompt or completion is too long; no prompt is cut here."""
        return self.asked - len(self.rows)


@dataclass(frozen=True)
class Demonstrations:
    """The task's worked examples, for SFT."""

    count: int | None
    """How many; None for all."""
    layout: Layout
    overlong: Literal["error", "drop"]
    """What becomes of a demonstration longer than the layout's canvas, or with a prompt longer than its limit."""
    seed_offset: int
    """Added to the run's seed: another stage of the same run gets other demonstrations."""
    max_prompt_length: int | None = None
    """Most tokens of a demonstration's prompt; None: `task.max_prompt_length`, which rollouts obey."""

    def rows(self, task: AnyTask, tokenizer: Any, seed: int) -> StageRows:
        """Prompt and completion as ids, of each task of a mixture in its share."""
        kept: list[EncodedRow] = []
        asked = 0
        for part, count in task.portions(self.count):
            found = part.demonstrations(count, seed + 1_000_003 * self.seed_offset)
            kept += self._encoded(found, part, tokenizer, self.overlong)
            asked += len(found)
        return StageRows(kept, asked, num_cut(self.layout, kept))

    def _encoded(
        self, rows: Sequence[dict[str, Any]], task: Task, tokenizer: Any, overlong: Literal["error", "drop"]
    ) -> list[EncodedRow]:
        template, limit = task.demonstration_template, self.max_prompt_length
        return encoded_demonstrations(rows, task, template, tokenizer, self.layout, overlong, limit)

    def validation_rows(self, task: AnyTask, tokenizer: Any) -> Sequence[EncodedRow]:
        """Demonstrations that are not trained on; none where none fits."""
        return [row for part, _ in task.portions(None) for row in self._fitting_validation(part, tokenizer)]

    def _fitting_validation(self, task: Task, tokenizer: Any) -> Sequence[EncodedRow]:
        found = task.validation_demonstrations()
        try:
            return self._encoded(found, task, tokenizer, "drop") if found else ()
        except ValueError:
            return ()


@dataclass(frozen=True)
class Corpus:
    """Generated text of many authors, good and bad, to make the tiny base model from."""

    count: int
    layout: Layout
    overlong: Literal["error", "drop"]

    def rows(self, task: AnyTask, tokenizer: Any, seed: int) -> StageRows:
        """Prompt and completion as ids, of each task of a mixture in its share."""
        kept: list[EncodedRow] = []
        asked = 0
        for part, count in task.portions(self.count):
            assert count is not None
            found = part.corpus(count, seed)
            kept += encoded_demonstrations(found, part, part.template, tokenizer, self.layout, self.overlong)
            asked += len(found)
        return StageRows(kept, asked)


@dataclass(frozen=True)
class Prompts:
    """The task's training questions, for RL."""

    length_multiple: int = 1
    """Prompts of a batch are padded up to a multiple of it, so that compiled and recorded forwards meet few lengths.

    A batch that needs no padding runs on SDPA's fastest kernels; above 1 it will mostly need some. Masks of prompt
    tokens are drawn by place, so another multiple draws other ones.
    """

    def __post_init__(self) -> None:
        if self.length_multiple < 1:
            raise ValueError(f"data.length_multiple: {self.length_multiple} must be at least 1. Try: 32.")

    def rows(self, task: AnyTask, tokenizer: Any, seed: int) -> StageRows:
        """Prompts as ids."""
        return StageRows(prompt_rows(task, "train", tokenizer), len(task.rows("train")))


def prompt_rows(task: AnyTask, split: Literal["train", "val", "test"], tokenizer: Any) -> list[EncodedRow]:
    """A split's prompts as ids; too long ones are dropped or refused as the task says."""
    encoded, kept, _ = task.encode(split, tokenizer)
    return [EncodedRow(ids, example) for ids, example in zip(encoded, kept, strict=True)]


def encoded_demonstrations(
    rows: Sequence[dict[str, Any]],
    task: Task,
    template: Template,
    tokenizer: Any,
    layout: Layout,
    overlong: Literal["error", "drop"],
    max_prompt_length: int | None = None,
) -> list[EncodedRow]:
    """Prompt and completion of each row as ids; a prefill of the template is taken off the completion's front.

    No prompt is cut, whatever `task.overlong` says of the task's own: a row whose prompt is too long is left out or
    refused. The limit is `max_prompt_length`, or the task's.

    Raises:
        ValueError: if no row fits.
    """
    if max_prompt_length is None:
        limit, key = task.max_prompt_length, "task.max_prompt_length"
    else:
        limit, key = max_prompt_length, "data.max_prompt_length"
    encoded, kept, _ = encode_prompts(rows, template, tokenizer, limit, overlong, key)
    result = []
    for prompt_ids, row in zip(encoded, kept, strict=True):
        completion = str(row["completion"]).removeprefix(template.prefill)
        result.append(EncodedRow(prompt_ids, row, encode_text(tokenizer, completion)))
    fitting = [row for row in result if overlong == "error" or layout_holds(layout, row)]
    if not fitting:
        longest = min(len(row.completion_ids) for row in result) + 1
        raise ValueError(
            f"sampler.completion_length: no demonstration of {task.name} fits. Try: {longest} or more [E307]"
        )
    return fitting


def num_cut(layout: Layout, rows: Sequence[EncodedRow]) -> int:
    """How many rows a layout with a `max_length` cuts on the right."""
    most = layout.keywords.get("max_length") if isinstance(layout, partial) else None
    return 0 if most is None else sum(len(row.prompt_ids) + len(row.completion_ids) + 1 > most for row in rows)


def layout_holds(layout: Layout, row: EncodedRow) -> bool:
    """Whether a layout takes the row."""
    try:
        layout([row], 0, 0)
    except ValueError:
        return False
    return True


class StageData(L.LightningDataModule):
    """Builds the stage's data set for this rank and counts the batches done; nothing else need be remembered."""

    def __init__(
        self,
        make_dataset: Callable[[BatchPlan], CompletionRows | PromptCycles],
        batch_size: int,
        micro_batch_size: int,
    ) -> None:
        super().__init__()
        self.make_dataset = make_dataset
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.batches_done = 0

    def plan(self, world_size: int, rank: int) -> BatchPlan:
        """How the global batch is cut for this world."""
        return BatchPlan(self.batch_size, self.micro_batch_size, world_size, rank)

    def train_dataloader(self) -> DataLoader:
        """All batches of the stage, from the first one not yet done."""
        assert self.trainer is not None
        dataset = self.make_dataset(self.plan(self.trainer.world_size, self.trainer.global_rank))
        return batch_loader(dataset, len(dataset), self.batches_done)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch's record."""
        return moved(batch, device)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps done, so that another world size can count its own batches."""
        assert self.trainer is not None
        return {"updates_done": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last finished optimizer step."""
        assert self.trainer is not None
        plan = self.plan(self.trainer.world_size, self.trainer.global_rank)
        self.batches_done = state_dict["updates_done"] * plan.num_micro
