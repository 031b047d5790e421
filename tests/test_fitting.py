"""Micro-batches that follow from the memory of a device; strategies that follow from what is trained."""

from functools import lru_cache, partial

import pytest
import torch

from d1lit.app.build import plan_run
from d1lit.app.components import build
from d1lit.app.composing import compose_jobs
from d1lit.app.micro_batches import FILL, device_memory, micro_batch_sizes, with_micro_batches
from d1lit.app.workloads import stage_work
from d1lit.errors import ConfigError
from d1lit.footprint import memory
from d1lit.strategies import FullySharded, Setting

OFFLINE = ("task=gsm8k", "task.train_data=builtin", "task.test_data=builtin", "task.demonstration_data=task")
SMALL = ("task.num_builtin.train=200", "recipe=grpo", "scale.grpo.micro_batch_size=null", "model=llada_8b")


@lru_cache(maxsize=8)
def plan_of(*words: str):
    (config,) = compose_jobs("train", [*OFFLINE, *SMALL, *words]).configs
    return plan_run(config)


@pytest.mark.parametrize("memory_gib", [20, 26, 77])
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_largest_micro_batch_that_fits_is_taken_and_the_update_stays_the_same(memory_gib, world_size):
    plan = plan_of(f"hardware.memory_gib={memory_gib}")
    sizes = micro_batch_sizes(plan, world_size)
    chosen = sizes["grpo"]
    fitted = with_micro_batches(plan, sizes)
    work = stage_work(fitted, fitted.stages[0], world_size)
    assert chosen * work.num_micro * world_size == 16, "prompts of an update"
    limit = FILL * device_memory(plan)
    larger = [n for n in (1, 2, 4, 8, 16) if n > chosen and 16 // world_size % n == 0]
    for size in larger[:1]:
        (bigger,) = with_micro_batches(plan, {"grpo": size}).stages
        assert memory(stage_work(plan, bigger, world_size)).peak > limit
    if chosen > 1:
        assert memory(work).peak <= limit
    found = {(20, 1): 1, (26, 1): 2, (77, 1): 16, (20, 4): 1, (26, 4): 2, (77, 4): 4}
    assert chosen == found[memory_gib, world_size]


def test_a_loss_that_depends_on_the_cut_wants_the_size_said():
    with pytest.raises(ConfigError, match=r"stages.grpo.micro_batch_size: null, but the loss .* Try: 1"):
        plan_of("paper_compat=true")


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ((), ["DDPStrategy", "DDPStrategy"]),
        (("scale.sft.lora=null", "scale.grpo.lora=null"), ["FullySharded", "FullySharded"]),
        (("strategy=fsdp",), ["FullySharded", "FullySharded"]),
        (("strategy=ddp", "scale.sft.lora=null"), ["DDPStrategy", "DDPStrategy"]),
    ],
)
def test_adapters_take_ddp_and_full_training_takes_fsdp(words, kinds):
    plan = plan_of("recipe=d1", "trainer.devices=2", *words)
    strategy = build(plan.config, "strategy")
    found = [
        strategy(Setting(2, torch.device("cpu"), s.lora is None and plan.config.model.path is not None))
        for s in plan.stages
    ]
    assert [type(s).__name__ for s in found] == kinds


def test_offload_and_single():
    plan = plan_of("strategy=fsdp_offload", "trainer.devices=2")
    strategy = build(plan.config, "strategy")
    assert isinstance(strategy, partial)
    found = strategy(Setting(2, torch.device("cpu"), False))
    assert isinstance(found, FullySharded) and found.offload
    with pytest.raises(ValueError, match="Try: strategy=ddp"):
        build(plan_of("strategy=single", "trainer.devices=2").config, "strategy")(
            Setting(2, torch.device("cpu"), False)
        )
