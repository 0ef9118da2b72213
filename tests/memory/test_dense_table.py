"""The table as an ordinary parameter: the store's rows, gradients and, with the same rule, its training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from engram_jax.config import ConfigError, EngramConfig
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.dense_table import DenseTable
from engram_jax.memory.hashing import canonicalize, ngram_row_ids
from engram_jax.memory.row_optimizers import CatchUpAdam, DenseAdam
from engram_jax.memory.store import MemoryStore

pytestmark = pytest.mark.newest

V, WIDTH, LAYER = 40, 4, "1"
CONFIG = EngramConfig(engram_layer_ids=(1,), engram_n_heads=2, engram_head_dim=WIDTH, engram_vocab_size=(23, 41))
RATES = np.linspace(2e-2, 1e-2, 30)


def make_store(optimizer=None):
    return MemoryStore.create(CONFIG, TokenMap.identity(V), optimizer or DenseAdam(RATES), init_std=0.5)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).zipf(1.3, (2, 12)) % V, jnp.int32)


def row_ids(store, tokens_BT):
    return ngram_row_ids(store.constants, int(LAYER), canonicalize(store.token_map, tokens_BT))


def table_of(store, state, step):
    """The store's table as a DenseTable."""
    table = DenseTable(store.num_rows(LAYER), WIDTH, rngs=nnx.Rngs(0))
    table.rows_rd[...] = store.materialize(state, step)[LAYER]
    return table


def loss(rows_BTHD, tokens_BT):
    target_BTD = jnp.sin(tokens_BT[..., None] * jnp.arange(1.0, WIDTH + 1)[None, None])
    return jnp.mean((jnp.sum(rows_BTHD, 2) - target_BTD) ** 2)


def test_rows_and_gradient_are_the_stores(key):
    store, tokens_BT = make_store(), tokens()
    state, plan, ids_BTH = store.init(key), store.plan(tokens_BT), row_ids(store, tokens_BT)
    table = table_of(store, state, 0)
    rows = store.fetch(state, plan, 0)[LAYER]
    np.testing.assert_array_equal(table(ids_BTH), rows)
    np.testing.assert_array_equal(rows, np.asarray(table.rows_rd[...])[np.asarray(ids_BTH)])

    dense = nnx.grad(lambda table: loss(table(ids_BTH), tokens_BT))(table).rows_rd[...]
    reduced = store.reduce(plan, {LAYER: jax.grad(loss)(rows, tokens_BT)})[LAYER]
    owned = np.asarray(plan[LAYER].owned_U)
    scattered, is_row = np.zeros(dense.shape, np.float32), owned < store.num_rows(LAYER)
    scattered[owned[is_row]] = reduced[is_row]
    np.testing.assert_allclose(dense, scattered, rtol=1e-6, atol=1e-9)
    counts = np.bincount(np.ravel(ids_BTH), minlength=len(dense))
    assert counts.max() > 2 and np.array_equal(np.any(dense != 0, axis=1), counts > 0)


@pytest.mark.parametrize("rule", [DenseAdam, CatchUpAdam])
def test_trained_with_optax_it_is_the_store(key, rule):
    store = make_store(rule(RATES, eps=1e-12))
    state, steps = store.init(key), len(RATES)
    graphdef, params = nnx.split(table_of(store, state, 0))
    start = np.asarray(params["rows_rd"][...])
    adam = optax.adam(lambda count: jnp.asarray(RATES, jnp.float32)[count], b1=0.9, b2=0.95, eps=1e-12)
    slots = adam.init(params)

    @jax.jit
    def plain(params, slots, tokens_BT):
        value, grads = jax.value_and_grad(
            lambda params: loss(nnx.merge(graphdef, params)(row_ids(store, tokens_BT)), tokens_BT)
        )(params)
        updates, slots = adam.update(grads, slots, params)
        return optax.apply_updates(params, updates), slots, value

    @jax.jit
    def stored(state, tokens_BT, step):
        plan = store.plan(tokens_BT)
        rows = store.fetch(state, plan, step)
        value, grads = jax.value_and_grad(lambda rows: loss(rows[LAYER], tokens_BT))(rows)
        return store.update(state, plan, store.reduce(plan, grads), step), value

    for step in range(steps):
        params, slots, plain_loss = plain(params, slots, tokens(step))
        state, stored_loss = stored(state, tokens(step), step)
        np.testing.assert_allclose(plain_loss, stored_loss, rtol=1e-5)
    end = np.asarray(params["rows_rd"][...])
    np.testing.assert_allclose(end, store.materialize(state, steps)[LAYER], rtol=0, atol=1e-6)
    assert np.abs(end - start).max() > 0.1


def test_first_rows_depend_on_key_and_id_alone(key):
    one, larger = (DenseTable(n, WIDTH, std=0.5, rngs=nnx.Rngs(params=key)) for n in (2000, 3000))
    np.testing.assert_array_equal(one.rows_rd[...], larger.rows_rd[...][:2000])
    assert abs(float(jnp.std(one.rows_rd[...])) - 0.5) < 0.02 and one.rows_rd[...].dtype == jnp.float32


@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("axes", [(), "data", ("data", "model")])
def test_on_a_mesh_it_reads_and_learns_the_same(key, mode, axes):
    store, tokens_BT = make_store(), tokens()
    ids_BTH = row_ids(store, tokens_BT)

    def make():
        return DenseTable(store.num_rows(LAYER), WIDTH, shard_over=axes, rngs=nnx.Rngs(params=key))

    def rows_and_grad(table, ids_BTH, tokens_BT):
        return table(ids_BTH), nnx.grad(lambda table: loss(table(ids_BTH), tokens_BT))(table).rows_rd[...]

    alone = make()
    rows, grad = rows_and_grad(alone, ids_BTH, tokens_BT)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(mode,) * 2)
    with jax.set_mesh(mesh):
        table = make()
        shards = len({shard.index[0].start for shard in table.rows_rd[...].addressable_shards})
        assert shards == {(): 1, "data": 2, ("data", "model"): 8}[axes]
        by_batch = jax.NamedSharding(mesh, jax.P("data"))
        graphdef, params = nnx.split(table)
        meshed = jax.jit(lambda p, ids, t: rows_and_grad(nnx.merge(graphdef, p), ids, t))
        mesh_rows, mesh_grad = meshed(params, jax.device_put(ids_BTH, by_batch), jax.device_put(tokens_BT, by_batch))
    np.testing.assert_array_equal(mesh_rows, rows)
    np.testing.assert_allclose(np.asarray(mesh_grad)[: len(grad)], grad, rtol=1e-6, atol=1e-9)
    assert len(mesh_grad) % shards == 0 and not np.any(np.asarray(mesh_grad)[len(grad) :])


def test_an_id_beyond_the_table_reads_nan(key):
    table = DenseTable(10, WIDTH, rngs=nnx.Rngs(0))
    rows = table(jnp.array([[[-1, 0, 9, 10]]]))
    np.testing.assert_array_equal(np.isnan(rows[0, 0, :, 0]), [True, False, False, True])


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="num_rows=0"):
        DenseTable(0, WIDTH, rngs=nnx.Rngs(0))
    with jax.set_mesh(jax.make_mesh((8,), ("data",))), pytest.raises(ConfigError, match="no axis \\['model'\\]"):
        DenseTable(10, WIDTH, shard_over=("data", "model"), rngs=nnx.Rngs(0))
