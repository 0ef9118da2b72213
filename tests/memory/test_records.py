"""Records against arrays beside each other: every dtype, any width, rows that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.memory.placements.device import DevicePlacement
from engram_jax.memory.table import TableState

pytestmark = pytest.mark.newest

R = 37


def random_rows(rng, count, width, dtype):
    rows = jnp.asarray(rng.normal(size=(count, width)), jnp.float32).astype(dtype)
    slots = {
        "m": jnp.asarray(rng.normal(size=(count, width)), jnp.float32),
        "scales": jnp.asarray(rng.integers(0, 256, (count, 3)), jnp.uint8),
        "v": jnp.asarray(rng.normal(size=count), jnp.float32),
    }
    return TableState(rows, slots, jnp.asarray(rng.integers(-5, 2**31, count), jnp.int32))


def cases():
    """Every dtype and every width; in the fast suite each of them once."""
    for i, dtype in enumerate(("float32", "bfloat16", "float8_e4m3fn")):
        for j, width in enumerate((1, 5, 80, 256)):
            yield pytest.param(dtype, width, marks=() if i == j % 3 else pytest.mark.slow)


@pytest.mark.parametrize(("dtype", "width"), list(cases()))
def test_what_is_written_is_read_bit_for_bit(dtype, width, rng):
    like = jax.eval_shape(lambda: random_rows(rng, 1, width, dtype))
    batches = [random_rows(rng, 9, width, dtype) for _ in range(3)]
    ids = [jnp.asarray(np.sort(rng.choice(R + 4, 9, replace=False)), jnp.int32) for _ in batches]
    tables = {}
    for as_records in (False, True):
        placement = DevicePlacement(as_records)
        table = jax.jit(placement.allocate, static_argnums=0)(R, random_rows(rng, 1, width, dtype))
        for batch, ids_U in zip(batches, ids, strict=True):
            table = jax.jit(placement.put, donate_argnums=0)(table, ids_U, batch)
        everything = jax.jit(placement.take)(table, jnp.arange(R + 2, dtype=jnp.int32))
        tables[as_records] = everything
        np.testing.assert_array_equal(table.uses, everything.uses[:R])
    assert jax.tree.map(lambda x: x.dtype, tables[True]) == jax.tree.map(lambda x: x.dtype, like)
    for a, b in zip(jax.tree.leaves(tables[False]), jax.tree.leaves(tables[True]), strict=True):
        assert a.shape == b.shape
        bits = np.dtype(f"uint{a.dtype.itemsize * 8}")
        np.testing.assert_array_equal(*(np.asarray(x).view(bits) for x in (a, b)))
    assert np.any(np.asarray(tables[True].uses)) and not np.any(np.asarray(tables[True].uses)[R:])


def test_a_record_of_the_papers_row_fills_two_tiles():
    like = TableState(jnp.zeros((1, 80)), {"m": jnp.zeros((1, 80)), "v": jnp.zeros((1, 80))}, jnp.zeros(1, jnp.int32))
    assert jax.eval_shape(lambda: DevicePlacement(True).allocate(10, like)).words.shape == (10, 256)
