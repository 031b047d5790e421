"""The jobs of a sweep share what their choices decide: what comes of it is what Hydra composes for each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from d1lit.app.build import plan_run
from d1lit.app.composing import CONF, compose_jobs
from d1lit.errors import ConfigError

OF_A_KIND = ["recipe=grpo", "task=sudoku"]


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        ([*OF_A_KIND, "seed=1,2", "loss.beta=0.5", "evaluation.lengths=[8,16]"], 2),
        (["loss.beta=0.5,${seed}", *OF_A_KIND, "seed=1", "seed=2"], 2),
        ([*OF_A_KIND, "stages.grpo.module.group_size=3", "paper_compat=false,true"], 2),
        (["stages.grpo.max_updates=7", "~stages.grpo.max_updates", "+stages.grpo.max_updates=8", *OF_A_KIND], 1),
        pytest.param(
            [*OF_A_KIND, "stages.grpo.module={group_size: 5}", "stages.grpo.module.group_size=3,4"],
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_job_is_what_hydra_composes(words: list[str], jobs: int) -> None:
    found = compose_jobs("train", ["-m", *words])
    assert len(found.configs) == jobs
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="d1lit"):
        for config, job in zip(found.configs, found.overrides, strict=True):
            alone = compose("train", list(job))
            assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(alone)
            assert OmegaConf.is_struct(config)


def test_a_job_does_not_see_the_values_of_another() -> None:
    first, second = compose_jobs("train", ["-m", *OF_A_KIND, "seed=1,2"]).configs
    first.loss.beta = 7.0
    assert (first.seed, second.seed) == (1, 2) and second.loss.beta != 7.0


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    file = tmp_path / "loss" / "mine.yaml"
    words = [*OF_A_KIND, "loss=mine", "loss.beta=0.5", f"hydra.searchpath=[file://{tmp_path}]"]
    for extra in (1, 2):
        file.write_text(f"_target_: mine.Loss\nbeta: 0.0\nextra: {extra}\n")
        assert compose_jobs("train", words).configs[0].loss.extra == extra


def test_rows_are_looked_at_once_and_other_rows_still() -> None:
    """The second job asks for the rows of the first; the third for others, which are refused as they would be alone."""
    small = ["task.num_builtin.train=8", "task.num_builtin.test=4", "task.val_rows=0"]
    words = [*OF_A_KIND, *small, "seed=1,2", "task.max_prompt_length=200,1"]
    configs = compose_jobs("train", ["-m", *words]).configs
    checked: set[str] = set()
    plan_run(configs[0], checked=checked)
    seen = set(checked)
    plan_run(configs[2], checked=checked)  # the other seed
    assert checked == seen and len(seen) == 2
    with pytest.raises(ConfigError, match=r"^task\.max_prompt_length: "):
        plan_run(configs[1], checked=checked)


def test_demonstrations_hang_on_the_seed() -> None:
    words = ["recipe=sft", "task=sudoku", "task.num_builtin.train=8", "task.num_builtin.test=4", "task.val_rows=0"]
    checked: set[str] = set()
    for config in compose_jobs("train", ["-m", *words, "seed=1,2"]).configs:
        plan_run(config, checked=checked)
    assert len(checked) == 3
