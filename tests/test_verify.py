"""`d1lit verify` on a LLaDA-shaped folder of random weights: it says yes to its own text and no to any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from d1lit.app.commands import verify
from d1lit.app.verify import Agreement, agreement, before_end, logit_difference, read_published, shared_prefix
from d1lit.models import build_tiny_tokenizer, export_model
from d1lit.models.presets import fresh_network, tiny_config

ROWS = [
    {
        "task": "countdown",
        "gen_length": 32,
        "diffusion_steps": 8,
        "block_length": 16,
        "rank": 0,
        "index_in_rank": n,
        "question": f"Numbers: [{n + 2}, 3, 4]\nTarget: 9",
        "generation": "",
        "ground_truth": [[n + 2, 3, 4], 9],
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official layout and names of LLaDA, random weights, bytes as tokens."""
    tokenizer = build_tiny_tokenizer()
    ids = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = tiny_config(len(tokenizer), *ids, width=16, num_layers=2, num_heads=2, mlp_width=32, rope_theta=100.0,
                         max_length=1024, init_std=0.5)  # type: ignore[arg-type]  # fmt: skip
    network = fresh_network(config, 0)
    network.config.family = "llada"
    path = tmp_path_factory.mktemp("llada")
    export_model(network, path, "official")
    tokenizer.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == "llada"
    return path


