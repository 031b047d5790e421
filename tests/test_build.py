"""What is looked at before any weights are loaded, and what is left alone because nobody will need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d1lit.app import build, running, tiny_base
from d1lit.app.build import check_hub_model, plan_run
from d1lit.app.composing import compose_jobs
from d1lit.errors import ConfigError
from d1lit.models import build_tiny_tokenizer, export_model
from d1lit.models.presets import fresh_network, tiny_config


def composed(program: str, *words: str) -> Any:
    (config,) = compose_jobs(program, ["task=gsm8k", "debug=fast", "task.val_rows=0", *words]).configs
    return config


def rows(file: Path, *questions: str) -> str:
    lines = [{"question": question, "answer": "1+1=<<1+1=2>>2\n#### 2"} for question in questions]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.mark.slow
def test_what_is_only_evaluated_needs_no_training_data(tmp_path, monkeypatch):
    """Neither train rows nor demonstrations, which for the 8B models stand on the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    test = f"task.test_data={rows(tmp_path / 'test.jsonl', 'One and one?')}"
    nowhere = ["task.train_data=nobody/nothing", "task.demonstration_data=nobody/nothing"]
    plan = plan_run(composed("evaluate", test, *nowhere), trains=False)
    assert [row["question"] for row in plan.task.rows("test")] == ["One and one?"]
    with pytest.raises(ConfigError, match=r"^task\.train_data: cannot reach the hub"):
        plan_run(composed("train", test, *nowhere))


def test_rows_that_are_too_long_are_counted_and_said(tmp_path, monkeypatch):
    train = rows(tmp_path / "train.jsonl", "Short?", "Also short?", "Long " * 100)
    plan = plan_run(composed("train", f"task.train_data={train}"))
    tokenizer = build_tiny_tokenizer()
    assert {parts.name: plan.rows_of(parts, tokenizer).dropped for parts in plan.stages} == {"sft": 1, "grpo": 1}
    said: list[str] = []
    monkeypatch.setattr(running, "say", said.append)
    running.tell_dropped(plan, tokenizer)
    assert len(said) == 2
    assert all("1 of 3 rows left out" in line and "task.max_prompt_length" in line for line in said)


@pytest.mark.slow
def test_the_kept_base_hangs_on_the_rows_it_keeps_away_from(tmp_path):
    """The same file name with other test rows makes another base: the corpus must not hold them."""
    found = []
    for question in ("One and one?", "One and one?", "Two and none?"):
        build._task.cache_clear()  # a process reads a task's files once
        plan = plan_run(composed("train", f"task.test_data={rows(tmp_path / 'test.jsonl', question)}"))
        found.append(tiny_base.base_hash(plan))
    assert found[0] == found[1] != found[2]


def test_a_hub_model_is_asked_for_its_tokenizer_before_its_weights(tmp_path, monkeypatch):
    """So that a prompt that does not fit is refused at once, and not after sixteen gigabytes."""
    tokenizer = build_tiny_tokenizer()
    ids = [int(tokenizer.convert_tokens_to_ids(str(t))) for t in (tokenizer.mask_token, tokenizer.eos_token)]
    shape = tiny_config(len(tokenizer), ids[0], ids[1], ids[1], 16, 1, 2, 24, 1e4, 64, init_std=0.1)
    export_model(fresh_network(shape, 0), tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    for weights in (tmp_path / "hub").glob("*.safetensors"):
        weights.unlink()
    asked: list[Any] = []

    def snapshot(path: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((path, revision, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr("d1lit.models.loading.snapshot_download", snapshot)
    words = ["model.path=somebody/model", "model.revision=abc"]
    check_hub_model(plan_run(composed("train", *words)))
    ((path, revision, patterns),) = asked
    assert (path, revision) == ("somebody/model", "abc")
    assert "*.json" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)
    build._task.cache_clear()
    plan = plan_run(composed("train", *words, "task.max_prompt_length=3", "task.max_test_prompt_length=3"))
    with pytest.raises(ConfigError, match=r"^task\.max_test_prompt_length: .* more than 3\. Try: "):
        check_hub_model(plan)


@pytest.mark.slow
def test_demonstrations_to_validate_on_are_not_trained_on(tmp_path):
    file = tmp_path / "traces.jsonl"
    pairs = [{"question": f"What is {n}+1?", "completion": f"<answer>{n + 1}</answer>"} for n in range(300)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = plan_run(composed("train", f"task.demonstration_data={file}")).task
    train, held = task.demonstrations(None, 0), task.validation_demonstrations()
    assert (len(train), len(held)) == (297, 3)
    assert {row["question"] for row in (*train, *held)} == {pair["question"] for pair in pairs}

    own = plan_run(composed("train", "task.val_rows=5")).task
    assert [row["question"] for row in own.validation_demonstrations()] == [row["question"] for row in own.rows("val")]
    assert all(row["completion"].endswith("</answer>") for row in own.validation_demonstrations())


LONG = "Let x be a real number. " * 100 + "Why?"
"""About as long as the longest question of s1K, which has 2,423 characters."""


@pytest.mark.parametrize("task", ["gsm8k", "math500", "countdown", "sudoku", "code"])
def test_demonstrations_of_the_8b_preset_have_their_own_limit(task, tmp_path):
    """s1K's questions are longer than the task's prompts; d1 cut prompt and completion together on the right."""
    demonstrations = tmp_path / "s1k.jsonl"
    texts = [("Short?", "So."), (LONG, "So."), ("Short too?", "So. " * 1200), (LONG * 2, "So.")]
    lines = [{"question": q, "thinking_trajectories": [thinking], "attempt": "1"} for q, thinking in texts]
    demonstrations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"task={task}", "model=llada_8b", "task.num_builtin.train=200", "task.overlong=cut_left"]
    data = [f"task.{name}=builtin" for name in ("train_data", "test_data")]
    (config,) = compose_jobs("train", [*words, *data, f"task.demonstration_data={demonstrations}"]).configs
    plan, tokenizer = plan_run(config), build_tiny_tokenizer()
    found = plan.rows_of(plan.stages[0], tokenizer)
    assert (found.asked, found.dropped, found.cut) == (4, 1, 1), (
        "the prompt of over 4096 tokens leaves nothing to learn"
    )
    (long,) = (row for row in found.rows if row.example["question"] == LONG)
    text = tokenizer.decode(long.prompt_ids)
    assert LONG in text
    assert text.index("Let x") == tokenizer.decode(found.rows[0].prompt_ids).index("Short"), "no head is cut"


def test_an_evaluation_by_the_users_own_parts_is_not_shared():
    (plain,) = compose_jobs("train", ["task=sudoku", "recipe=sft"]).configs
    (own,) = compose_jobs("train", ["task=sudoku", "recipe=sft", "sampler.commit._target_=mine.Commit"]).configs
    assert not tiny_base.has_own_parts(plain)
    assert tiny_base.has_own_parts(own)
