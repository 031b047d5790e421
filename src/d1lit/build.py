"""From a composed configuration to objects: everything cheap is built, and so checked, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from d1lit.components import (
    build,
    check_advantage,
    check_module,
    check_optimizer,
    check_targets,
    check_trainer,
    check_watchers,
)
from d1lit.data import BatchPlan, CompletionRows, EncodedRow, PromptCycles
from d1lit.errors import ConfigError
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.terms import micro_batch_token_mean
from d1lit.models import (
    LoraSettings,
    Policy,
    build_policy,
    build_tiny_tokenizer,
    decode_completion,
    load_tokenizer,
)
from d1lit.models.loading import find_folder, load_config, shard_files
from d1lit.models.quantizing import check_bitsandbytes
from d1lit.modules import Corpus, Demonstrations, DiffuGRPO, MaskedSFT, Prompts, StageData
from d1lit.modules.stage_data import StageRows, prompt_rows
from d1lit.processes import place
from d1lit.recipes import Stage
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import BlockSampler
from d1lit.strategies import fsdp
from d1lit.tasks import AnyTask, MixedTask, Split, Task, graded_text
from d1lit.types import LogProbEstimator, PolicyLoss, Sampler, Schedule
from d1lit.validation import as_config_error, under
from d1lit.values import check_values

KINDS: dict[str, type] = {
    "sampler": Sampler,
    "reward": RewardParts,
    "estimator": LogProbEstimator,
    "loss": PolicyLoss,
    "schedule": Schedule,
}
"""What the arguments of a stage's module of these names have to be."""


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
    """The size of a micro-batch follows from the memory of a device (estimates.py); until then it is 1."""
    gradient_clip: float | None
    validate_every: int | None
    """Optimizer steps between two looks at the validation rows; None for none."""
    select: Literal["last", "best_val"]
    """Which weights the stage hands over."""


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


def plan_run(config: DictConfig, trains: bool = True) -> Plan:
    """Build every part of a run that needs no network.

    Args:
        config: composed and resolved.
        trains: whether the stages will be run; without them, what they would train on is not asked for.

    Raises:
        ConfigError: for the first part that refuses its values.
    """
    check_values(config)
    if config.paper_compat:
        _check_is_d1(config)
    check_targets(config)
    check_trainer(config)
    check_watchers(config, Path("checked"))
    build(config, "strategy")
    task = _task(OmegaConf.to_yaml(config.task, resolve=True), "train" if trains else config.evaluation.split)
    sampler = build(config, "sampler", BlockSampler)
    world_size = _world_size(config)
    stages = [_stage(config, f"stages.{name}", name, world_size) for name in config.recipe.stages]
    for stage in stages:
        _check_stage(config, f"stages.{stage.name}", stage, world_size)
    base = None
    if config.model.path is None:  # the first process makes it for all
        base = _stage(config, "model.base", "base", world_size=1)
        _check_stage(config, "model.base", base, world_size=1)
    plan = Plan(config, task, sampler, stages, base)
    for stage in stages:
        _check_quantized(config, stage)
    tokenizer = plan.tokenizer_here()
    if tokenizer is not None:  # else the start of the run finds out
        _check_rows(plan, tokenizer, trains)
    for length in config.evaluation.lengths or ():
        evaluation_sampler(plan, length)
    return plan


def _check_quantized(config: DictConfig, stage: StageParts) -> None:
    """Four bits go with bitsandbytes, with whole copies of the model, and not with merged rollouts."""
    if stage.lora is None or stage.lora.quantize is None:
        return
    key = f"stages.{stage.name}.lora.quantize"
    strategy = build(config, "strategy")
    if isinstance(strategy, partial) and strategy.func is fsdp:
        raise ConfigError("strategy", "fsdp cannot shard weights of four bits", f"strategy=ddp, or {key}=null", "E207")
    if isinstance(stage.module, partial) and stage.module.keywords.get("merge_for_rollouts"):
        cause = "an adapter does not fit into weights of four bits"
        raise ConfigError(f"stages.{stage.name}.module.merge_for_rollouts", cause, f"false, or {key}=null", "E207")
    if not config.dry_run:
        try:
            check_bitsandbytes()
        except ValueError as error:
            raise under(error, f"stages.{stage.name}") from None


