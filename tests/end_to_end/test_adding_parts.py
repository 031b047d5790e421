"""The snippets of docs/adding-parts.md: each composes, builds and does what its page says; a recipe trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from d1lit.app import cli
from d1lit.app.build import plan_run
from d1lit.app.components import build
from d1lit.app.composing import compose_jobs
from d1lit.draws import CounterDraws
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.losses import check_pair
from d1lit.models import build_policy
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import BlockSampler
from d1lit.sampling.parts import Cells, CommitRule
from d1lit.tasks import Source, Task
from d1lit.types import Advantage, Context, LogProbEstimator, PolicyLoss, RewardBatch, Rollout, Schedule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-parts.md"
SNIPPETS = re.findall(
    r"^```(?:python|yaml)\n# my_idea/(\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
YAMLS = sorted(name.removesuffix(".yaml") for name, _ in SNIPPETS if name.endswith(".yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    """The page's files in a folder of the user's."""
    folder = tmp_path_factory.mktemp("parts") / "my_idea"
    for name, body in SNIPPETS:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("D1LIT_CACHE", str(folder.parent / "cache"))
        yield folder


def composed(folder: Path, *words: str) -> DictConfig:
    (config,) = compose_jobs("train", [*words, f"hydra.searchpath=[file://{folder}]"]).configs
    return config


def rollouts() -> Rollout:
    """Two groups of two, the second and fourth completion ending early."""
    shape = (4, 6)
    nothing = torch.zeros(shape)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1, 3:] = mask[3, 5:] = False
    return Rollout(
        prompt_ids=torch.ones(4, 3, dtype=torch.int64),
        prompt_mask=torch.ones(4, 3, dtype=torch.bool),
        completion_ids=torch.arange(24).view(shape) % 7 + 2,
        completion_mask=mask,
        row_ids=torch.arange(4),
        group_size=2,
        commit_step=torch.zeros(shape, dtype=torch.int64),
        sampled_logprobs=nothing,
        confidence=nothing,
        entropy=nothing,
    )


def test_the_page_has_a_snippet_of_every_kind():
    groups = {name.split("/")[0] for name in YAMLS}
    assert groups == {"schedule", "estimator", "advantage", "loss", "reward", "sampler", "task", "model", "recipe"}
    assert len({name for name, _ in SNIPPETS}) == len(SNIPPETS)


def test_every_class_of_the_page_is_used_by_one_of_its_yamls():
    yamls = "\n".join(body for name, body in SNIPPETS if name.endswith(".yaml"))
    for name, body in SNIPPETS:
        for public in re.findall(r"^(?:class|def) (\w+)", body, re.MULTILINE) if name.endswith(".py") else ():
            assert f"{Path(name).stem}.{public}" in yamls


@pytest.mark.parametrize("choice", YAMLS)
def test_every_yaml_composes(choice, folder):
    group, name = choice.split("/")
    words = [] if group in ("task", "recipe") else ["task=sudoku"]
    assert composed(folder, f"{group}={name}", *words)[group] is not None


def test_schedule(folder):
    schedule = build(composed(folder, "schedule=smooth"), "schedule", Schedule)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.weight(t), -slope / schedule.mask_prob(t), rtol=1e-6, atol=1e-6)
    ends = torch.tensor([0.0, 1.0])
    assert schedule.alpha(ends).tolist() == [1, 0]


def test_times_and_masks(folder):
    module = build(composed(folder, "recipe=sft_spans", "task=sudoku"), "stages.sft.module").keywords
    draws, rows = CounterDraws(0), torch.arange(4000)
    t = module["times"](draws, rows, rows, len(rows))
    assert 1e-3 <= float(t.min()) < float(t.max()) <= 1
    assert abs(float(t.mean()) - 1 / 3) < 0.02
    allowed = torch.ones(4000, 12, dtype=torch.bool)
    allowed[:, :2] = False
    where = draws, rows, torch.full((4000,), 0.3), allowed
    hidden = module["mask"](*where)
    assert not hidden[:, :2].any()
    assert (hidden[:, 2] == hidden[:, 3]).all()
    assert (hidden[:, 4:8] == hidden[:, 4:5]).all()
    assert abs(float(hidden[:, 2:].float().mean()) - 0.3) < 0.02
    assert torch.equal(module["mask"].weight(*where), torch.ones(4000, 12))


def test_estimator(folder):
    estimator = build(composed(folder, "estimator=checkerboard"), "estimator", LogProbEstimator)
    rollout = rollouts()
    context = Context(rollout, torch.zeros(4), 0, 1, 1, CounterDraws(0))
    corruption = estimator.corrupt(context)
    assert torch.equal(corruption.weight.sum(1), rollout.completion_mask.float()), "every valid token once"
    for row in range(4):
        for view in range(2):
            seen = corruption.noised_ids[corruption.view_of[row, view], 3:]
            hidden = torch.arange(6) % 2 == view
            assert torch.equal(seen, torch.where(hidden, 1, rollout.completion_ids[row]))
    logprobs = -torch.rand(4, 2, 6)
    found = estimator.combine(logprobs, corruption, context)
    expected = torch.where(torch.arange(6) % 2 == 0, logprobs[:, 0], logprobs[:, 1])
    assert torch.equal(found.value[rollout.completion_mask], expected[rollout.completion_mask])


def test_advantage(folder):
    advantage = build(composed(folder, "advantage=win_rate"), "advantage", Advantage)
    values = torch.tensor([[5.0], [0.0], [0.0], [1.0], [3.0], [2.0]])
    valid = torch.ones(6, 1, dtype=torch.bool)
    valid[4] = False
    found = advantage(RewardBatch(values, valid, torch.ones(1)), 3)
    torch.testing.assert_close(found, torch.tensor([2.0, -1.0, -1.0, -1.0, 0.0, 1.0]) / 3)


def test_loss(folder):
    config = composed(folder, "loss=positive")
    loss = build(config, "loss", PolicyLoss)
    check_pair(OneStepEstimator(0.0, 1, True), loss)
    plan_run(config)


def test_reward(folder):
    config = composed(folder, "task=sudoku", "reward=sudoku_brief")
    reward = build(config, "reward", RewardParts).judged_by(build(config, "task", Task).counted)
    example = {"puzzle": "1020300000000000", "solution": "1" * 16}
    verdicts = reward.grade(["", "x" * 65], [example] * 2)
    assert set(verdicts) == {"solved", "cell_share", "givens_kept", "brief"}
    assert [verdict.value for verdict in verdicts["brief"]] == [1.0, 0.0]


def test_sampler(folder):
    sampler = build(composed(folder, "task=sudoku", "sampler=at_most"), "sampler", BlockSampler)
    assert isinstance(sampler.commit, CommitRule)
    scores = torch.tensor([[0.95, 0.99, 0.91, 0.97, 0.96, 0.2], [0.1, 0.3, 0.2, 0.1, 0.1, -torch.inf]])
    places = torch.arange(6).expand(2, -1)
    cells = Cells(torch.arange(2), places, scores > -1, 6, 0, 6, None, CounterDraws(0))
    chosen = sampler.commit.select(scores, cells)
    assert chosen.tolist() == [[True, True, False, True, True, False], [False, True, False, False, False, False]]


def test_task(folder):
    task = build(composed(folder, "task=sums"), "task", Task)
    assert isinstance(task.source, Source)
    questions = [{row["question"] for row in task.rows(split)} for split in ("train", "val", "test")]
    assert [len(found) for found in questions] == [2048 - 128, 128, 256]
    assert not questions[0] & questions[1] | questions[2] & (questions[0] | questions[1])
    row = task.rows("test")[0]
    (grade,) = task.judges.grade([task.source.worked(row, True)], [row])
    assert grade.strict.value == 1.0


def test_models(folder):
    config = composed(folder, "model=wider", "task=sudoku")
    policy, _ = build_policy(None, dict(config.model.tiny), "float32", False, None, 0)
    assert (policy.network.config.hidden_size, policy.network.config.num_hidden_layers) == (128, 4)
    assert composed(folder, "model=finetuned", "task=sudoku").scale.name == "paper"


@pytest.mark.slow
def test_the_recipe_trains_and_is_evaluated_later(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = f"hydra.searchpath=[file://{folder}]"
    words = [
        "recipe=contest",
        "task=sums",
        "debug=fast",
        "stages.grpo.max_updates=2",
        "evaluation.rows=4",
        "report=false",
    ]
    assert cli.train([*words, path, "run_dir=run"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [entry["stage"] for entry in results["evaluations"]] == ["base", "sft", "grpo"]
    assert results["task"] == "sums"
    capsys.readouterr()
    assert cli.evaluate(["run=run", "output=again"]) == 2, "components from a folder that was not named again"
    assert cli.evaluate(["run=run", path, "output=again"]) == 0
