"""docs/first-run.ipynb runs from its first cell to its last, and what it shows was really printed."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "first-run.ipynb"


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_it_was_executed_in_order_and_names_no_folder_of_anybody():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    assert all(cell["outputs"] for cell in cells())
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert not any(place in text for place in ("/home/", "/root/", "/tmp/", "/work/"))


@pytest.mark.slow
def test_it_runs_again(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the extra `docs` brings nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert "4 views:" in printed
    assert "1 views:" in printed
