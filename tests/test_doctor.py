"""The doctor: every fault it names comes with a cure, and it says what is true of this machine."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from d1lit.app import commands, doctor
from d1lit.app.doctor import Finding, examine, report
from tests.real_runs import real_run

CLOSED = "http://127.0.0.1:9"


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_this_machine_can_run_d1lit(tmp_path):
    findings = examine(outputs=tmp_path / "outputs")
    assert [f.subject for f in findings if f.level == "error"] == []
    seen = by_subject(findings)
    assert f"torch {version('torch')}" in seen["packages"].said
    assert seen["math grader"].said.endswith("True")
    assert not (tmp_path / "outputs").exists(), "looking leaves nothing behind"
    assert all(f.cure for f in findings if f.level != "ok"), [f for f in findings if f.level != "ok" and not f.cure]


def test_a_model_folder_is_looked_at_without_loading_it(tmp_path):
    seen = by_subject(doctor._model(str(real_run() / "model")))
    assert {name: finding.level for name, finding in seen.items()} == dict.fromkeys(
        ("model", "weights", "tokenizer"), "ok"
    )
    assert "<|user|>" in seen["tokenizer"].said


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_model_names_what_is_broken(tmp_path, broken):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (real_run() / "model").iterdir():
        if file.name != broken:
            (folder / file.name).write_bytes(file.read_bytes())
    bad = [finding for finding in doctor._model(str(folder)) if finding.level == "error"]
    assert len(bad) == 1
    assert bad[0].cure
    assert "\n" not in bad[0].said
    assert {"config.json": "model", "model.safetensors": "weights", "tokenizer.json": "tokenizer"}[broken] == bad[
        0
    ].subject


def test_a_model_that_is_nowhere_is_an_error_with_a_cure():
    (finding,) = doctor._model("/nowhere/at/all")
    assert finding.level == "error"
    assert finding.cure


def test_where_nothing_can_be_written_is_an_error():
    (finding,) = doctor._writable(Path("/proc/outputs"))
    assert finding.level == "error"
    assert "run_dir=PATH" in finding.cure


def test_a_closed_hub_is_a_note_and_stops_nothing():
    (finding,) = doctor._hub(timeout=2.0)
    assert finding.level == "note"
    assert CLOSED in finding.said
    assert "model.path=FOLDER" in finding.cure


def test_a_silent_hub_does_not_hold_the_doctor_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        (finding,) = doctor._hub(timeout=0.2)
    assert finding.level == "note"
    assert "in time" in finding.said


class Answers(BaseHTTPRequestHandler):
    """A hub that is there."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, format, *args):
        """Say nothing."""


def test_a_hub_that_answers_is_fine(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    (finding,) = doctor._hub(timeout=20.0)
    server.server_close()
    assert finding.level == "ok"


def test_offline_mode_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (finding,) = doctor._hub(timeout=2.0)
    assert "HF_HUB_OFFLINE" in finding.said


def test_a_hub_that_talks_nonsense_is_a_note(monkeypatch):
    def nonsense(server: socket.socket) -> None:
        asked, _ = server.accept()
        asked.recv(1000)
        asked.sendall(b"nonsense\r\n\r\n")
        asked.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=nonsense, args=(server,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        (finding,) = doctor._hub(timeout=20.0)
    assert finding.level == "note"
    assert finding.cure
    assert "cannot be reached" in finding.said


def test_memory_that_cannot_be_read_has_a_cure(monkeypatch):
    monkeypatch.setattr(doctor, "_free_memory", lambda: None)
    (finding,) = doctor._memory()
    assert finding.cure


def test_a_presets_name_stands_for_its_model_and_no_weights_are_fetched(tmp_path, monkeypatch):
    from d1lit.models import loading

    asked = []

    def snapshot(path, revision=None, allow_patterns=()):
        asked.append((path, allow_patterns))
        for file in (real_run() / "model").iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 2**31}, "weight_map": {"a": "model-1.safetensors"}})
        )
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    monkeypatch.setattr(doctor, "_free_memory", lambda: 2**40)
    seen = by_subject(doctor._model("llada_8b"))
    assert asked[0][0] == "GSAI-ML/LLaDA-8B-Instruct"
    assert not any("safetensors" in pattern for pattern in asked[0][1])
    assert {name: finding.level for name, finding in seen.items()} == {
        "model": "ok",
        "weights": "note",
        "tokenizer": "ok",
    }
    assert "2.0 GiB to fetch" in seen["weights"].said
    assert "hf download GSAI-ML/LLaDA-8B-Instruct" in seen["weights"].cure
    (tiny,) = doctor._model("tiny")
    assert tiny.level == "ok"


def test_exit_status_follows_the_errors():
    console = Console(file=StringIO(), width=100)
    assert report([Finding("a", "ok", "x"), Finding("b", "warning", "y", "z")], console) == 0
    assert report([Finding("a", "error", "[bold]x", "[red]y")], console) == 1
    assert isinstance(console.file, StringIO)
    assert "[bold]x" in console.file.getvalue(), "no finding is read as markup"


def test_the_command_as_json(tmp_path, capsys):
    assert commands.doctor(["--json", "--timeout", "0.5", "--outputs", str(tmp_path), "--model", str(tmp_path)]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [f["subject"] for f in findings if f["level"] == "error"] == ["model"]
