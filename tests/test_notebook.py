"""The notebook runs from its first cell to its last, and is the one that its readable source says."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
STREAMS = ("stdout", "stderr")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)


def test_notebook_is_its_source(notebook):
    source = jupytext.read(NOTEBOOKS / "quickstart.py")
    ours, theirs = ([(cell.cell_type, cell.source) for cell in n.cells] for n in (notebook, source))
    assert ours == theirs, "run: jupytext --to ipynb --update notebooks/quickstart.py"


def test_notebook_is_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_badge_and_install_cell_name_one_repository(notebook):
    first = "\n".join(cell.source for cell in notebook.cells[:2])
    badge = re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob", first)
    install = re.findall(r"git\+https://github\.com/([^/\"]+/[^/\"]+)\"", first)
    assert badge == install and len(badge) == 1


@pytest.mark.slow
def test_notebook_runs(notebook, tmp_path):
    kernel_env = os.environ | {
        "ENGRAM_NB_STEPS": "6",
        "ENGRAM_NB_DOCUMENTS": "80",
        "ENGRAM_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
        "XLA_FLAGS": "",  # one device, as the reader has
    }
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=kernel_env)

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [cell.source for cell in code if any("image/png" in out.get("data", {}) for out in cell.outputs)]
    assert len(pictures) == 2 and "ax.plot" in pictures[0] and "plot_gates" in pictures[1]
    stdout, stderr = ("".join(o.text for cell in code for o in cell.outputs if o.get("name") == n) for n in STREAMS)
    assert stderr == ""  # a warning would greet every reader
    assert re.search(r"\d= .* \|", stdout)  # rows that two lines share
    assert "Done: quickstart, 6 steps" in stdout
