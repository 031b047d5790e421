"""Every YAML of every group composes, builds, and is what its group promises."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf

from d1lit.app.build import plan_run
from d1lit.app.components import build, check_trainer, check_watchers
from d1lit.app.composing import CONF, compose_jobs
from d1lit.app.config_checks import check_values
from d1lit.errors import ConfigError
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import BlockSampler
from d1lit.strategies import Setting
from d1lit.tasks import AnyTask
from d1lit.types import Advantage, LogProbEstimator, PolicyLoss, RewardBatch, RowView, Sampler, Schedule, Verdict

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
FILES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))


def config_with(*overrides: str):
    (config,) = compose_jobs("train", overrides).configs
    return config


def choices(group: str) -> list[str]:
    return [name for found, name in FILES if found == group]


@pytest.mark.parametrize("name", choices("schedule"))
def test_schedule(name):
    schedule = build(config_with(f"schedule={name}"), "schedule")
    assert isinstance(schedule, Schedule)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    assert ((schedule.alpha(t) + schedule.mask_prob(t)) - 1).abs().max() < 1e-6
    assert (schedule.weight(t) >= 0).all()
    assert (schedule.mask_prob(t).diff() >= 0).all()


@pytest.mark.parametrize("name", choices("view"))
def test_view(name):
    sampler = {"whole": "low_confidence", "blocks": "block_diffusion", "order": "any_order"}[name]
    schedule = ("schedule=constant", "schedule.ratio=1.0") if name == "order" else ()
    config = config_with("recipe=sft", f"view={name}", f"sampler={sampler}", *schedule)
    view = build(config, "view")
    assert isinstance(view, RowView)
    assert view.length(3, 4) in (7, 11)
    assert plan_run(config).sampler.pattern == view.pattern
    if view.pattern is not None:
        with pytest.raises(ConfigError, match=r"^view: .*Try: sampler="):
            plan_run(config_with("recipe=sft", f"view={name}", *schedule))


@pytest.mark.parametrize("name", choices("estimator"))
def test_estimator(name):
    estimator = build(config_with(f"estimator={name}"), "estimator")
    assert isinstance(estimator, LogProbEstimator)
    assert estimator.traits.unit in ("token", "sequence", "view", "step")


@pytest.mark.parametrize("name", choices("loss"))
def test_loss(name):
    loss = build(config_with(f"loss={name}"), "loss")
    assert isinstance(loss, PolicyLoss)
    assert loss.traits.units <= {"token", "sequence", "view", "step"}
    assert loss.traits.units


@pytest.mark.parametrize("name", choices("advantage"))
def test_advantage(name):
    advantage = build(config_with(f"advantage={name}"), "advantage")
    assert isinstance(advantage, Advantage)
    size = getattr(getattr(advantage, "tree", None), "leaves", 3)  # a tree's group is its leaves
    given = torch.tensor([[1.0], [0.0], [0.0], [3.0], [2.0], [2.0]]).repeat(size, 1)[: 2 * size]
    rewards = RewardBatch(given, torch.ones(2 * size, 1).bool(), torch.ones(1))
    values = advantage(rewards, size)
    assert values.shape[0] == 2 * size
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", choices("reward"))
def test_reward(name):
    task = name.removeprefix("d1_")
    config = config_with(f"task={task}", f"reward={name}")
    own = build(config, "task", AnyTask)
    reward = build(config, "reward", RewardParts).judged_by(own.counted)
    example = own.rows("train")[0]
    verdicts = reward.grade(["", "<answer>0</answer>"], [example, example])
    assert list(verdicts) == list(reward.names)
    for part in verdicts.values():
        assert [type(verdict) for verdict in part] == [Verdict, Verdict]
        assert all(verdict.outcome in ("ok", "unparsed", "skipped") for verdict in part)


@pytest.mark.parametrize("name", choices("sampler"))
def test_sampler(name):
    sampler = build(config_with(f"sampler={name}", "task=sudoku"), "sampler", BlockSampler)
    assert isinstance(sampler, Sampler)


@pytest.mark.parametrize("name", choices("task"))
def test_task(name):
    task = build(config_with(f"task={name}"), "task", AnyTask)
    assert {"id", "question", "answer"} <= set(task.rows("train")[0])
    assert task.rows("test")


def _later(model: str) -> pytest.MarkDecorator:
    return pytest.mark.slow if model == "llada_8b" else pytest.mark.nightly


def recipes_and_models():
    """All combinations; quick are the tiny model with every second recipe, and d1's recipe with every model."""
    for number, recipe in enumerate(choices("recipe")):
        for model in choices("model"):
            marks = pytest.mark.slow if model == "tiny" and number % 2 else ()
            marks = marks if model == "tiny" or recipe == "d1" else _later(model)
            yield pytest.param(recipe, model, marks=marks, id=f"{recipe}-{model}")


