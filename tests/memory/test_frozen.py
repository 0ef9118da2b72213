"""A frozen memory reads what the trained one reads, to the precision of FP8, wherever it lies."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import ConfigError, EngramConfig
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.frozen import freeze
from engram_jax.memory.placements import DevicePlacement, HostPlacement, NumpyPlacement
from engram_jax.memory.quantized import dequantize, quantize
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.sharding import MESH_AXES, make_mesh

pytestmark = pytest.mark.newest
V = 50


def trained(mesh, head_dim=32):
    """A store and its state after three updates."""
    config = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=head_dim, engram_vocab_size=90)
    shards = mesh.size if mesh else 1
    store = MemoryStore.create(config, TokenMap.identity(V), CatchUpAdam(np.full(10, 0.1)), shards=shards)

    @jax.jit
    def update(state, ids, step):
        plan = store.plan(ids)
        rows = store.fetch(state, plan, step)
        return store.update(state, plan, store.reduce(plan, jax.tree.map(jnp.sin, rows)), step)

    state = store.init(jax.random.key(0))
    for step in range(3):
        state = update(state, tokens(mesh, step), step)
    return store, state


def tokens(mesh, seed):
    ids = np.random.default_rng(seed).integers(0, V, (8, 12)).astype(np.int32)
    return jax.device_put(ids, jax.NamedSharding(mesh, jax.P(MESH_AXES))) if mesh else jnp.asarray(ids)


def in_fp8(rows):
    codes, scale = quantize(jnp.asarray(rows.reshape(-1, 32)))
    return np.asarray(dequantize(codes, scale)).reshape(rows.shape)


@pytest.mark.parametrize(
    ("shape", "placement"),
    [
        pytest.param(None, DevicePlacement(), marks=pytest.mark.slow),
        (None, DevicePlacement(as_records=True)),
        (None, HostPlacement()),
        pytest.param(None, NumpyPlacement(), marks=pytest.mark.slow),
        pytest.param((2, 4), DevicePlacement(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_frozen_store_reads_the_dequantised_rows(shape, placement):
    mesh = make_mesh(*shape) if shape else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        store, state = trained(mesh)
        frozen, frozen_state = freeze(store, state, 5, placement)  # rows wait for two steps
        plan = jax.jit(store.plan)(tokens(mesh, 9))
        exact = jax.jit(store.fetch)(state, plan, 5)
        load = frozen.load if not placement.in_program else jax.jit(frozen.load)
        held = load(frozen_state, plan)
        read = jax.jit(frozen.rows)(held, plan, 5)
    for layer in store.layers:
        rows, found = np.asarray(exact[layer]), np.asarray(read[layer])
        # `freeze` and `fetch` are different programs, so rows that they catch up may differ in the last bit of float32.
        # On a boundary between two FP8 numbers, either is right; everywhere else there is one.
        near = [in_fp8(rows * np.float32(1 + step)) for step in (-(2.0**-21), 2.0**-21)]
        assert np.all((found >= np.minimum(*near)) & (found <= np.maximum(*near)))
        assert np.mean(near[0] == near[1]) > 0.999
        assert np.abs(found - rows).max() < np.abs(rows).max() / 16
    assert frozen.num_bytes < 0.13 * store.num_bytes  # 33 + 4 bytes a row, against 128 + 256 + 8


def test_a_frozen_store_cannot_be_trained():
    store, state = trained(None)
    frozen, state = freeze(store, state, 3)
    plan = jax.jit(frozen.plan)(tokens(None, 1))
    grads = jax.jit(lambda state: frozen.reduce(plan, frozen.fetch(state, plan, 3)))(state)
    with pytest.raises(ConfigError, match="frozen and cannot be trained"):
        frozen.update(state, plan, grads, 3)


def test_frozen_tables_need_files_of_their_own(tmp_path):
    store, state = trained(None)
    store = dataclasses.replace(store, placement=NumpyPlacement(str(tmp_path)))
    for placement in (None, NumpyPlacement(str(tmp_path))):
        with pytest.raises(ConfigError, match=r"mmap_dir=.* to be frozen: give `placement=` another folder"):
            freeze(store, state, 3, placement)


def test_a_width_that_has_no_blocks_is_refused():
    store, state = trained(None, head_dim=24)
    with pytest.raises(ConfigError, match="24"):
        freeze(store, state, 3)