def _check_is_d1(config: DictConfig) -> None:
    """d1's accidents are those of its own estimator and loss."""
    for group, kind in (("estimator", OneStepEstimator), ("loss", ClippedPolicyLoss)):
        if config[group]._target_ != f"{kind.__module__}.{kind.__qualname__}":
            cause = f"the recipe {config.recipe.name} has not d1's {group}, whose accidents these are"
            raise ConfigError("paper_compat", cause, "recipe=d1, grpo or sft, or paper_compat=false", "E207")


def _stage(config: DictConfig, key: str, name: str, world_size: int) -> StageParts:
    node = OmegaConf.select(config, key)
    if node is None:
        raise ConfigError("recipe.stages", f"no stage {name!r}", f"a defaults entry /stage@stages.{name}", "E209")
    lora = node.lora
    try:
        settings = None if lora is None else LoraSettings(**OmegaConf.to_container(lora, resolve=True))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise under(ValueError(str(error)), key) from None
    return StageParts(
        name=name,
        module=build(config, f"{key}.module"),
        data=build(config, f"{key}.data"),
        optimizer=build(config, f"{key}.optimizer"),
        lr_schedule=build(config, f"{key}.lr_schedule"),
        lora=settings,
        max_updates=node.max_updates,
        batch_size=node.batch_size,
        micro_batch_size=min(node.micro_batch_size or 1, max(1, node.batch_size // world_size)),
        fits_memory=node.micro_batch_size is None,
        gradient_clip=node.gradient_clip,
        validate_every=node.validate_every,
        select=node.select,
    )


def _check_stage(config: DictConfig, key: str, stage: StageParts, world_size: int) -> None:
    given = {"layout", "validation_rows"} if not isinstance(stage.data, Prompts) else {"decode"}
    check_module(f"{key}.module", stage.module, {"policy", "optimizer", "lr_schedule", "num_updates", "seed", *given})
    arguments = stage.module.keywords  # type: ignore[attr-defined]
    for name, kind in KINDS.items():
        # SFT's loss is another one than RL's; only RL has an estimator.
        if name in arguments and not (name == "loss" and "estimator" not in arguments):
            _check_kind(config, f"{key}.module", name, arguments[name], kind)
    aggregate = getattr(arguments.get("loss"), "aggregate", None)
    if stage.fits_memory and isinstance(aggregate, partial) and aggregate.func is micro_batch_token_mean:
        cause = "null, but the loss is a mean over each micro-batch, whose size would follow from the device"
        raise ConfigError(f"{key}.micro_batch_size", cause, "1, as d1", "E207")
    if "advantage" in arguments:
        check_advantage("advantage", arguments["advantage"])
    check_optimizer(key, stage.optimizer, stage.lr_schedule, stage.max_updates)
    try:
        BatchPlan(stage.batch_size, stage.micro_batch_size, world_size)
        check = getattr(stage.module.func, "check", None) if isinstance(stage.module, partial) else None
        if check is not None:
            check(**stage.module.keywords)  # type: ignore[union-attr]
    except ValueError as error:
        raise under(error, key) from None


def _check_kind(config: DictConfig, key: str, name: str, built: Any, kind: type) -> None:
    node = OmegaConf.select(config, key)
    place = name if OmegaConf.is_interpolation(node, name) else f"{key}.{name}"
    if not isinstance(built, kind):
        cause = f"{node[name]._target_} makes a {type(built).__name__}, which is no {kind.__name__}"
        raise ConfigError(f"{place}._target_", cause, f"a choice of the group {name}", "E204")


def _world_size(config: DictConfig) -> int:
    """Processes of the run: those that were started from outside, or those that are asked for."""
    devices = config.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError("trainer.devices", f"{devices!r} is not a number of devices", "trainer.devices=1", "E601")
    asked, there = devices * config.trainer.num_nodes, place().world_size
    if there > 1 and asked not in (1, there):
        cure = f"trainer.devices={there // config.trainer.num_nodes}, or leave it out"
        raise ConfigError("trainer.devices", f"{asked} processes are asked for and {there} were started", cure, "E601")
    return max(asked, there)


def processes_to_start(config: DictConfig) -> int:
    """How many processes this one has to start: those of a run that nobody else has started.

    Raises:
        ConfigError: for several machines, which only srun or torchrun can start.
    """
    if place().world_size > 1:
        return 1
    if config.trainer.num_nodes > 1:
        cause = f"nobody has started the processes of {config.trainer.num_nodes} machines"
        raise ConfigError("trainer.num_nodes", cause, "srun or torchrun on every machine (docs/scaling.md)", "E601")
    return config.trainer.devices


@lru_cache(maxsize=8)
def _task(yaml: str, split: Split) -> AnyTask:
    """The task with its test rows and those of `split` read; the jobs of a sweep share it."""
    node = OmegaConf.create({"task": OmegaConf.create(yaml)})
    task = build(node, "task", Task if "members" not in node.task else MixedTask)
    try:
        task.template  # noqa: B018  (reads and parses the file)
        task.rows(split)
    except ValueError as error:
        raise as_config_error(error, "task") from None
    return task


def check_hub_model(plan: Plan, trains: bool = True) -> None:
    """Of a model on the hub: its tokenizer is to be had and the prompts fit, before any weights are fetched.

    Args:
        plan: of the run.
        trains: whether the stages will be run.

    Raises:
        ConfigError: if the hub cannot be reached, or a row does not fit.
    """
    model = plan.config.model
    if model.path is None or Path(model.path).expanduser().is_dir():
        return  # looked at already
    try:
        folder = find_folder(model.path, model.revision, weights=False)
        tokenizer = load_tokenizer(str(folder), load_config(folder))
    except ValueError as error:
        raise as_config_error(error, "model.path") from None
    _check_rows(plan, tokenizer, trains)


def _check_rows(plan: Plan, tokenizer: Any, trains: bool) -> None:
    """Prompts and demonstrations are there and fit."""
    try:
        if not evaluation_rows(plan, tokenizer):
            split = plan.config.evaluation.split
            raise ConfigError(
                "evaluation.split", f"the {split} rows are none", "test, or task.val_rows above 0", "E305"
            )
        for stage in plan.stages if trains else ():
            plan.rows_of(stage, tokenizer)
    except ConfigError:
        raise
    except ValueError as error:
        raise as_config_error(error, "task") from None


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

    arguments = parts.module.keywords if isinstance(parts.module, partial) else {}
    # With an adapter that stays put, the reference is the adapter switched off; only one that moves is kept.
    moves = parts.lora is None or arguments.get("reference_sync_every") is not None
    return Stage(
        name=parts.name,
        lora=parts.lora,
        keeps_reference=moves
        and bool(getattr(arguments.get("loss"), "needs_reference", False) or arguments.get("kl_in_reward")),
        selects_best=parts.select == "best_val",
        make_module=make_module,
        make_data=make_data,
        make_trainer=partial(make_trainer, parts),
    )


def _module_extras(plan: Plan, parts: StageParts, policy: Policy, tokenizer: Any) -> dict[str, Any]:
    if isinstance(parts.data, Prompts):
        end = None if plan.config.quirks.reward_after_end else policy.eos_token_id
        return {"decode": partial(judged_text, plan.task, tokenizer, end)}
    rows: Sequence[EncodedRow] = ()
    if parts.validate_every is not None and isinstance(parts.data, Demonstrations):
        rows = parts.data.validation_rows(plan.task, tokenizer)
    return {"layout": parts.data.layout, "validation_rows": rows}


def decode(tokenizer: Any, eos_token_id: int, ids: torch.Tensor) -> str:
    """Text of a completion up to its end."""
    return decode_completion(tokenizer, ids.tolist(), eos_token_id)


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
    sampler = replace(plan.sampler, temperature=plan.config.evaluation.temperature, record_trace=False)
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
