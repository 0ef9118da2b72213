"""The notebooks run from their first cell to their last, and are what their readable sources say; docs' code runs."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("quickstart", "your_own_model", "inside_a_memory", "allocation_law")
STREAMS = ("stdout", "stderr")


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.fixture(params=NOTEBOOKS)
def name(request):
    return request.param


def test_all_notebooks_are_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


def test_notebook_is_its_source(name):
    source = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    ours, theirs = ([(cell.cell_type, cell.source) for cell in n.cells] for n in (read(name), source))
    assert ours == theirs, f"run: jupytext --to ipynb --update notebooks/{name}.py"


def test_notebook_is_stored_without_outputs(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_badge_and_install_cell_name_one_repository(name):
    first = "\n".join(cell.source for cell in read(name).cells[:2])
    badge = re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/notebooks/(\w+)\.ipynb", first)
    install = re.findall(r"git\+https://github\.com/([^/\"]+/[^/\"]+)\"", first)
    assert badge == [(repository, name) for repository in install] and len(badge) == 1


def run(name, folder, **variables):
    """The notebook's code cells after a run, in a kernel with one device, as the reader has."""
    notebook = read(name)
    environment = os.environ | variables | {"TMPDIR": str(folder), "XLA_FLAGS": ""}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(code):
    """What the cells wrote to stdout; a warning would greet every reader, so there must be none."""
    stdout, stderr = ("".join(o.text for cell in code for o in cell.outputs if o.get("name") == n) for n in STREAMS)
    assert stderr == ""
    return stdout


def pictures(code):
    return [cell.source for cell in code if any("image/png" in out.get("data", {}) for out in cell.outputs)]


def shown(code, kind):
    return [out.data[kind] for cell in code for out in cell.outputs if kind in out.get("data", {})]


@pytest.mark.slow
def test_quickstart_runs(tmp_path):
    cache = str(tmp_path / "cache")
    code = run("quickstart", tmp_path, ENGRAM_NB_STEPS="6", ENGRAM_NB_DOCUMENTS="80", ENGRAM_CACHE=cache)
    loss, gates = pictures(code)
    assert "ax.plot" in loss and "plot_gates" in gates
    text = printed(code)
    assert re.search(r"\d= .* \|", text)  # rows that two lines share
    assert "Done: quickstart, 6 steps" in text


@pytest.mark.slow
def test_your_own_model_runs(tmp_path):
    code = run("your_own_model", tmp_path, ENGRAM_NB_STEPS="4")
    (loss,) = pictures(code)
    assert "ax.plot" in loss
    text = printed(code)
    # Both forms of the memory are one model; over a few steps rounding can't part them.
    assert float(re.search(r"training losses differ by (\S+) at most", text)[1]) < 1e-4
    held_out = dict(re.findall(r"^(.+?) +held out (\S+) nats", text, re.MULTILINE))
    assert list(held_out) == ["without memory", "table as a parameter", "store"]
    assert float(held_out["store"]) == pytest.approx(float(held_out["table as a parameter"]), abs=2e-3)
    assert held_out["store"] != held_out["without memory"]
    used, rows = (int(x.replace(",", "")) for x in re.search(r"(\S+) of (\S+) rows were ever read", text).groups())
    assert 0 < used < rows


@pytest.mark.slow
def test_inside_a_memory_runs(tmp_path):
    cache = str(tmp_path / "cache")
    code = run("inside_a_memory", tmp_path, ENGRAM_NB_STEPS="6", ENGRAM_NB_DOCUMENTS="80", ENGRAM_CACHE=cache)
    collisions, gates, bars, matrix = pictures(code)
    assert "semilogx" in collisions and "plot_gates" in gates and "ax.bar" in bars and "imshow" in matrix
    text = printed(code)
    shares = [float(share) for share in re.findall(r"(\S+)% share their row", text)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.3)
    assert "0.0% share all 4 rows" in text
    ((before, after),) = re.findall(r"Most changed: .+, from (\S+) to (\S+) nats", text)
    assert float(before) < float(after)
    of_rows, of_owners, of_neighbours = shown(code, "text/html")
    assert "·for" in of_rows and "raise·ValueError" in of_owners and "all four heads" in of_neighbours


@pytest.mark.slow
def test_allocation_law_runs(tmp_path):
    cache = str(tmp_path / "cache")
    sizes = {"ENGRAM_NB_STEPS": "2", "ENGRAM_NB_SEEDS": "2", "ENGRAM_NB_SHARES": "40 100", "ENGRAM_NB_DOCUMENTS": "80"}
    code = run("allocation_law", tmp_path, ENGRAM_CACHE=cache, **sizes)
    (curve,) = pictures(code)
    assert "study.png" in curve
    assert len(re.findall(r"held-out loss \d", printed(code))) == 4
    budget, verdict, losses = shown(code, "text/markdown")
    assert "FLOPs per token" in budget and verdict.startswith("### Verdict") and "| rho100 |" in losses


def test_the_code_of_the_memorys_doc_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "memory.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    store, table = names["store"], np.asarray(names["table"])
    assert table.shape == (store.num_rows("1"), 16)
    start = np.asarray(store.materialize(store.init(names["jax"].random.key(0)), 0)["1"])
    # catch-up Adam at a constant rate: ten steps of 1e-3 towards 1 for the rows that were read, none for the others
    read_rows = np.unique(store.plan(names["tokens"])["1"].ids_BTH)
    moved = table - start
    np.testing.assert_allclose(moved[read_rows], 1e-2, rtol=1e-2)
    assert not np.any(np.delete(moved, read_rows, axis=0))
