"""Every command and snippet of README and docs does what the page says, or at least composes where it needs a GPU or a hub."""

import re
import shlex
from pathlib import Path

import pytest

from d1lit import cli
from d1lit.validation import compose_jobs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("experiments/*/README.md"),
]
PROGRAMS = ("python train.py", "python evaluate.py", "d1lit ", "python benchmarks/", "python experiments/")
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
            words = part.strip().removeprefix("srun ")
            if words.startswith(PROGRAMS):
                found.append(re.sub(r"\s+#.*$", "", words))
    return found


ALL = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]
TRAINING = [(page, c) for page, c in ALL if c.startswith("python train.py")]


def test_the_pages_have_commands():
    assert {"README.md"} <= {page for page, _ in ALL}
    assert len(ALL) >= 8


@pytest.mark.parametrize(("page", "command"), TRAINING)
def test_every_training_command_composes(page, command, tmp_path, monkeypatch):
    """Paths and run folders of the page need not exist; keys, groups and values must."""
    words = [w for w in shlex.split(command)[2:] if w not in ("--help", "--cfg", "job", "--resolve")]
    words = [w.replace("file://my_idea", f"file://{_users_folder(tmp_path)}") for w in words]
    jobs = compose_jobs("train", words)
    assert jobs.configs


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


def test_the_own_part_of_the_readme_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    folder = _users_folder(tmp_path)
    words = ["estimator=even", f"hydra.searchpath=[file://{folder}]", "task=sudoku", "debug=fast", "evaluation.rows=4"]
    assert cli.train([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("results.json")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [(p, c) for p, c in TRAINING if not any(w in c for w in NEEDS_MORE)])
def test_training_commands_run(page, command, tmp_path, monkeypatch):
    """On two optimizer steps a stage and four rows."""
    if any(word in command for word in ("experiment=", "FOLDER", ".jsonl", "--cfg", "outputs/")):
        pytest.skip("needs files or hours; composed by the quick test")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D1LIT_CACHE", str(tmp_path / "cache"))
    words = [w.replace("file://my_idea", f"file://{_users_folder(tmp_path)}") for w in shlex.split(command)[2:]]
    assert cli.train([*words, "debug=fast", "evaluation.rows=4"]) == 0
