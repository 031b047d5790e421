"""From a composed configuration to a plan: everything cheap is built, and so checked, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from d1lit.app.components import (
    build,
    check_advantage,
    check_module,
    check_optimizer,
    check_targets,
    check_trainer,
    check_watchers,
)
from d1lit.app.config_checks import check_values
from d1lit.app.config_errors import as_config_error, under
from d1lit.app.plan import Plan, StageParts, evaluation_rows, evaluation_sampler, worked_ids
from d1lit.data import BatchPlan, EncodedRow
from d1lit.errors import ConfigError
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses.clipped import ClippedPolicyLoss
from d1lit.losses.terms import micro_batch_token_mean
from d1lit.models import LoraSettings, load_tokenizer
from d1lit.models.loading import find_folder, load_config
from d1lit.models.quantizing import check_bitsandbytes
from d1lit.modules import Prompts
from d1lit.modules.inpainting import Inpainting
from d1lit.processes import place
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import BlockSampler
from d1lit.strategies import fsdp
from d1lit.tasks import AnyTask, MixedTask, Split, Task
from d1lit.types import LogProbEstimator, MaskRule, PolicyLoss, RowView, Sampler, Schedule, TimeSampler

KINDS: dict[str, type] = {
    "sampler": Sampler,
    "reward": RewardParts,
    "estimator": LogProbEstimator,
    "loss": PolicyLoss,
    "schedule": Schedule,
    "times": TimeSampler,
    "validation_times": TimeSampler,
    "mask": MaskRule,
    "view": RowView,
}
"""What the arguments of a stage's module of these names have to be."""


