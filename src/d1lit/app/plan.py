"""A run before there is a network: its parts, the rows they see, and what recipes and evaluations get of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from d1lit.app.config_errors import as_config_error
from d1lit.data import BatchPlan, CompletionRows, EncodedRow, PromptCycles
from d1lit.errors import ConfigError
from d1lit.models import (
    LoraSettings,
    Policy,
    build_policy,
    build_tiny_tokenizer,
    decode_completion,
    encode_text,
    load_tokenizer,
)
from d1lit.models.loading import find_folder, load_config, shard_files
from d1lit.modules import Corpus, Demonstrations, DiffuGRPO, MaskedSFT, Prompts, StageData
from d1lit.modules.stage_data import StageRows, prompt_rows
from d1lit.recipes import Stage
from d1lit.sampling import BlockSampler
from d1lit.tasks import AnyTask, graded_text
from d1lit.types import Example, LogProbEstimator, PolicyLoss


@dataclass(frozen=True)
class StageParts:
    """A stage's objects, before there is a network."""

    name: str
    module: Callable[..., L.LightningModule]
    data: Demonstrations | Corpus | Prompts
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., Any]
    lora: LoraSettings | None
    max_updates: int
    batch_size: int
    micro_batch_size: int
    fits_memory: bool
    """The size of a micro-batch follows from the memory of a device (micro_batches.py); until then it is 1."""
    gradient_clip: float | None
    validate_every: int | None
    """Optimizer steps between two looks at the validation rows; None for none."""
    select: Literal["last", "best_val"]
    """Which weights the stage hands over."""

    @property
    def trains_order_head(self) -> bool:
        """Whether the stage's estimator asks for a head that scores positions."""
        estimator = self.module.keywords.get("estimator") if isinstance(self.module, partial) else None
        if not isinstance(estimator, LogProbEstimator) or estimator.traits.order is None:
            return False
        return estimator.traits.order.score == "head"

    @property
    def keeps_reference(self) -> bool:
        """Whether the stage compares with a policy of before that has to be kept beside the one that trains.

        With an adapter that stays put, it is the adapter switched off; only one that moves is kept. An order head
        cannot be switched off.
        """
        arguments = self.module.keywords if isinstance(self.module, partial) else {}
        loss = arguments.get("loss")
        reads = isinstance(loss, PolicyLoss) and loss.traits.needs_reference
        moves = self.lora is None or self.trains_order_head or arguments.get("reference_sync_every") is not None
        return moves and (reads or bool(arguments.get("kl_in_reward")))


@dataclass(frozen=True)
class Plan:
    """A run, built as far as possible without a network."""

    config: DictConfig
    task: AnyTask
    sampler: BlockSampler
    stages: Sequence[StageParts]
    base: StageParts | None
    """The stage that makes the built-in model; None where the model is read from somewhere."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    @cached_property
    def device(self) -> torch.device:
        """Where the network of this process lives."""
        accelerator = self.config.trainer.accelerator
        if accelerator == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def tokenizer_here(self) -> Any | None:
        """The model's tokenizer, if nothing need be fetched for it.

        Raises:
            ConfigError: if the model's folder holds none that fits.
        """
        path = self.config.model.path
        if path is None:
            return build_tiny_tokenizer()
        is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        if is_hub_id and not Path(path).is_dir():
            return None
        try:
            folder = find_folder(path)
            shard_files(folder)
            return load_tokenizer(str(folder), load_config(folder))
        except ValueError as error:
            raise as_config_error(error, "model.path") from None

    def rows_of(self, parts: StageParts, tokenizer: Any) -> StageRows:
        """What a stage trains on, made once."""
        if parts is self.base:  # many rows, wanted once
            return parts.data.rows(self.task, tokenizer, self.seed)
        if parts.name not in self._rows:
            self._rows[parts.name] = parts.data.rows(self.task, tokenizer, self.seed)
        return self._rows[parts.name]

    @cached_property
    def _rows(self) -> dict[str, StageRows]:
        return {}

    def make_policy(self, path: Path | str | None = None) -> tuple[Policy, Any]:
        """A policy with all weights trainable and its tokenizer, from `path` or from the configured place."""
        model = self.config.model
        return build_policy(
            path=str(path) if path is not None else model.path,
            tiny=None if model.tiny is None else OmegaConf.to_container(model.tiny),  # type: ignore[arg-type]
            dtype=model.dtype,
            attend_padding=model.attend_padding,
            lora=None,
            seed=self.seed,
            device=self.device,
            revision=model.revision if path is None else None,
            gradient_checkpointing=model.gradient_checkpointing,
            compile=model.compile,
            cuda_graphs=model.cuda_graphs,
        )


# --------------------------------------------------------------------------------------------------------------- stages


def make_stage(
    plan: Plan, parts: StageParts, tokenizer: Any, make_trainer: Callable[[StageParts, Path, int], L.Trainer]
) -> Stage:
    """The stage as recipes run it."""
    seed = plan.seed
    rows = plan.rows_of(parts, tokenizer).rows

    def make_module(policy: Policy) -> L.LightningModule:
        module = parts.module(
            policy=policy,
            optimizer=parts.optimizer,
            lr_schedule=parts.lr_schedule,
            num_updates=parts.max_updates,
            seed=seed,
            **_module_extras(plan, parts, policy, tokenizer),
        )
        assert isinstance(module, DiffuGRPO | MaskedSFT)
        return module

    def make_data() -> StageData:
        return StageData(
            partial(_dataset, parts, rows, tokenizer, seed),
            batch_size=parts.batch_size,
            micro_batch_size=parts.micro_batch_size,
        )

    return Stage(
        name=parts.name,
        lora=parts.lora,
        keeps_reference=parts.keeps_reference,
        selects_best=parts.select == "best_val",
        make_module=make_module,
        make_data=make_data,
        make_trainer=partial(make_trainer, parts),
        trains_order_head=parts.trains_order_head,
    )


def _module_extras(plan: Plan, parts: StageParts, policy: Policy, tokenizer: Any) -> dict[str, Any]:
    if isinstance(parts.data, Prompts):
        end = None if plan.config.quirks.reward_after_end else policy.eos_token_id
        return {
            "decode": partial(judged_text, plan.task, tokenizer, end),
            "worked": partial(worked_ids, plan.task, tokenizer),
            "counted": plan.task.counted,
        }
    rows: Sequence[EncodedRow] = ()
    if parts.validate_every is not None and isinstance(parts.data, Demonstrations):
        rows = parts.data.validation_rows(plan.task, tokenizer)
    return {"layout": parts.data.layout, "validation_rows": rows}


def decode(tokenizer: Any, eos_token_id: int, ids: torch.Tensor) -> str:
    """Text of a completion up to its end."""
    return decode_completion(tokenizer, ids.tolist(), eos_token_id)


def worked_ids(task: AnyTask, tokenizer: Any, example: Example) -> list[int]:
    """The ids of a row's worked answer; none where it has none."""
    return encode_text(tokenizer, task.worked(example) or "")