@pytest.mark.parametrize(("name", "model"), recipes_and_models())
def test_recipe_builds_for_every_model(name, model):
    """Everything but the network: hub ids of data are replaced by a few built-in rows."""
    data = ("train_data=builtin", "test_data=builtin", "num_builtin.train=96", "num_builtin.test=16", "val_rows=16")
    config = config_with(f"recipe={name}", f"model={model}", "task=gsm8k", *(f"task.{key}" for key in data))
    plan = plan_run(config)
    assert [stage.name for stage in plan.stages] == list(config.recipe.stages)
    assert (plan.base is not None) == (model == "tiny")


@pytest.mark.parametrize("name", [n for n in choices("logger") if n != "wandb"])
def test_logger(name, tmp_path: Path):
    config = config_with(f"logger={name}")
    if config.logger.get("_target_") is None:
        assert name == "none"
        return
    assert build(config, "logger")(save_dir=tmp_path, name="logs", version="sft").name == "logs"


@pytest.mark.parametrize(
    ("optimizer", "lr_schedule"), zip(("adamw", "muon", "adamw"), choices("lr_schedule"), strict=True)
)
def test_optimizer_and_lr_schedule(optimizer, lr_schedule):
    """Each is made for a stage's parameters and takes a step; the learning rate never falls below 0."""
    assert choices("optimizer") == ["adamw", "muon"]
    stage = "stages.grpo"
    config = config_with(f"optimizer@{stage}.optimizer={optimizer}", f"lr_schedule@{stage}.lr_schedule={lr_schedule}")
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (4,)))
    made = build(config, f"{stage}.optimizer")([("model.layers.0.matrix", matrix), ("vector", vector)])
    schedule = build(config, f"{stage}.lr_schedule")(made, 5)
    assert isinstance(made, torch.optim.Optimizer)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    for _ in range(5):
        ((matrix**2).sum() + (vector**2).sum()).backward()
        made.step()
        made.zero_grad()
        assert all(rate >= 0 for rate in schedule.get_last_lr())
        schedule.step()
    assert float(matrix.detach().mean()) < 1.0 > float(vector.detach().mean())


@pytest.mark.parametrize("name", choices("strategy"))
def test_strategy(name):
    make = build(config_with(f"strategy={name}"), "strategy")
    alone = make(Setting(1, torch.device("cpu"), False))
    assert (
        isinstance(alone, Strategy) if name == "fsdp_offload" else alone == "auto"
    )  # one process has shards to offload
    if name != "single":
        assert isinstance(make(Setting(2, torch.device("cpu"), True)), Strategy)


@pytest.mark.parametrize("name", choices("hardware"))
def test_hardware(name):
    hardware = config_with(f"hardware={name}").hardware
    assert 0 < hardware.utilisation <= 1
    assert all(hardware[key] is None or hardware[key] > 0 for key in ("memory_gib", "peak_tflops"))


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g, n in FILES if g in ("callbacks", "debug", "evaluation", "trainer")]
)
def test_choice_of_a_whole_run(group, name):
    """It composes, its values are within their ranges, and Trainer and callbacks take what it says."""
    config = config_with(f"{group}={name}", "task=sudoku")
    check_values(config)
    check_trainer(config)
    check_watchers(config, Path("checked"))


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, n in FILES if g in ("data", "scale", "stage")])
def test_part_of_other_choices_is_used(group, name):
    """Nobody names these on the command line: stages, recipes and models are made of them, and built above."""
    entry = re.compile(rf"/{group}(@[\w.]+)?: {name}\b")
    assert [file for file in CONF.glob("*/*.yaml") if entry.search(file.read_text())]


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: str(value))
def test_yaml_is_one_call_or_plain_values_with_a_comment(group, name):
    text = (CONF / group / f"{name}.yaml").read_text()
    assert text.startswith("#"), "the first line says what it is and where it comes from"
    assert OmegaConf.create(text) is not None
    assert name == name.lower().replace("-", "_"), "file names are snake_case"
