"""Configurations from elsewhere call nothing they should not; secrets stay at home."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import d1lit
from d1lit.app.cli import _ITSELF, _job_name, _own_packages, evaluate
from d1lit.app.foreign import stored_words
from d1lit.app.open_run import plan_of_run
from d1lit.app.refusing import refused
from d1lit.app.running import without_secrets
from d1lit.app.sweeps import FOLDER, blank_secrets, notes_of, run_job, show_sweep
from d1lit.errors import ConfigError
from d1lit.security import (
    REDACTED,
    UNNAMED,
    allowed_target,
    check_config,
    check_resolvers,
    is_secret_name,
    redact,
    redact_text,
)

CONF = Path(__file__).parents[1] / "conf"

HOSTILE = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.run",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.open",
    "logging.os.system",
    "logging.config.dictConfig",
    "pdb.Pdb._getval",
    "pdb.run",
    "cloudpickle.loads",
    "pickle.loads",
    "pickle._loads",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.os.system",
    "runpy.run_path",
    "importlib.import_module",
    "code.interact",
    "timeit.timeit",
    "shutil.rmtree",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "hydra._internal.utils._locate",
    "functools.partial",
    "operator.attrgetter",
    "transformers.AutoModel.from_pretrained",
    "yaml.unsafe_load",
    "numpy.load",
    # these begin with an allowed name
    "d1lit.sampling.torch.load",
    "d1lit.schedules.torch.os.system",
    "d1lit.draws.hashlib.os.system",
    "d1lit.checkpoint.prune",
    "d1lit.checkpoint.folder.shutil.rmtree",
    "d1lit.callbacks.signals.requeue",
    "d1lit.callbacks.signals.subprocess.run",
    "d1lit.callbacks.signals.os.system",
    "d1lit.callbacks.signals.signal.signal",
    "d1lit.data.lru_cache",
    "d1lit.app.cli.main",
    "d1lit.security.importlib.import_module",
    "torch.nn.modules.module.functools.partial",
    "torch.nn.Module.load_state_dict",
    "torch.nn.modules.module.torch.load",
    "torch.optim.optimizer.torch.load",
    "torch.nn.parallel.distributed.os.system",
    "torch.nn.Module.__init__",
    "torch.nn.__builtins__",
    "lightning.pytorch.core.saving.load_hparams_from_yaml",
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.loggers.csv_logs.os.system",
    "lightning.pytorch.trainer.call.signal.signal",
    "lightning.fabric.utilities.cloud_io._load",
    # these are ours and no components
    "d1lit.rewards.sandbox_warden.call",
    "d1lit.rewards.sandbox_warden.remove",
    "d1lit.rewards.sandbox_warden.mount",
    "d1lit.rewards.sandbox_warden.end_programs",
    "d1lit.rewards.sandbox_warden.set_limits",
    "d1lit.rewards.sandbox_warden.ctypes.CDLL",
    "d1lit.rewards.sandbox_roles.serve_program",
    "d1lit.rewards.sandbox_roles.run_tests",
    "d1lit.rewards.sandbox.Sandbox",
    "d1lit.rewards.math_worker.main",
    "d1lit.rewards.math_worker.serve",
    "d1lit.data.batch_loader",
    "d1lit.models.load_weights",
    "d1lit.evaluation.write_whole",
    # and these are no names
    "",
    "system",
    "os.system ",
    "torch.nn..Linear",
    "torch.nn.Linear\n",
    "torch.nn.${oc.env:HOME}",
    "torch-nn.Linear",
    "d1lit.nothing.of.this.kind",
    "torch.nn.NoSuchThing",
    "torch.nn",
    "torch.optimist.Adam",
    "d1lit.samplingx.torch",
]


@pytest.mark.parametrize("target", HOSTILE)
def test_hostile_targets_are_refused(target: str) -> None:
    assert not allowed_target(target)
    with pytest.raises(ValueError, match=r"^model\.parts\[1\]\._target_: "):
        check_config({"model": {"parts": [{}, {"_target_": target, "_args_": ["true"]}]}})


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW",
        "torch.nn.Linear",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.Trainer",
        "d1lit.schedules.LinearSchedule",
        "d1lit.callbacks.guards.SkipNonFinite",
        "d1lit.modules.optimizing.cosine_decay",
    ],
)
def test_components_are_allowed(target: str) -> None:
    assert allowed_target(target)


def targets(node: Any) -> list[str]:
    """Every `_target_` in a YAML."""
    if isinstance(node, dict):
        return [v for k, v in node.items() if k == "_target_" and v] + [t for v in node.values() for t in targets(v)]
    return [t for v in node for t in targets(v)] if isinstance(node, list) else []


def test_the_project_needs_nothing_that_is_not_allowed() -> None:
    found = {t for path in CONF.rglob("*.yaml") for t in targets(yaml.safe_load(path.read_text()))}
    assert found
    assert [target for target in sorted(found) if not allowed_target(target)] == []


def test_of_d1lit_itself_only_components_may_be_called() -> None:
    """What a YAML names and a short list; of the modules that start programs, only what is meant to."""
    commented = {
        name for path in CONF.rglob("*.yaml") for name in re.findall(r"#.*_target_: (d1lit[\w.]+)", path.read_text())
    }
    named = {t for path in CONF.rglob("*.yaml") for t in targets(yaml.safe_load(path.read_text()))} | commented
    found = {name: getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in named}
    expected = {f"{part.__module__}.{part.__qualname__}" for part in found.values()} | set(UNNAMED)
    allowed, starts_programs = set(), set()
    for module in [importlib.import_module(info.name) for info in pkgutil.walk_packages(d1lit.__path__, "d1lit.")]:
        own = [f"{module.__name__}.{name}" for name, part in vars(module).items() if part_of(part, module)]
        allowed |= {name for name in own if allowed_target(name)}
        if re.search(
            r"^import (subprocess|ctypes)$|(?<!\.)\b(exec|eval)\(|os\.fork",
            Path(str(module.__file__)).read_text(),
            re.MULTILINE,
        ):
            starts_programs |= set(own)
    assert len(allowed) > 150
    assert allowed == {name for name in expected if name.startswith("d1lit.")}
    assert len(starts_programs) > 20
    assert allowed & starts_programs == {"d1lit.rewards.math_process.MathVerify"}


def part_of(part: Any, module: ModuleType) -> bool:
    """Whether a function or class is defined in this module."""
    return isinstance(part, (type, FunctionType)) and part.__module__ == module.__name__


def test_packages_the_user_has_named_are_allowed() -> None:
    assert not allowed_target("json.JSONDecoder")
    assert allowed_target("json.JSONDecoder", trusted=["json"])
    assert not allowed_target("json.codecs.open", trusted=["json"])


def test_an_impostor_is_not_taken_for_what_it_calls_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn

    def evil() -> None: ...

    class Evil:
        pass

    for thing in (evil, Evil):
        thing.__module__, thing.__qualname__ = "torch.nn", "Linear"
        monkeypatch.setattr(torch.nn, "Innocent", thing, raising=False)
        assert not allowed_target("torch.nn.Innocent")


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HF_TOKEN}",
        "a ${eval:1}",
        "${oc.decode:${x}}",
        "${oc.select:x,${oc.env:HF_TOKEN}}",
        "${oc.env:D1LIT_${oc.env:HF_TOKEN}}",
        "${ oc.env:D1LIT_X}",
        "${x.${oc.env:HF_TOKEN}}",
        "${${x}:HF_TOKEN}",
        "${oc.${x}:HF_TOKEN}",
        "${oc.${x.${y}}:HF_TOKEN}",
        "${oc.select:'}',${oc.${x}:HF_TOKEN}}",
    ],
)
def test_resolvers_of_a_strange_configuration_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"^logger\.project: .*resolver"):
        check_resolvers({"logger": {"project": value}})
    check_resolvers({"logger": {"project": value}}, [f"logger.project={value}"])
    check_resolvers(
        {
            "logger": {"project": "${run.name}"},
            "b": "${.scales.${scale.name}.x}",
            "a": "${oc.select:x,3} ${oc.env:D1LIT_X}",
            "n": 3,
            "x": None,
        }
    )
    with pytest.raises(ValueError, match="not a string"):
        check_config({"_target_": ["os.system"]})


# --------------------------------------------------------------------------------------------------------- run folders


def foreign_run(folder: Path, *words: str) -> Path:
    """A downloaded run, as far as its words are looked at."""
    folder.mkdir(exist_ok=True)
    (folder / "overrides.json").write_text(json.dumps(["task=sudoku", "debug=fast", *words]))
    return folder


def check_refused(run: Path, cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands that open a run, and by `evaluate.py`, in one line without the value of any variable."""
    with pytest.raises(ConfigError, match=re.escape(cause)) as refused:
        plan_of_run(run)
    assert evaluate([f"run={run}"]) == 2
    said = capsys.readouterr().err
    assert cause in said and "Traceback" not in said
    assert FAKE not in said + str(refused.value)