def plan_run(config: DictConfig, trains: bool = True, checked: set[str] | None = None) -> Plan:
    """Build every part of a run that needs no network.

    Args:
        config: composed and resolved.
        trains: whether the stages will be run; without them, what they would train on is not asked for.
        checked: rows that earlier jobs of the same sweep have asked for, which are not looked at again; those of this
            one are added.

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
    stages = [_stage(config, f"stages.{name}", name, world_size, task) for name in config.recipe.stages]
    for stage in stages:
        _check_stage(config, f"stages.{stage.name}", stage, world_size, trains)
        if trains:
            _check_pattern(stage, sampler)
            _check_selection(stage, task)
    base = None
    if config.model.path is None:  # the first process makes it for all
        base = _stage(config, "model.base", "base", 1, task)
        _check_stage(config, "model.base", base, world_size=1)
    plan = Plan(config, task, sampler, stages, base)
    for stage in stages:
        _check_quantized(config, stage)
    checked = set() if checked is None else checked
    unseen = {key: stage for key, stage in _rows_asked(plan, trains).items() if key not in checked}
    tokenizer = plan.tokenizer_here() if unseen else None
    if tokenizer is not None:  # else the start of the run finds out
        _check_rows(plan, tokenizer, unseen.values())
    checked.update(unseen)
    for length in config.evaluation.lengths or ():
        evaluation_sampler(plan, length)
    return plan


def _check_pattern(stage: StageParts, sampler: BlockSampler) -> None:
    """What learns to attend in a pattern decodes in it."""
    view = stage.module.keywords.get("view") if isinstance(stage.module, partial) else None
    if view is None or view.pattern in (None, sampler.pattern):
        return
    cure = {"blocks": "sampler=block_diffusion", "order": "sampler=any_order"}[view.pattern.kind]
    there = sampler.pattern or "to the whole canvas"
    cause = f"{type(view).__name__} teaches to attend {view.pattern}, and the sampler attends {there}"
    raise ConfigError("view", cause, f"{cure}, or view=whole", "E207")


def _check_selection(stage: StageParts, task: AnyTask) -> None:
    """The best weights on validation rows are found by looking at some."""
    key = f"stages.{stage.name}"
    cure = f"{key}.select=last"
    if stage.select == "best_val" and stage.validate_every is None:
        cause = f"best_val, but {key}.validate_every is null"
        raise ConfigError(f"{key}.select", cause, f"{cure}, or a number of steps there", "E207")
    if stage.select == "best_val" and not task.val_rows:
        raise ConfigError(f"{key}.select", "best_val, but task.val_rows is 0", f"{cure}, or validation rows", "E207")


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


def _stage(config: DictConfig, key: str, name: str, world_size: int, task: AnyTask) -> StageParts:
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
        module=_judged(build(config, f"{key}.module"), task),
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


def _judged(module: Any, task: AnyTask) -> Any:
    """A stage's module whose reward, where it has one, asks the task's own grader."""
    reward = module.keywords.get("reward") if isinstance(module, partial) else None
    if not isinstance(reward, RewardParts):
        return module
    try:
        judged = reward.judged_by(task.counted)
    except ValueError as error:
        raise as_config_error(error, "reward") from None
    return partial(module.func, *module.args, **{**module.keywords, "reward": judged})


def _check_stage(config: DictConfig, key: str, stage: StageParts, world_size: int, trains: bool = True) -> None:
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
    length = aggregate.keywords.get("length") if isinstance(aggregate, partial) else None
    if length is not None and length < 1:
        raise ConfigError("loss.aggregate.length", f"{length} is below 1", "null, the length of the canvas", "E207")
    if "advantage" in arguments:
        check_advantage("advantage", arguments["advantage"])
    check_optimizer(key, stage.optimizer, stage.lr_schedule, stage.max_updates)
    try:
        BatchPlan(stage.batch_size, stage.micro_batch_size, world_size)
        check = getattr(stage.module.func, "check", None) if isinstance(stage.module, partial) else None
        if check is not None and trains:  # an evaluation may decode as no stage could train
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
    _check_rows(plan, tokenizer, _rows_asked(plan, trains).values())


def _rows_asked(plan: Plan, trains: bool) -> dict[str, StageParts | None]:
    """What a run reads rows for, None being the evaluation, each under all that decides which rows, as text."""
    config = plan.config
    where = (OmegaConf.to_yaml(config.task, resolve=True), config.model.path, config.model.revision)
    asked: dict[str, StageParts | None] = {repr((where, config.evaluation.split, config.evaluation.rows)): None}
    for stage in plan.stages if trains else ():
        node = OmegaConf.to_yaml(config.stages[stage.name].data, resolve=True)
        seed = None if isinstance(stage.data, Prompts) else plan.seed
        asked[repr((where, node, seed, _inpainting_of(stage)))] = stage
    return asked


def _check_rows(plan: Plan, tokenizer: Any, asked: Iterable[StageParts | None]) -> None:
    """Prompts and demonstrations are there and fit, and with inpainting there is something to give."""
    try:
        for stage in asked:
            if stage is not None:
                _check_answers(plan, stage, plan.rows_of(stage, tokenizer).rows, tokenizer)
            elif not evaluation_rows(plan, tokenizer):
                cause = f"the {plan.config.evaluation.split} rows are none"
                raise ConfigError("evaluation.split", cause, "test, or task.val_rows above 0", "E305")
    except ConfigError:
        raise
    except ValueError as error:
        raise as_config_error(error, "task") from None


def _inpainting_of(stage: StageParts) -> Inpainting | None:
    rule = stage.module.keywords.get("inpainting") if isinstance(stage.module, partial) else None
    return rule if isinstance(rule, Inpainting) else None


def _check_answers(plan: Plan, stage: StageParts, rows: Iterable[EncodedRow], tokenizer: Any) -> None:
    """Inpainting gives chunks of worked answers: where no row has one to cut, it would never help."""
    rule = _inpainting_of(stage)
    if rule is None or any(len(worked_ids(plan.task, tokenizer, row.example)) >= rule.least_chunk for row in rows):
        return
    raise ConfigError(
        f"stages.{stage.name}.module.inpainting",
        f"no training row of task={plan.task.name} has a worked answer of {rule.least_chunk} or more tokens to give of",
        f"training data with worked solutions (task.train_data), or stages.{stage.name}.module.inpainting=null",
        "E207",
    )