def publish(folder: Path, generations: list[str]) -> Path:
    lines = [json.dumps(row | {"generation": text}) for row, text in zip(ROWS, generations, strict=True)]
    (folder / "countdown_128.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(folder: Path, published: Path, output: Path, *words: str) -> tuple[int, dict]:
    asked = ["model=llada_8b", f"model.path={folder}", "model.dtype=float32", "evaluation.batch_size=4", *words]
    options = ["--tasks", "countdown", "--published", str(published), "--output", str(output)]
    code = verify([*asked, *options])
    file = output / "verify.json"
    return code, json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture(scope="module")
def own_text(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What this very model writes for the rows."""
    output = tmp_path_factory.mktemp("first")
    code, found = run(folder, publish(tmp_path_factory.mktemp("empty"), ["x"] * len(ROWS)), output)
    assert code == 0 and found["tasks"][0]["agreement"]["identical"] == 0
    return [json.loads(line)["completion"] for line in (output / "countdown.jsonl").read_text().splitlines()]


def by_index(output: Path) -> list[str]:
    records = [json.loads(line) for line in (output / "countdown.jsonl").read_text().splitlines()]
    return [record["completion"] for record in sorted(records, key=lambda record: record["index"])]


def test_a_model_is_found_identical_to_its_own_text(folder: Path, own_text: list[str], tmp_path: Path, capsys) -> None:
    code, found = run(folder, publish(tmp_path, own_text), tmp_path / "out")
    (task,) = found["tasks"]
    assert code == 0
    assert (task["agreement"]["rows"], task["agreement"]["identical"], task["agreement"]["shared"]) == (6, 6, 1.0)
    assert task["accuracy"] == task["published_accuracy"]
    assert task["paper"] == 20.7 and "paper 20.7" in capsys.readouterr().out
    assert task["prompt"]["prompt"] == "countdown_eval"
    assert set(found) >= {"dtype", "device", "batch_size", "packages", "model", "revision", "attend_padding"}


def test_changed_text_is_found_and_measured(folder: Path, own_text: list[str], tmp_path: Path) -> None:
    half = before_end(own_text[0])
    changed = [half[: len(half) // 2] + "\x01" * (len(half) - len(half) // 2), *own_text[1:]]
    _, found = run(folder, publish(tmp_path, changed), tmp_path / "out")
    wanted = (5 + (len(half) // 2) / len(half)) / 6
    assert found["tasks"][0]["agreement"]["identical"] == 5
    assert found["tasks"][0]["agreement"]["shared"] == pytest.approx(wanted)


def test_an_interrupted_run_goes_on_and_some_rows_get_no_papers_figure(
    folder: Path, own_text: list[str], tmp_path: Path
) -> None:
    published = publish(tmp_path, own_text)
    _, found = run(folder, published, tmp_path / "out", "--rows", "2")
    assert found["tasks"][0]["agreement"]["rows"] == 2 and found["tasks"][0]["paper"] is None
    first = (tmp_path / "out" / "countdown.jsonl").read_text()
    run(folder, published, tmp_path / "out")
    assert (tmp_path / "out" / "countdown.jsonl").read_text().startswith(first)
    assert by_index(tmp_path / "out") == own_text


def test_another_wording_may_be_brought(folder: Path, own_text: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("--- user\nSay: {{question}}\n--- prefill\n<reasoning>\n--- graded\ncompletion\n")
    code, found = run(folder, publish(tmp_path, own_text), tmp_path / "out", "--prompt", f"countdown={tmp_path}/p.txt")
    assert code == 0 and found["tasks"][0]["prompt"]["prompt"].endswith("p.txt")


def test_rows_of_another_prompt_are_never_gone_on_with(
    folder: Path, own_text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = publish(tmp_path, own_text)
    assert run(folder, published, tmp_path / "out")[0] == 0
    (tmp_path / "p.txt").write_text("--- user\nSay: {{question}}\n")
    assert run(folder, published, tmp_path / "out", "--prompt", f"countdown={tmp_path}/p.txt")[0] == 2
    assert "holds rows of another prompt, model or setting" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ["main", "abc123", "x" * 40, ""])
def test_official_code_is_never_run_without_a_full_commit(folder: Path, tmp_path: Path, commit: str, capsys) -> None:
    code, _ = run(folder, publish(tmp_path, ["x"] * 6), tmp_path / "out", "--run-official-code", commit)
    assert code == 2
    assert "no full commit" in capsys.readouterr().err


def test_code_in_a_folder_is_never_run_for_no_commit_pins_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers reads a folder's code whatever revision it is given: this one would run."""
    own, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    (own / "config.json").write_text(json.dumps(config))
    (own / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    code, _ = run(own, publish(tmp_path, ["x"] * 6), tmp_path / "out", "--run-official-code", "a" * 40)
    assert code == 2 and not ran.exists()
    assert "is a folder, whose code no commit pins" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--tasks", "gsm8k"], "no file"),
        (["model.path=null"], "model.path"),
        (["model.path=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_verified_is_one_line(
    folder: Path, tmp_path: Path, words: list[str], cause: str, capsys
) -> None:
    published = publish(tmp_path, ["x"] * 6)
    base = ["model=llada_8b", f"model.path={folder}", "--published", str(published), "--output", str(tmp_path / "o")]
    words = [*base, *words] if words[0] == "--tasks" else [*base, "--tasks", "countdown", *words]
    assert verify(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and cause in error and error.count("\n") == 1


def test_broken_published_files_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "countdown_128.jsonl").write_text(json.dumps(ROWS[0]) + "\n{}\n")
    with pytest.raises(ValueError, match=r"countdown_128\.jsonl:2"):
        read_published(tmp_path, "countdown")


def test_agreement_by_hand() -> None:
    assert shared_prefix("abcd", "abxd") == 0.5
    assert shared_prefix("abcd<|eot_id|>zz", "abcd<|endoftext|>") == 1.0
    assert shared_prefix("", "") == 1.0 and shared_prefix("", "a") == 0.0
    found = agreement(["ab", "cd<|eot_id|>"], ["ab", "cx"])
    assert (found.rows, found.identical, found.shared) == (2, 1, 0.75)
    assert isinstance(found, Agreement)
    with pytest.raises(ValueError, match="verify"):
        agreement(["a"], [])


def test_logits_are_compared_position_by_position() -> None:
    ours = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    found = logit_difference(ours, torch.tensor([[[1.0, 2.5], [0.0, 1.0]]]))
    assert found == {"largest_difference": 3.0, "mean_difference": 1.125, "same_choice": 0.5}