@pytest.mark.parametrize(
    "word",
    [
        "+reward.parts.x={_target_:d1lit.rewards.sandbox_warden.call,_args_:[system,'touch CANARY']}",
        "+callbacks.x={_target_:d1lit.rewards.sandbox_warden.call,_args_:[system,'touch CANARY']}",
        "+callbacks.x={_target_:d1lit.rewards.sandbox.Sandbox,python:'touch CANARY'}",
        "++sampler.commit._target_=os.system",
    ],
)
def test_nothing_of_a_strange_run_is_called(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(foreign_run(tmp_path / "run", word), "comes from elsewhere", capsys)
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    "word",
    [
        "model.path=evil/${oc.env:EXAMPLE_TOKEN}",
        "+logger.x={a:[b,'${oc.env:EXAMPLE_TOKEN}']}",
        "model=../${oc.env:EXAMPLE_TOKEN}",
    ],
)
def test_a_strange_run_reads_no_environment(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_TOKEN", FAKE)
    check_refused(foreign_run(tmp_path / "run", word), "asks for a resolver", capsys)


@pytest.mark.parametrize(("name", "asks"), [("oc.env", "${${evaluation.x}:"), ("env", "${oc.${evaluation.x}:")])
def test_nor_by_a_resolver_whose_name_is_put_together(
    name: str, asks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_TOKEN", FAKE)
    assert OmegaConf.create({"evaluation": {"x": name}, "y": f"{asks}EXAMPLE_TOKEN}}"}).y == FAKE
    words = (f"++evaluation.x={name}", f"model.name='{asks}EXAMPLE_TOKEN}}'")
    check_refused(foreign_run(tmp_path / "run", *words), "asks for a resolver", capsys)


def test_nor_does_a_yaml_that_it_brings_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_TOKEN", FAKE)
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    text = (CONF / "model" / "tiny.yaml").read_text().replace("path: null", "path: evil/${oc.env:EXAMPLE_TOKEN}")
    assert "EXAMPLE_TOKEN" in text
    (run / "model" / "evil.yaml").write_text(text)
    check_refused(
        foreign_run(run, f"model={os.path.relpath(run / 'model' / 'evil', CONF / 'model')}"), "resolver", capsys
    )
    for words in ([f"--config-dir={run}"], [f"hydra.searchpath=[file://{run}]"], ["hydra/launcher=slurm", "-m"]):
        assert stored_words(foreign_run(run, *words), []) == ["task=sudoku", "debug=fast"]
    assert stored_words(foreign_run(run, "hydra.mode=RUN", "seed=3"), ["seed=4"])[-1] == "hydra.mode=RUN"


@pytest.mark.parametrize("command", [[sys.executable, str(CONF.parent / "evaluate.py")], [*_ITSELF, "evaluate"]])
def test_nothing_is_imported_from_a_downloaded_folder(command: list[str], tmp_path: Path) -> None:
    for name in ("yaml", "omegaconf", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("open('CANARY', 'w')")
    done = subprocess.run([*command, "run=nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nowhere is not a run's folder" in done.stderr
    assert not (tmp_path / "CANARY").exists()


def test_only_what_stands_in_a_named_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of d1lit, or a `json.py`, beside the folder of YAMLs makes neither trusted."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "d1lit").mkdir()
    for name in ("json.py", "my_part_of_a_run.py", "mine/another_part_of_a_run.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(tmp_path / "mine")])
    own = _own_packages([f"--config-dir={tmp_path / 'mine'}"])
    assert sorted(own) == ["another_part_of_a_run", "mine", "my_part_of_a_run"]


# ------------------------------------------------------------------------------------------------------------- secrets

FAKE = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
NAMED = [
    "token", "hf_token", "HF_TOKEN", "hub.token", "api_key", "apiKey", "API-KEY", "wandb_api_key", "password",
    "aws_secret_access_key", "db_password", "client_secret", "credentials", "access_token", "authToken",
    "private_key", "passphrase",
    "auth.bearer", "session_cookie", "HUGGING_FACE_HUB_TOKEN",
]  # fmt: skip
VALUES = [
    FAKE,
    "sk-abcdefghijklmnopqrstuvwx",
    "sk-ant-api03-abcdefghijkl-mnopqrst",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijklmnop",
    "glpat-abcdefghij0123456789",
    "AKIAABCDEFGHIJKLMNOP",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "xoxb-123456789012-abcdefghij",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n-----END RSA PRIVATE KEY-----",
]
INNOCENT = [
    "mask_token_id", "num_tokens", "tokens", "token_ids", "max_new_tokens", "mask_token", "pad_token", "eos_token",
    "tokenizer", "token_mean", "key", "sort_key", "key_map", "num_key_value_heads", "keys", "per_token", "secretary",
    "monkey", "passes", "author", "compass", "bearing", "num_tokens_forward", "tokens_per_second", "add_bos_token",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_secrets_by_name_are_redacted_everywhere(name: str) -> None:
    secret = "correct-horse-battery"
    tree = {"logger": {name: secret, "x": [{"deep": {name: {"inner": [secret, 12345]}}}]}}
    tree["argv"] = [f"{name}={secret}", f"logger.{name}={secret}"]  # type: ignore[assignment]
    text = json.dumps(redact(tree))
    assert secret not in text and "12345" not in text and REDACTED in text
    assert secret not in redact_text(f"started with {name}={secret} and {name}: '{secret}'")
    assert secret not in redact_text(json.dumps({name: secret}))


@pytest.mark.parametrize("value", VALUES)
def test_secrets_by_look_are_redacted_under_any_name(value: str) -> None:
    assert value not in str(redact({"path": value, "note": [f"use {value} here"]}))
    assert redact_text(f"use {value} here") == f"use {REDACTED} here"


@pytest.mark.parametrize("name", INNOCENT)
def test_innocent_names_keep_their_values(name: str) -> None:
    assert not is_secret_name(name)
    tree = {name: "<|mask|>", "x": {name: 126336}}
    assert redact(tree) == tree
    assert redact_text(f"{name}=126336") == f"{name}=126336"


def test_shapes_and_absent_secrets_are_kept() -> None:
    tree = {"token": None, "password": "", "hf_token": True, "a": (1, 2.5, "x"), 3: ["b"], "secret": 1234}
    assert redact(tree) == tree | {"secret": REDACTED}
    assert redact("https://me:hunter2@example.org/x") == f"https://{REDACTED}@example.org/x"
    assert redact_text("Authorization: Bearer abcdefgh123") == f"Authorization: {REDACTED} {REDACTED}"
    assert redact(["d1lit", "--hf-token", "abc", "-x", "y"]) == ["d1lit", "--hf-token", REDACTED, "-x", "y"]
    assert redact_text("commit 0c3d4c0f6a0c4a7e9b1d2c3f4a5b6c7d8e9f0a1b, token=null") == (
        "commit 0c3d4c0f6a0c4a7e9b1d2c3f4a5b6c7d8e9f0a1b, token=null"
    )


SHAPES: list[Any] = [
    "correct horse battery",
    "ab,cd;ef&gh}ij]kl",
    'it\'s "quoted" and: coloned',
    "a long one " * 20 + "correct",
    ["first-of-two", "second-of-two"],
    {"user": "somebody", "inner": {"pin": 987654}},
    "two\nlines",
]


def words_in(shape: Any) -> list[str]:
    """What must not be left of a secret: each piece of its text."""
    if isinstance(shape, dict):
        return [word for value in shape.values() for word in words_in(value)]
    if isinstance(shape, list):
        return [word for value in shape for word in words_in(value)]
    return [word for word in re.split(r"[\s,;&}\]\"':]+", str(shape)) if len(word) > 1 and word not in ("it", "and")]


@pytest.mark.parametrize("name", ["password", "hub.token", "api_key", "credentials"])
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_secrets_of_any_shape_are_not_stored(name: str, shape: Any) -> None:
    config: Any = OmegaConf.create({"callbacks": {"x": {"b": "kept, as it is"}}, "seed": 3})
    OmegaConf.update(config, f"callbacks.x.{name}", shape)
    text = without_secrets(config)
    assert [word for word in words_in(shape) if word in text] == []
    assert yaml.safe_load(text)["seed"] == 3 and yaml.safe_load(text)["callbacks"]["x"]["b"] == "kept, as it is"


@pytest.mark.parametrize(
    "word",
    [
        "+a.token=ab\\,cd",
        "+a.token='ab;cd&ef'",
        "+a.token=[ab,cd]",
        "++a.credentials.user=ab",
        "--hub-token=ab,cd",
        "a={b:1,token:ab,c:[cd]}",
        "a={token:[ab,cd]}",
        "a={b:{api_key:'ab}cd'},c:cd}",
        "a/token@b=ab cd",
    ],
)
def test_nothing_of_a_secret_word_is_left(word: str) -> None:
    (stored,) = redact([word])
    assert stored == f"{word.split('=')[0]}='{REDACTED}'"
    said = redact_text(f"the job {word} failed")
    assert redact(["a.b={c:[ab,cd]}", "x.token=null", "task.mask_token=ab"]) == [
        "a.b={c:[ab,cd]}",
        "x.token=null",
        "task.mask_token=ab",
    ]
    assert word.startswith(("++a.cred", "a/token", "a={token:[")) or "ab" not in said


def test_a_run_that_was_told_a_secret_can_be_opened(tmp_path: Path) -> None:
    words = redact(["seed=3", "+callbacks.x={_target_:mine.X,token:ab}", "+logger.token=ab"])
    run = foreign_run(tmp_path / "run", *words)
    assert stored_words(run, []) == ["task=sudoku", "debug=fast", "seed=3"]


def test_errors_show_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(ConfigError("logger.token", "'ab,cd' is no choice", "logger.token=null", "E201")) == 2
    said = capsys.readouterr().err
    assert "ab" not in said and "logger.token=null" in said


def test_sweeps_show_and_keep_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "sweep"))
    notes = notes_of(tmp_path / "sweep")
    told = ["seed=1", "+logger.token='ab;secret,cd'"]
    hydra = {"hydra": {"overrides": {"task": told}}, "logger": {"token": "ab;secret,cd"}}
    (notes / "multirun.yaml").write_text(yaml.safe_dump(hydra))
    blank_secrets(notes)
    name = _job_name(told)
    assert name != _job_name(["seed=1", "+logger.token=other"]) and name.startswith("seed=1,+logger.token=")
    run_job([sys.executable, "-c", "import sys; sys.exit(3)"], 0, told, tmp_path / "sweep" / name)
    show_sweep(tmp_path / "sweep", [told, told])
    out, err = capfd.readouterr()
    assert (out + err).count("seed=1") >= 3
    files = {file: file.read_text() for file in notes.iterdir()}
    assert {file.name for file in files} == {"multirun.yaml", "job-0.json"}
    for text in (out, err, name, *files.values()):
        assert "secret" not in text


def test_a_target_of_null_calls_nothing_and_is_no_fault() -> None:
    """What a run with logger=none has kept."""
    check_config({"logger": {"_target_": None}})
    with pytest.raises(ValueError, match=r"^logger\._target_: 5 is not a string"):
        check_config({"logger": {"_target_": 5}})
