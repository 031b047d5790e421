"""Every command and snippet of README and docs does what the page says, or at least composes where it needs a GPU or a hub."""

import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from d1lit.app import cli, composing
from d1lit.app import commands as d1lit_commands
from d1lit.app.composing import compose_jobs
from tests.real_runs import copy_of, real_run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("experiments/*/README.md"),
]
PROGRAMS = ("python train.py", "python evaluate.py", "d1lit ", "python benchmarks/", "python experiments/", "pip ", "pytest",
            "torchrun ", "bash ", "tensorboard ", "mkdocs ")  # fmt: skip
NEEDS_MORE = ("llada", "dream", "diffucoder", "strategy=", "devices=", "harness")
"""Words of commands that need a GPU, a hub or an extra: they are composed, not run."""


def commands(page: Path) -> list[str]:
    """Command lines of a page's code blocks, joined over trailing backslashes, without their remarks."""
    text = page.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    joined = re.sub(r"\\\n\s*", " ", fenced + "\n" + indented)
    found = []
    for line in joined.splitlines():
        for part in re.split(r"\s&&\s", line.strip().removeprefix("$ ").split("  #")[0]):
            words = re.sub(r"^(?:[A-Z0-9_]+=\S+ +)*(?:srun )?", "", part.strip())
            if words.startswith(PROGRAMS):
                found.append(re.sub(r"\s+#.*$", "", words))
    # Commands in the middle of a sentence, where they are whole ones.
    inline = [code for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) if code.startswith(PROGRAMS)]
    whole = [code for code in inline if len(code.split()) > (2 if code.startswith("d1lit ") else 1)]
    return found + [code for code in whole if not any(word in code for word in ("...", "NAME", "COMMAND"))]


FIRST = {command: page.relative_to(ROOT).as_posix() for page in reversed(PAGES) for command in commands(page)}
ALL = [(page, command) for command, page in reversed(FIRST.items())]
"""Every command once, with the first page that has it."""
TRAINING = [(page, c) for page, c in ALL if c.startswith("python train.py")]
TRAINING += [(page, "python " + c[c.index("train.py") :]) for page, c in ALL if c.startswith("torchrun ")]
EVALUATING = [(page, c) for page, c in ALL if c.startswith("python evaluate.py")]
OURS = [(page, c) for page, c in ALL if c.startswith("d1lit ")]
OTHERS = [
    (page, c) for page, c in ALL if not c.startswith(("python train.py", "python evaluate.py", "d1lit ", "torchrun "))
]


def test_the_pages_have_commands():
    assert {"README.md"} <= {page for page, _ in ALL}
    assert len(ALL) >= 8


@pytest.mark.parametrize(
    ("page", "command"),
    [
        # Quick are the README's commands and every second of the others.
        pytest.param(
            p, c, marks=pytest.mark.slow if "experiment=" in c or " -m " in c or (p != "README.md" and i % 2) else ()
        )
        for i, (p, c) in enumerate(TRAINING)
    ],
)
def test_every_training_command_composes(page, command, tmp_path, monkeypatch):
    """Paths and run folders of the page need not exist; keys, groups and values must. Of a sweep, the first and last job."""
    every = composing._sweep
    monkeypatch.setattr(composing, "_sweep", lambda words: [every(words)[n] for n in (0, -1)])
    words = [w for w in shlex.split(command)[2:] if w not in ("--help", "--cfg", "job", "--resolve")]
    words = [w.replace("file://my_idea", f"file://{_users_folder(tmp_path)}") for w in words]
    jobs = compose_jobs("train", words)
    assert jobs.configs


@pytest.mark.parametrize(("page", "command"), EVALUATING)
def test_every_evaluating_command_composes(page, command):
    words = [word for word in shlex.split(command)[2:] if not word.startswith("hydra.searchpath")]
    assert compose_jobs("evaluate", words).configs


@pytest.mark.parametrize(("page", "command"), OURS)
def test_every_command_of_d1lit_is_understood(page, command, monkeypatch):
    """Its options and their values; what it then does is tested where the command is."""
    name, *words = shlex.split(command)[1:]
    if name in ("train", "evaluate"):
        assert compose_jobs(name, words).configs
    elif name != "doctor":
        monkeypatch.setattr(d1lit_commands, "guarded", lambda act: 0)
        numbered = ["3" if word == "N" else word for word in words]
        assert d1lit_commands.COMMANDS[name][0](numbered) == 0
    else:
        monkeypatch.setattr("d1lit.app.doctor.examine", lambda *asked: [])
        assert d1lit_commands.doctor(words) == 0


