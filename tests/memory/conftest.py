"""What several files of these tests begin with."""

from functools import partial
from importlib.metadata import version

import jax
import pytest
from saved_tables import HEADS, junk, place, random_rows, write

from engram_jax.memory.table import TableLayout


@pytest.fixture
def saved(tmp_path):
    """A whole table on 4 shards in chunks of 10 rows: its folder, layout and logical rows."""
    logical, layout = random_rows(sum(HEADS), seed=7), TableLayout(HEADS, 4)
    write(tmp_path / "table", layout, place(logical, HEADS, 4, junk), chunk=10)
    return tmp_path / "table", layout, logical


@pytest.fixture
def emitted_as_for_users(monkeypatch):
    """Not by the emitters of tests/conftest.py, which take more memory."""
    if version("jaxlib").startswith("0.10."):
        monkeypatch.setattr(jax, "jit", partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True}))
