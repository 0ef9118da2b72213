"""The store's contract: what fetch sees, what update writes, and that both Adams train the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.memory import chunks
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.row_optimizers import CatchUpAdam, DenseAdam
from engram_jax.memory.store import MemoryStore

pytestmark = pytest.mark.newest

V = 40
CONFIG = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=4, engram_vocab_size=(23, 41))
RATES = np.full(200, 1e-2)


def make_store(optimizer=None, config=CONFIG):
    return MemoryStore.create(config, TokenMap.identity(V), optimizer or CatchUpAdam(RATES), init_std=0.5)


def tokens(seed=0, shape=(2, 12)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


def test_shapes_and_rows_of_the_configured_count(key):
    store = make_store()
    state = store.init(key)
    for layer in ("0", "2"):
        primes = store.constants.head_rows(int(layer))
        assert state.tables[layer].rows.shape == (sum(primes), 4)
        assert len(primes) == 4
    rows = jax.jit(lambda state, ids: store.fetch(state, store.plan(ids), 0))(state, tokens())
    assert {layer: r.shape for layer, r in rows.items()} == {"0": (2, 12, 4, 4), "2": (2, 12, 4, 4)}
    assert rows["0"].dtype == jnp.float32
    first, second = (np.asarray(state.tables[layer].rows) for layer in ("0", "2"))
    assert abs(np.std(first) - 0.5) < 0.05
    assert not np.array_equal(first[:20], second[:20])


def test_update_writes_the_rows_of_the_batch_only_and_sums_repeats(key):
    store, batch = make_store(), np.full((2, 12), 7, np.int32)
    batch[0, :3] = 1, 2, 3

    @jax.jit
    def update(state, batch):
        plan = store.plan(batch)
        reduced = store.reduce(plan, {layer: jnp.ones((2, 12, 4, 4)) for layer in plan})
        return plan, reduced, store.update(state, plan, reduced, 0)

    state = store.init(key)
    plan, reduced, new = update(state, batch)
    for layer, row_plan in plan.items():
        touched = np.unique(row_plan.ids_BTH)
        before, after = np.asarray(state.tables[layer].rows), np.asarray(new.tables[layer].rows)
        changed = np.flatnonzero(np.any(before != after, axis=1))
        np.testing.assert_array_equal(changed, touched)
        counts = np.unique(row_plan.ids_BTH, return_counts=True)[1]
        np.testing.assert_array_equal(reduced[layer][: len(touched), 0], counts)
        np.testing.assert_array_equal(new.tables[layer].slots["last_step"][touched], 1)


def test_segment_ids_change_only_the_first_positions_of_a_document():
    def read(store, *arrays):
        return np.asarray(jax.jit(lambda *arrays: store.plan(*arrays)["0"].ids_BTH)(*arrays))

    store, ids = make_store(), tokens()
    segments = np.repeat(np.where(np.arange(12) < 5, 1, 2)[None], 2, axis=0)
    whole, cut = read(store, ids), read(store, ids, segments)
    differs = np.any(whole != cut, axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(differs), [5, 6])
    np.testing.assert_array_equal(cut[:, 5:], read(store, ids[:, 5:]))
    crossing = make_store(config=EngramConfig(**{**CONFIG.__dict__, "engram_cross_documents": True}))
    np.testing.assert_array_equal(read(crossing, ids, segments), whole)


def readout(rows, target):
    return sum(jnp.mean((jnp.sum(r, 2) - target) ** 2) for r in rows.values())


def run(optimizer, steps, key):
    store = make_store(optimizer)

    def step_fn(state, step):
        ids = jax.random.categorical(
            jax.random.fold_in(key, step), -1.5 * jnp.log(1.0 + jnp.arange(V)), shape=(2, 12)
        ).astype(jnp.int32)
        plan = store.plan(ids)
        rows = store.fetch(state, plan, step)
        target = jnp.sin(ids[..., None] * jnp.arange(1.0, 5)[None, None])
        loss, grads = jax.value_and_grad(readout)(rows, target)
        return store.update(state, plan, store.reduce(plan, grads), step), loss

    state, losses = jax.jit(lambda s: jax.lax.scan(step_fn, s, jnp.arange(steps, dtype=jnp.int32)))(store.init(key))
    return np.asarray(losses), store.materialize(state, steps)


def test_losses_and_tables_equal_dense_adam_over_100_steps(key):
    losses, tables = run(CatchUpAdam(RATES), 100, key)
    dense_losses, dense_tables = run(DenseAdam(RATES), 100, key)
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(losses, dense_losses, atol=1e-4, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), tables, dense_tables)


def test_zero_gradients_of_an_all_padding_batch_leave_a_new_table_as_it_was(key):
    store = make_store()

    @jax.jit
    def update(state, ids, segments):
        plan = store.plan(ids, segments)
        return store.update(state, plan, store.reduce(plan, {k: jnp.zeros((2, 12, 4, 4)) for k in plan}), 0)

    new = update(store.init(key), np.full((2, 12), 2, np.int32), np.zeros((2, 12), np.int32))
    jax.tree.map(np.testing.assert_array_equal, store.materialize(new, 1), store.materialize(store.init(key), 0))


def test_without_engram_layers_the_store_is_empty(key):
    store = make_store(config=EngramConfig())
    assert store.init(key).tables == {} and store.plan(tokens()) == {}


def test_filling_reads_ahead_by_one_chunk_and_no_more(monkeypatch):
    """A disk faster than the devices must not pile chunks up in memory: a table of 130 MB once took 47 MB more."""
    store, log = make_store(), []

    class Writing:
        def block_until_ready(self):
            log.append("written")
            return self

    def read(shard, start, count):
        log.append(f"read {start}")
        return jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), store.row_shapes())

    monkeypatch.setattr(chunks, "chunk_writer", lambda store, layer: lambda table, start, chunk: Writing())
    chunks.filled(store, "0", Writing(), read, count=50)
    assert log == ["read 0", "written", "read 50", "written", "read 100", "written"]
