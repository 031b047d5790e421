"""What a finished run hands on: a card that says what is so, weights that load elsewhere, answers in a terminal."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.text import Text

from d1lit.app import commands, consolidating, export
from d1lit.app.chatting import answer, chat
from d1lit.app.cli import main
from d1lit.app.export import model_card, push, write_card
from d1lit.app.open_run import open_run
from d1lit.errors import ConfigError
from d1lit.report.runs import read_run
from tests.real_runs import add_evaluation, copy_of, known_run, probed, real_run

PUZZLE = "0300210000303214"
LOADS = """
import sys
import torch
import d1lit.models
from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([tokenizer("1 + 1").input_ids])
with torch.no_grad():
    out = model(ids)
total = sum(p.double().sum().item() for p in model.parameters())
print(type(model).__name__, len(tokenizer), tokenizer.mask_token, total)
"""


def loaded(folder: Path) -> list[str]:
    """What a fresh process reads from a model folder."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_the_model_loads_in_a_fresh_process_and_so_does_its_export(tmp_path):
    run = open_run(real_run())
    expected = sum(p.double().sum().item() for p in run.policy.network.parameters())
    name, size, mask, total = loaded(real_run() / "model")
    assert (name, int(size), mask) == ("MaskedDiffusionLM", len(run.tokenizer), "<|mask|>")
    assert float(total) == pytest.approx(expected, rel=1e-12)
    assert commands.export([str(real_run()), str(tmp_path / "whole")]) == 0
    assert loaded(tmp_path / "whole") == [name, size, mask, total]
    assert commands.export([str(real_run()), str(tmp_path / "whole")]) == 2, "nothing is overwritten"


