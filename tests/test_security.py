"""Configurations from elsewhere call nothing they should not; secrets stay at home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from d1lit.security import REDACTED, allowed_target, check_config, is_secret_name, path_within, redact, redact_text

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
    "d1lit.cli.main",
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


@pytest.mark.parametrize("value", ["${oc.env:HF_TOKEN}", "a ${eval:1}", "${oc.decode:${x}}"])
def test_resolvers_of_a_strange_configuration_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"^logger\.project: .*resolver"):
        check_config({"logger": {"project": value}})
    check_config({"logger": {"project": "${run.name}"}, "n": 3, "x": None})
    with pytest.raises(ValueError, match="not a string"):
        check_config({"_target_": ["os.system"]})


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "link/x", "a\0b", "a/link/../../../x"])
def test_paths_that_lead_outside_are_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="path "):
        path_within(root, path)
    assert path_within(root, "a/../b/c") == root.resolve() / "b" / "c"
    assert path_within(root, root / "a") == root.resolve() / "a"


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
