"""Every entry of the catalogue of errors, brought about for real: code, key, cause, cure, and the page's anchor."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from d1lit.app import cli
from d1lit.checkpoint import lock_run
from d1lit.errors import PAGE, ConfigError, RunError, catalogue
from d1lit.models import build_policy, build_tiny_tokenizer, save_weights

SOURCE = Path(__file__).resolve().parents[2] / "src" / "d1lit"
LINE = re.compile(r"error: (?P<key>\S+): (?P<cause>.+)\. Try: (?P<cure>.+) \[(?P<code>E\d{3})\]")
SUDOKU = '{"puzzle": "0130000110030214", "solution": "4132234114233214"}\n'
FAST = "train task=sudoku debug=fast"
SMALL = f"{FAST} model.path=good evaluation.rows=2 run_dir=out recipe=sft"
"""A run on a random model that is there already: seconds."""

TYPED = {
    "E101": ["comparee", "train --multirum", "compare --csw x", "report"],
    "E102": ["train seed"],
    "E103": ["train sed=1", f"{FAST} sampler.temprature=1.0"],
    "E104": ["train num_generations=6"],
    "E105": ["train estimator=one_stepp"],
    "E106": ["train evaluation.lengths=[1,2"],
    "E107": ["train --config-dir=/nowhere"],
    "E108": [f"{FAST} stages.grpo.optimizer.lr=???"],
    "E109": [f"{FAST} sampler.num_steps=${{nowhere.to.be.found}}"],
    "E110": ["play random --group 0", "play random --row 100000", "explain E999", "verify --published x --prompt y"],
    "E201": [f"{FAST} sampler.temperature=warm"],
    "E202": [f"{FAST} sampler.temperature=-0.5", f"{FAST} loss.beta=-1.0", f"{FAST} resume=always"],
    "E203": [f"{FAST} loss._target_=nowhere.Loss"],
    "E204": [f"{FAST} logger._target_=d1lit.modules.optimizing.constant ~logger.default_hp_metric"],
    "E205": [f"{FAST} +loss.epsilonn=0.2", f"{FAST} +trainer.profilers=simple"],
    "E206": [f"{FAST} advantage._target_=math.sqrt"],
    "E207": [f"{FAST} estimator=espo loss=clipped"],
    "E208": [f"{FAST} stages.grpo.batch_size=6 stages.grpo.micro_batch_size=4"],
    "E209": [f"{FAST} recipe.stages=[sft,dpo]"],
    "E210": [f"{FAST} +trainer.max_steps=3"],
    "E211": ["evaluate run=hostile"],
    "E301": [f"{FAST} task.train_data=/nowhere/rows.jsonl"],
    "E302": [f"{FAST} task.train_data=broken.jsonl", f"{FAST} task.test_data=packed.zip"],
    "E303": [f"{FAST} task.train_data=other.jsonl"],
    "E304": [f"{FAST} task.train_data=wrong.jsonl"],
    "E305": [f"{FAST} task.train_data=blank.jsonl", f"{FAST} evaluation.split=val task.val_rows=0"],
    "E306": [f"{FAST} task.train_data=nobody/nothing"],
    "E307": [f"{FAST} task.max_test_prompt_length=3 task.max_prompt_length=3"],
    "E308": [f"{FAST} task.prompt=/nowhere/prompt.txt", f"{FAST} task.prompt=blank.jsonl"],
    "E309": ["train task=countdown debug=fast task.source.max_number=2 task.source.count_numbers=2"],
    "E401": [f"{FAST} model.path=/nowhere/model", f"{FAST} model.path=nobody/nothing"],
    "E402": [f"{FAST} model.path=odd"],
    "E403": [f"{FAST} model.path=bare", f"{FAST} model.path=torn"],
    "E404": [f"{FAST} model.path=mute"],
    "E405": ["evaluate task=sudoku model.path=good adapter=odd"],
    "E406": ["evaluate task=sudoku", "harness gsm8k"],
    "E501": [f"{FAST} run_dir=blank.jsonl", "report compared -o blank.jsonl/page.html"],
    "E502": [f"{FAST} run_dir=held"],
    "E503": [f"{FAST} run_dir=hostile resume=never", f"{FAST} run_dir=hostile"],
    "E504": ["compare odd", "chat odd", "evaluate run=odd"],
    "E505": ["export random good"],
    "E506": ["play random --group 1 --gif /dev/full"],
    "E507": ["evaluate rescore=wrong.jsonl task=sudoku", "verify --published odd model=llada_8b model.path=good"],
    "E508": ["consolidate random new"],
    "E601": [f"{FAST} trainer.num_nodes=2"],
    "E602": [f"play random --group {10**15}"],
    "E701": [f"{SMALL} stages.sft.optimizer.lr=1e30 callbacks.skip.max_in_a_row=1"],
    "E702": [
        f"{SMALL} 'callbacks.alarms.alarms=[{{_target_:d1lit.callbacks.Alarm,metric:train/loss,above:0.0,action:stop}}]'"
    ],
    "E703": [f"{SMALL} recipe=grpo reward=broken hydra.searchpath=[file://mine]"],
    "E704": ["evaluate rescore=code.jsonl task=code"],
    "E801": ["push compared me/model --yes"],
    "E802": ["harness gsm8k model.path=good"],
    "E803": ["harness model.path=good"],
    "E804": ["verify --published odd --run-official-code main"],
    "E805": ["chat asks"],
    "E806": ["push adapted me/model"],
}
SLOW = {"E403", "E501", "E502", "E503", "E601", "E602", "E701", "E702", "E703"}
BROKE_OFF = {"E506", "E602", "E701", "E702", "E703", "E704"}
"""Codes of what ends a run that had begun (exit status 1); E501 is one or the other."""


def model_folder(folder: Path, tokenizer: bool = True) -> Path:
    """A random model of the built-in shape."""
    (config,) = cli_configs()
    policy, _ = build_policy(
        path=None, tiny=config["tiny"], dtype="float32", attend_padding=False, lora=None, seed=0, device="cpu",
        revision=None, gradient_checkpointing=False,
    )  # fmt: skip
    save_weights(policy, folder)
    if tokenizer:
        build_tiny_tokenizer().save_pretrained(folder)
    return folder


def cli_configs() -> list[dict]:
    return [yaml.safe_load((SOURCE.parents[1] / "conf" / "model" / "tiny.yaml").read_text())]


def run_folder(folder: Path, model: Path, words: list[str]) -> None:
    """What `play`, `chat` and `push` look for in a run."""
    shutil.copytree(model, folder / "model")
    (folder / "overrides.json").write_text(json.dumps(words))
    (folder / "config.yaml").write_text("seed: 7\n")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a file for every mistake."""
    home = tmp_path_factory.mktemp("mistakes")
    good = model_folder(home / "good")
    model_folder(home / "mute", tokenizer=False)
    for name in ("odd", "bare", "hostile", "compared", "mine"):
        (home / name).mkdir()
    (home / "odd" / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(good / "model.safetensors", home / "odd")
    shutil.copy(good / "config.json", home / "bare")
    shutil.copytree(good, home / "torn")
    weights = home / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name, text in {
        "broken.jsonl": f"{SUDOKU}not json\n", "packed.zip": "PK\x03\x04", "other.jsonl": '{"a": 1}\n',
        "wrong.jsonl": SUDOKU.replace("4132234114233214", "1111111111111111"), "blank.jsonl": "\n\n",
    }.items():  # fmt: skip
        (home / name).write_text(text)
    row = {
        "id": "a",
        "question": "q",
        "prompt": "",
        "setup": "",
        "tests": ["assert f(1) == 1"],
        "entry_point": "f",
        "answer": "",
    }
    answer = "<answer>```python\ndef f(x): return x\n```</answer>"
    (home / "code.jsonl").write_text(json.dumps({"completion": answer, "example": row}))
    run_folder(home / "random", good, ["task=sudoku", "debug=fast", "model.path=null"])
    run_folder(home / "asks", good, ["task=countdown", "debug=fast"])
    shutil.copytree(good, home / "compared" / "model")
    results = {
        "recipe": "d1",
        "task": "sudoku",
        "model": "tiny",
        "seed": 0,
        "grader": "strict",
        "evaluations": [],
        "cost": {},
    }
    (home / "compared" / "results.json").write_text(json.dumps(results))
    shutil.copytree(home / "compared", home / "adapted")
    (home / "adapted" / "config.yaml").write_text(
        "recipe: {stages: [sft, grpo]}\nmodel: {path: GSAI-ML/LLaDA-8B-Instruct}\n"
    )
    (home / "adapted" / "model" / "adapter_config.json").write_text("{}")
    (home / "hostile" / "config.yaml").write_text("seed: 7\n")
    (home / "hostile" / "overrides.json").write_text('["task=sudoku", "+callbacks.mine={_target_:os.getcwd}"]')
    (home / "mine" / "reward").mkdir()
    (home / "mine" / "broken_reward.py").write_text(
        "from d1lit.types import Verdict\n\n\n"
        "class Broken:\n    def __call__(self, completions, examples):\n"
        "        return [Verdict(0.0, 'error') for _ in completions]\n"
    )
    (home / "mine" / "reward" / "broken.yaml").write_text(
        "_target_: d1lit.rewards.parts.RewardParts\n_convert_: all\n"
        "parts: {broken: {_target_: broken_reward.Broken}}\nweights: {broken: 1.0}\n"
    )
    return home


@pytest.fixture
def here(kept, monkeypatch, tmp_path):
    """The working folder, without a hub, without lm-eval, on a machine that allows no walls."""
    monkeypatch.chdir(kept)
    monkeypatch.setenv("D1LIT_CACHE", str(kept / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delattr("os.memfd_create", raising=False)  # as on another system than Linux
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is 2 + 2\n"))
    yield kept
    shutil.rmtree(kept / "out", ignore_errors=True)


def refusal(capsys, monkeypatch, typed: str) -> tuple[int, re.Match[str]]:
    """Exit status and the one line of a command."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["d1lit", *shlex.split(typed)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if line.startswith("error:")]
    assert len(lines) == 1, out + err
    assert "Traceback" not in out + err
    match = LINE.fullmatch(lines[0])
    assert match is not None, lines[0]
    assert isinstance(end.value.code, int)
    return end.value.code, match


@pytest.mark.parametrize(
    "code", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW or i % 2 else c for i, c in enumerate(TYPED)]
)
def test_an_entry_is_what_happens(code, here, capsys, monkeypatch):
    kind = catalogue()[code]
    assert f"\n### {kind.anchor.partition('#')[2].upper()}\n" in PAGE.read_text()
    for typed in TYPED[code]:
        with lock_run(here / "held"):
            status, match = refusal(capsys, monkeypatch, typed)
        print(match[0])
        assert match["code"] == code
        assert status == (1 if code in BROKE_OFF else status if code == "E501" else 1 if code == "E805" else 2)


def test_every_entry_has_its_case():
    assert list(TYPED) == sorted(catalogue())


def test_explain_prints_an_entry(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["d1lit", "explain", "e103"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("E103: No such key\n")
    assert out.rstrip().endswith("docs/errors.md#e103")


@pytest.mark.parametrize("kind", [ConfigError, RunError])
def test_errors_cross_processes_whole(kind):
    error = kind("a.b", "is wrong", "another", "E202")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(again), again.code, again.cure) == ("a.b: is wrong. Try: another [E202]", "E202", "another")


# ------------------------------------------------------------------------------------------------- in the source's text

INTERNAL = {
    # Modules of the library whose ValueErrors no configuration reaches: their callers are other code.
    "exact.py", "statistics.py", "advantages.py", "scoring.py", "models/cache.py", "models/head.py",
    "models/transformer.py", "models/policy.py", "models/lora.py", "modules/experience.py", "rewards/baselines.py",
    "rewards/rows.py", "rewards/d1_math.py", "rewards/sandbox_roles.py", "rewards/stored.py", "security.py",
    "checkpoint/folder.py", "checkpoint/lightning_io.py", "models/building.py", "verify.py",
    # Causes that the function around them puts into its own line.
    "tasks/reading.py", "tasks/task.py",
}  # fmt: skip


def raised(file: Path) -> list[tuple[int, str, str, int]]:
    """Line, name, text and number of arguments of every exception that a module makes."""
    text = file.read_text(encoding="utf-8")
    calls = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    return [
        (c.lineno, c.func.id, ast.get_source_segment(text, c) or "", len(c.args))
        for c in calls
        if isinstance(c.func, ast.Name) and c.func.id.endswith("Error")
    ]


def test_every_error_for_users_names_its_code():
    wrong = []
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        codes = re.findall(r"\[(E\d{3})\]|\"(E\d{3})\"", file.read_text(encoding="utf-8"))
        wrong += [f"{name}: {a or b} is not in the catalogue" for a, b in codes if (a or b) not in catalogue()]
        for line, kind, text, count in raised(file):
            if kind in ("ConfigError", "RunError") and count < 4 and name != "errors.py":
                wrong.append(f"{name}:{line}: {kind} without a code")
            if (
                kind == "ValueError"
                and name not in INTERNAL
                and "Try: " not in text
                and not text.startswith("ValueError(str")
            ):
                wrong.append(f"{name}:{line}: no cure: {text[:80]}")
    assert wrong == []
