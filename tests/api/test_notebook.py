"""The notebook of the examples runs in a real Jupyter kernel, with the real engine."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "quickstart.ipynb"


def outputs(cell: nbformat.NotebookNode) -> str:
    """The text and HTML that a cell shows."""
    parts = [o.get("text", "") + str(o.get("data", "")) for o in cell.get("outputs", [])]
    return "".join(parts)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    check, train, table, sample, resumed = map(outputs, cells[2:])
    assert "256 prompts from" in check
    assert "stopped" in train and "(reason: learned)" in train and "<svg" in train
    assert "reward/mean" in table and "'completion'" in sample
    assert "resumed at step" in resumed and "'eval/accuracy'" in resumed