def judged_text(task: AnyTask, tokenizer: Any, eos_token_id: int | None, ids: torch.Tensor) -> str:
    """What the judges read of a completion: with the prompt's prefill before it where the template says so.

    Args:
        task: whose template it is.
        tokenizer: of the model.
        eos_token_id: ends the text; None reads all of it, special tokens left out, as d1's rewards do.
        ids: of the completion.
    """
    return graded_text(task.template, decode(tokenizer, -1 if eos_token_id is None else eos_token_id, ids))


def _dataset(
    parts: StageParts, rows: Sequence[EncodedRow], tokenizer: Any, seed: int, batch_plan: BatchPlan
) -> CompletionRows | PromptCycles:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if isinstance(parts.data, Prompts):
        given = parts.module.keywords  # type: ignore[attr-defined]
        inner, refills, multiple = given["num_inner_updates"], given.get("num_refills", 0), parts.data.length_multiple
        return PromptCycles(rows, batch_plan, inner, parts.max_updates, pad, seed, multiple, refills)
    return CompletionRows(rows, batch_plan, parts.max_updates, parts.data.layout, eos, pad, seed)


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluation_sampler(plan: Plan, completion_length: int | None) -> BlockSampler:
    """The training sampler at the evaluation's temperature, scaled to another length at equal tokens a step."""
    recorded = {"record_trace": False, "record_predictions": False}
    sampler = replace(plan.sampler, temperature=plan.config.evaluation.temperature, tree=None, **recorded)
    if completion_length is None or completion_length == sampler.completion_length:
        return sampler
    block = min(sampler.block_length, completion_length)
    if completion_length % block:
        raise ConfigError(
            "evaluation.lengths",
            f"{completion_length} is not a multiple of the block length {block}",
            f"evaluation.lengths=[{completion_length // block * block or block}]",
            "E202",
        )
    steps = max(1, round(completion_length * sampler.num_steps / sampler.completion_length))
    return replace(sampler, completion_length=completion_length, num_steps=steps, block_length=block)


def shortened(sampler: BlockSampler, tokens: int) -> BlockSampler:
    """The sampler with a canvas shorter by a given prefix, in about as many steps and blocks of about the same size."""
    length = sampler.completion_length - tokens
    block = max(size for size in range(1, sampler.block_length + 1) if length % size == 0)
    return replace(sampler, completion_length=length, block_length=block)


def evaluation_rows(plan: Plan, tokenizer: Any) -> list[EncodedRow]:
    """The rows the configuration asks for, as prompts."""
    rows = prompt_rows(plan.task, plan.config.evaluation.split, tokenizer)
    return rows[: plan.config.evaluation.rows]