@pytest.mark.parametrize(("page", "command"), OTHERS)
def test_every_other_command_names_what_is_there(page, command):
    """Extras that pip is asked for, scripts and their options, tests."""
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        extras = set(
            tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        )
        assert {
            e for word in words for e in re.findall(r"[\w-]+", word[word.find("[") :] if "[" in word else "")
        } <= extras
    elif words[0] == "python":
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(word in script for word in words[2:] if word.startswith("--"))
    elif words[0] in ("pytest", "bash"):
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word)
    else:
        assert words[0] in ("tensorboard", "mkdocs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command"),
    [
        (page, command)
        for page, command in EVALUATING
        # The lengths of an 8B model are no multiples of the tiny one's blocks.
        if "run=outputs/RUN" in command and "searchpath" not in command and "128,256,512" not in command
    ],
)
def test_evaluating_commands_run(page, command, tmp_path, monkeypatch, capsys):
    """On a real run and two of its rows."""
    monkeypatch.chdir(tmp_path)
    words = [f"run={real_run()}" if word == "run=outputs/RUN" else word for word in shlex.split(command)[2:]]
    assert cli.evaluate([*words, "evaluation.rows=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("results.json")


@pytest.mark.slow
def test_the_commands_that_look_at_runs_run(tmp_path, monkeypatch, capsys):
    """Those of docs/results.md, one after another in one working folder, on copies of a real run; nothing is sent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RUN", "A", "B"):
        copy_of(real_run(), tmp_path / "outputs" / name)
        results = json.loads((tmp_path / "outputs" / name / "results.json").read_text())
        (tmp_path / "outputs" / name / "results.json").write_text(json.dumps({**results, "recipe": name}))
    asked = [command for command in commands(ROOT / "docs" / "results.md") if command.startswith("d1lit ")]
    asked = [command for command in asked if "--yes" not in command]
    asked = [command for command in asked if not any(word in command for word in NEEDS_MORE)]
    assert {command.split()[1] for command in asked} == {
        "report",
        "play",
        "compare",
        "chat",
        "doctor",
        "export",
        "push",
    }
    for command in asked:
        name, *words = shlex.split(command)[1:]
        words = [word for w in words for word in (sorted(map(str, Path().glob(w))) if "*" in w else [w])]
        monkeypatch.setattr(sys, "stdin", io.StringIO("0130000110030214\n"))
        assert d1lit_commands.COMMANDS[name][0](words) == 0, command
        assert capsys.readouterr().out.strip(), command
    made = (
        "compare.html",
        "player.gif",
        "outputs/RUN/player-test-3.html",
        "merged/config.json",
        "official/config.json",
    )
    assert all((tmp_path / name).is_file() for name in made)


def test_blocks_of_python_and_yaml_are_files_that_a_test_uses():
    """A snippet without a name would be one that nothing runs."""
    for page in PAGES:
        for language, body in re.findall(
            r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            if language in ("python", "yaml"):
                assert body.startswith("# my_idea/"), f"{page.name}: {body[:60]}"
            if language == "python":
                compile(body, page.name, "exec")
            if language == "yaml":
                yaml.safe_load(body)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Pages, links, pictures, and the reference from the docstrings."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert "OneStepEstimator" in reference
    assert (tmp_path / "errors" / "index.html").read_text(encoding="utf-8").count('id="e') >= 50


def _users_folder(folder: Path) -> Path:
    """The files of README's own-part example and of docs/adding-parts.md, written out."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/adding-parts.md"))
    blocks = re.findall(r"^```(?:python|yaml)\n# my_idea/(\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert {Path(name).suffix for name, _ in blocks} == {".py", ".yaml"}
    for name, body in blocks:
        file = folder / "my_idea" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body, encoding="utf-8")
    return folder / "my_idea"


@pytest.mark.slow
def test_the_own_part_of_the_readme_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    folder = _users_folder(tmp_path)
    words = ["estimator=even", f"hydra.searchpath=[file://{folder}]", "task=sudoku", "debug=fast", "evaluation.rows=4"]
    assert cli.train([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("results.json")


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(
            page,
            command,
            marks=pytest.mark.slow if page == "README.md" or "sft_spans" in command else pytest.mark.nightly,
        )
        for page, command in TRAINING
        if not any(word in command for word in NEEDS_MORE)
    ],
)
def test_training_commands_run(page, command, tmp_path, monkeypatch):
    """On two optimizer steps a stage and four rows."""
    if any(word in command for word in ("experiment=", "FOLDER", ".jsonl", "--cfg", "outputs/")):
        pytest.skip("needs files or hours; composed by the quick test")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    words = [w.replace("file://my_idea", f"file://{_users_folder(tmp_path)}") for w in shlex.split(command)[2:]]
    words = [
        w if "-m" not in words or not w.startswith("seed=") else w.split(",")[0] for w in words
    ]  # of a sweep, one seed
    assert cli.train([*words, "debug=fast", "evaluation.rows=4"]) == 0