def test_the_card_of_a_real_run_says_what_the_results_say():
    run = read_run(real_run())
    card = (real_run() / "model" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "d1lit"
    headings = re.findall(r"^## (.*)$", body, re.MULTILINE)
    assert headings == ["Loading", "Data", "Results", "How it was made", "Limits", "Licence"]
    for entry in run.evaluations:
        low, high = entry["interval"]
        line = next(line for line in body.splitlines() if line.startswith(f"| {entry['stage']} |"))
        assert f"| {100 * entry['accuracy']:.1f} | {100 * low:.1f} to {100 * high:.1f} |" in line
    assert "task=sudoku" in body
    assert "run_dir=" not in body, "no path of this machine"


def test_a_card_keeps_synthetic_names_and_admits_a_beaten_model(tmp_path):
    folder = known_run(tmp_path / "a", [True, False, False])
    results = json.loads((folder / "results.json").read_text())
    results["task"] = "gsm8k-synthetic"
    results["baselines"] = {"most_common_answer": {"n": 3, "accuracy": 2 / 3, "interval": [0.2, 0.9], "extra": {}}}
    (folder / "results.json").write_text(json.dumps(results))
    card = model_card(read_run(folder))
    assert "# tiny, d1 on gsm8k-synthetic" in card
    assert "stand in for the real data set" in card
    assert "does not beat what needs no model at all: most_common_answer" in card
    assert "| no model: most_common_answer | 3 | 66.7 |" in card


def test_a_card_does_not_give_away_folders_or_secrets(tmp_path):
    folder = known_run(
        tmp_path / "a", [True], settings={"model": {"name": "llada_8b", "path": "/home/me/secret/llada"}}
    )
    card = model_card(read_run(folder))
    assert "/home/me" not in card
    assert "That of the model it was trained from (llada_8b)" in card


def test_nothing_is_sent_without_being_told_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    run = copy_of(real_run(), tmp_path / "run")
    said = push(run, "me/model", yes=False, private=True)
    assert "nothing was sent" in said
    assert "model.safetensors" in said
    with pytest.raises(ConfigError, match=r"the hub refused.*Try: hf auth login"):
        push(run, "me/model", yes=True, private=True)
    with pytest.raises(ConfigError, match="has no model folder"):
        push(known_run(tmp_path / "bare", [True]), "me/model", yes=False, private=True)


def adapter_run(folder: Path, stages: list[str]) -> Path:
    """A finished run of LLaDA with adapters, as far as cards and uploads look at one."""
    known_run(folder, [True])
    config = {"recipe": {"stages": stages}, "model": {"name": "llada_8b", "path": "GSAI-ML/LLaDA-8B-Instruct"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "model").mkdir()
    (folder / "model" / "adapter_config.json").write_text("{}")
    return folder


def test_an_adapter_of_the_base_says_so_and_may_be_sent(tmp_path):
    run = adapter_run(tmp_path / "run", ["sft"])
    assert "nothing was sent" in push(run, "me/model", yes=False, private=True)
    card = (run / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("GSAI-ML/LLaDA-8B-Instruct", "adapter")
    assert "This is a LoRA adapter for `GSAI-ML/LLaDA-8B-Instruct`" in card


def test_an_adapter_of_a_merged_model_is_not_passed_off_as_one_of_the_base(tmp_path):
    run = adapter_run(tmp_path / "run", ["sft", "grpo"])
    with pytest.raises(ConfigError, match=r"the stages before.*Try: d1lit export"):
        push(run, "me/model", yes=False, private=True)
    card = model_card(read_run(run))
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "not for\nGSAI-ML/LLaDA-8B-Instruct" in card
    whole = yaml.safe_load(model_card(read_run(run), merged=True).split("---")[1])
    assert (whole["base_model"], whole["base_model_relation"]) == ("GSAI-ML/LLaDA-8B-Instruct", "finetune")
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (exported / name).write_text("")
    assert "would upload README.md, config.json, model.safetensors" in push(exported, "me/m", yes=False, private=True)


def test_an_export_that_was_cut_short_is_no_model_and_can_be_asked_for_again(tmp_path, monkeypatch):
    def cut_short(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", cut_short)
    with pytest.raises(KeyboardInterrupt):
        export.export(real_run(), tmp_path / "whole")
    monkeypatch.undo()
    export.export(real_run(), tmp_path / "whole")
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names and ".staging" not in names


def test_a_consolidation_that_was_cut_short_is_no_model_either(tmp_path, monkeypatch):
    class CutShort:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "config.json").exists()
            raise KeyboardInterrupt

    real = consolidating.policy_of_run
    monkeypatch.setattr(consolidating, "policy_of_run", lambda *args, **words: (real(*args, **words)[0], CutShort()))
    with pytest.raises(KeyboardInterrupt):
        consolidating.consolidate(real_run(), tmp_path / "whole")
    assert not (tmp_path / "whole" / "config.json").exists()
    monkeypatch.undo()
    consolidating.consolidate(real_run(), tmp_path / "whole")
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and ".staging" not in names


def test_the_card_is_replaced_whole(tmp_path):
    run = copy_of(real_run(), tmp_path / "run")
    card = write_card(run)
    assert not card.with_suffix(".tmp").exists()
    assert card.read_text() == (real_run() / "model" / "README.md").read_text()


def test_chat_answers_every_line_of_a_pipe(capsys):
    out = io.StringIO()
    console = Console(file=out, width=200, soft_wrap=True)
    lines = io.StringIO(f"{PUZZLE}\n\n/again\n/raw {PUZZLE}\n/quit\nnever read\n")
    assert chat(real_run(), lines=lines, console=console) == 0
    first, again, raw = out.getvalue().splitlines()
    assert first == again == raw, "greedy answers hang on the prompt alone"


def test_the_live_canvas_ends_in_the_same_answer_and_shows_masks():
    run = open_run(real_run())
    quiet, live = io.StringIO(), io.StringIO()
    expected = answer(run, PUZZLE, 1, 0.0, Console(file=quiet, width=200), live=False)
    shown = answer(run, PUZZLE, 1, 0.0, Console(file=live, width=200, force_terminal=True), live=True)
    assert shown == expected
    assert "░" in live.getvalue()


@pytest.mark.parametrize("sampler", ["dual_cache", "prefix_cache"])
def test_the_live_canvas_is_whole_where_a_cache_hands_over_a_span(sampler, monkeypatch):
    seen = []
    monkeypatch.setattr("d1lit.app.chatting.drawn", lambda run, canvas: seen.append(list(canvas)) or Text())
    run = open_run(real_run(), [f"sampler={sampler}"])
    assert run.plan.sampler.cache is not None
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    answer(run, PUZZLE, 1, 0.0, console, live=True)
    length, mask = run.plan.sampler.completion_length, run.policy.mask_token_id
    assert {len(canvas) for canvas in seen} == {length}
    assert [canvas.count(mask) for canvas in seen] == sorted((c.count(mask) for c in seen), reverse=True)
    assert seen[0].count(mask) == length


def test_chat_says_what_it_cannot_answer(tmp_path, capsys):
    assert commands.chat([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert commands.chat([str(real_run()), "--temperature=-1"]) == 2
    assert "--temperature" in capsys.readouterr().err


def test_a_run_that_names_strange_components_is_not_opened(tmp_path):
    run = copy_of(real_run(), tmp_path / "run")
    words = [*json.loads((run / "overrides.json").read_text()), "++sampler.commit._target_=os.system"]
    (run / "overrides.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match=r"os\.system"):
        open_run(run)


def test_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["d1lit", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    for name in ("train", "evaluate", *commands.COMMANDS):
        assert f"\n  {name} " in said
    monkeypatch.setattr(sys, "argv", ["d1lit", "comparee"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: comparee: no such command. Try: d1lit compare [E101]\n"


def test_the_card_shows_every_task_and_what_the_model_does_when_asked_otherwise(tmp_path):
    run = known_run(tmp_path / "a", [True, True, False], probes=probed(0.25))
    assert "| grpo | 3 | 66.7 |" in model_card(read_run(run))
    assert "| grpo | `pass@4` | 40 | 50.0 |" in model_card(read_run(run))
    add_evaluation(run, [False, True], task="grids")
    assert "| grpo | grids | 2 | 50.0 |" in model_card(read_run(run))
    assert "Asked otherwise" not in model_card(read_run(known_run(tmp_path / "b", [True])))
