"""Two processes of four devices over the loopback against one process of eight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import two_process_worker as worker

from engram_jax.runs.table_checkpoint import restore_tables
from engram_jax.sharding import make_mesh

pytestmark = pytest.mark.newest

SECONDS = 240
"""Of patience with processes that may wait for each other."""


def two_processes(folder, *options):
    """What each printed. Neither outlives this call."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = []
    try:
        for process in range(2):
            command = [sys.executable, worker.__file__, str(port), str(process), str(folder), *options]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        ends = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for process, (out, err) in zip(started, ends, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in ends]


def logical_tables(folder):
    """Restored on one device, in NumPy."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(restore_tables(folder / "tables", worker.store_on(1), mesh))


def test_two_processes_train_the_bits_of_one(tmp_path):
    apart, together = tmp_path / "apart", tmp_path / "together"
    for folder in (apart, together):
        folder.mkdir()
    two_processes(apart)
    worker.train(together)
    whole = np.load(together / "losses-0.npy")
    halves = np.concatenate([np.load(apart / f"losses-{process}.npy") for process in range(2)], axis=1)
    assert whole.shape == (worker.STEPS, worker.B) and whole[-1].mean() < whole[0].mean()
    np.testing.assert_array_equal(halves, whole)
    tables = logical_tables(together)
    jax.tree.map(np.testing.assert_array_equal, logical_tables(apart), tables)
    used = {layer: np.count_nonzero(table.uses) for layer, table in tables.items()}
    for folder, process in ((together, 0), (apart, 0), (apart, 1)):
        assert json.loads((folder / f"used-{process}.json").read_text()) == used


@pytest.mark.slow
def test_both_processes_hear_of_a_row_that_one_of_them_asked_for_wrongly(tmp_path):
    for out in two_processes(tmp_path, "damaged"):
        assert "RowIdError: Layer 2, head 0, sequence 8, position 0: the row id lies outside its head." in out
