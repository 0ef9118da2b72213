"""The store on a mesh against the store without one: what is read, what is summed, what is kept.

Legend: K steps, B batch, T seq, H rows per token, D row width, S shards, R local rows, U rows of an owner's list.
"""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeds import rng_of

from engram_jax.config import ConfigError, EngramConfig, OptimizerConfig
from engram_jax.memory import routing
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableLayout
from engram_jax.registries import ROW_OPTIMIZERS
from engram_jax.sharding import MESH_AXES, lookups, make_mesh

pytestmark = pytest.mark.newest

V, PAD, K, B, T, D = 40, 2, 20, 8, 10, 4
CONFIG = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=D, engram_vocab_size=(23, 71))
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 4)]
KINDS = ("uniform", "zipf", "all equal", "padding")
SHARDED = jax.P(MESH_AXES)


def make_store(mesh, optimizer="catch_up_adam", config=CONFIG, **settings):
    rule = ROW_OPTIMIZERS[optimizer].create(OPTIMIZER, np.full(200, OPTIMIZER.learning_rate))
    shards = mesh[0] * mesh[1] if mesh else 1
    return MemoryStore.create(config, TokenMap.identity(V), rule, shards=shards, init_std=0.5, **settings)


def on_mesh(mesh):
    """Outside any mesh for None."""
    return jax.set_mesh(make_mesh(*mesh, jax.devices()[: mesh[0] * mesh[1]])) if mesh else contextlib.nullcontext()


def put(x, spec=SHARDED):
    mesh = jax.sharding.get_mesh()
    return jnp.asarray(x) if mesh.empty else jax.device_put(x, jax.NamedSharding(mesh, spec))


# --- every mesh does what one device does ---


@pytest.fixture(scope="module")
def batches(request):
    """{kind: tokens and segment ids}, int32 [K, B, T] each."""
    rng, shape = rng_of(request), (K, B, T)
    segments = (np.where(np.arange(T) < T // 3, 1, 2) * np.ones((K, B, 1))).astype(np.int32)
    tokens = {
        "uniform": rng.integers(0, V, shape),
        "zipf": np.minimum(rng.zipf(1.3, shape), V - 1),
        "all equal": np.broadcast_to(rng.integers(0, V, (K, 1, 1)), shape),
    }
    made = {kind: (ids.astype(np.int32), segments) for kind, ids in tokens.items()}
    return made | {"padding": (np.full(shape, PAD, np.int32), np.zeros(shape, np.int32))}


def summable(grad, exactly):
    """`grad`, rounded to multiples of 1/64 if `exactly`: 80 of them add up to the same bits in any order."""
    return jnp.where(exactly, jnp.clip(jnp.round(grad * 64) / 64, -64, 64), grad)


@functools.cache
def program(mesh, optimizer, row_dtype):
    """The store, its first state, and K jitted steps in which the gradient depends on the rows."""
    store = make_store(mesh, optimizer, row_dtype=row_dtype)

    def loss(rows, tokens, segments):
        target = jnp.sin(tokens[..., None] * jnp.arange(1.0, D + 1)[None, None])
        off = sum(jnp.sum(r, 2) for r in rows.values()) - target
        return 0.5 * jnp.sum(jnp.where(segments[..., None] > 0, off**2, 0))

    @jax.jit
    def run(state, tokens_KBT, segments_KBT, exactly):
        def one_step(state, batch):
            step, tokens, segments = batch
            plan = store.plan(tokens, segments)
            rows = store.fetch(state, plan, step)
            grads = jax.tree.map(lambda g: summable(g, exactly), jax.grad(loss)(rows, tokens, segments))
            grads = store.reduce(plan, grads)
            lists = {layer: p.owned_U for layer, p in plan.items()}
            return store.update(state, plan, grads, step), (rows, lists, grads)

        return jax.lax.scan(one_step, state, (jnp.arange(K, dtype=jnp.int32), tokens_KBT, segments_KBT))

    with on_mesh(mesh):
        return store, store.init(jax.random.key(5)), run


def logical(store, state):
    """The whole state in logical order, in NumPy."""
    return {
        layer: jax.tree.map(lambda x, la=layer: store.layouts[la].to_logical(np.asarray(x)), table)
        for layer, table in state.tables.items()
    }


@pytest.fixture(scope="module")
def run(batches):
    """`run(mesh, optimizer, kind)`: what K steps read, added up and left, in logical order."""

    @functools.cache
    def run(mesh, optimizer, kind, row_dtype="float32", exactly=False):
        store, state, steps = program(mesh, optimizer, row_dtype)
        with on_mesh(mesh):
            tokens, segments = (put(x, jax.P(None, *lookups(2))) for x in batches[kind])
            state, (rows, lists, grads) = jax.device_get(steps(state, tokens, segments, exactly))
        dense = {}
        for layer, layout in store.layouts.items():
            local_KU = lists[layer].reshape(K, layout.shards, -1)
            place_KU = (local_KU + layout.rows_per_shard * np.arange(layout.shards)[:, None]).reshape(K, -1)
            real_KU = (local_KU < layout.rows_per_shard).reshape(K, -1)
            placed_KRD = np.zeros((K, layout.shards * layout.rows_per_shard, D), np.float32)
            for k in range(K):
                placed_KRD[k, place_KU[k, real_KU[k]]] = grads[layer][k, real_KU[k]]
                assert not grads[layer][k, ~real_KU[k]].any()
            dense[layer] = placed_KRD[:, layout.logical_order()]
        return SimpleNamespace(rows=rows, grads=dense, tables=logical(store, state), used=state.rows_used)

    return run


def close(ours, theirs):
    """80 terms of up to 5, added up in any two orders in float32, differ by less than this."""
    np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=3e-5)


def compare(mine, one, same):
    for name in ("rows", "grads", "tables"):
        jax.tree.map(same, getattr(mine, name), getattr(one, name))
    for layer, table in mine.tables.items():
        np.testing.assert_array_equal(table.uses, one.tables[layer].uses)
        assert mine.used[layer] == one.used[layer] == np.count_nonzero(table.uses)


def cases(*optimizers):
    """Each on every mesh; in the fast suite catch-up Adam, and what differs most from it on one mesh."""

    def case(optimizer, mesh):
        fast = optimizer == "catch_up_adam" or (mesh == (2, 4) and optimizer == "sinkhorn")
        return pytest.param(optimizer, mesh, marks=() if fast else pytest.mark.slow, id=f"{optimizer}-{mesh}")

    return pytest.mark.parametrize(("optimizer", "mesh"), [case(o, mesh) for mesh in MESHES for o in optimizers])


@cases(*ROW_OPTIMIZERS)
def test_twenty_steps_are_those_of_one_device(run, optimizer, mesh):
    """Gradients of repeated rows are added up in another order there, and the difference is fed back for 20 steps."""
    for kind in KINDS:
        compare(run(mesh, optimizer, kind), run(None, optimizer, kind), close)


@cases(*(optimizer for optimizer in ROW_OPTIMIZERS if optimizer != "sinkhorn"))
def test_where_sums_are_exact_every_bit_is_that_of_one_device(run, optimizer, mesh):
    """Not under Sinkhorn, whose sums over the whole table are taken shard by shard."""
    for kind in KINDS:
        mine, one = run(mesh, optimizer, kind, exactly=True), run(None, optimizer, kind, exactly=True)
        compare(mine, one, np.testing.assert_array_equal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "mesh"),
    [
        ("catch_up_adam", (2, 4)),
        pytest.param("catch_up_adam", (4, 1), marks=pytest.mark.slow),
        pytest.param("rowwise_rmsprop", (8, 1), marks=pytest.mark.slow),
        pytest.param("dense_adam", (2, 4), marks=pytest.mark.slow),
    ],
)
def test_bfloat16_rows_are_rounded_by_the_same_noise_on_every_mesh(run, optimizer, mesh):
    """Other noise would change rows by 2^-8 of their size."""
    for kind in KINDS:
        mine, one = (run(on, optimizer, kind, "bfloat16", exactly=True) for on in (mesh, None))
        assert mine.tables["0"].rows.dtype == jnp.bfloat16
        compare(mine, one, np.testing.assert_array_equal)
    assert not np.array_equal(mine.rows["0"], run(None, optimizer, kind, exactly=True).rows["0"])


def test_the_batches_move_the_rows_they_should(run):
    """What the comparisons are worth: many rows move; those that nobody reads and those of padding stay."""
    store, state, _ = program(None, "catch_up_adam", "float32")
    before = logical(store, state)
    for kind, fewest, most in (("uniform", 0.8, 1), ("zipf", 0.4, 1), ("all equal", 0.1, 0.8), ("padding", 0, 0)):
        after = run(None, "catch_up_adam", kind)
        for layer, table in after.tables.items():
            moved = (table.rows != before[layer].rows).any(axis=1)
            assert fewest <= moved.mean() <= most, kind
            assert not moved[table.uses == 0].any()
            assert (table.uses > 0).any()


@pytest.mark.parametrize("row_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_new_tables_are_the_same_bits_on_every_mesh(row_dtype, monkeypatch):
    def first(mesh):
        store = make_store(mesh, row_dtype=row_dtype)
        with on_mesh(mesh):
            state = store.init(jax.random.key(9))
        for layer, table in state.tables.items():
            padding = np.ones(len(table.uses), bool)
            padding[store.layouts[layer].logical_order()] = False
            assert not np.asarray(table.rows)[padding].any()
            assert mesh is None or table.rows.sharding.spec[0] == MESH_AXES
        return logical(store, state)

    one = first(None)
    assert one["0"].rows.any(axis=1).all()
    for mesh in MESHES:
        jax.tree.map(np.testing.assert_array_equal, first(mesh), one)
    monkeypatch.setattr("engram_jax.memory.chunks.CHUNK_ROWS", 7)
    jax.tree.map(np.testing.assert_array_equal, first((2, 4)), one)


@pytest.mark.parametrize("mesh", [(2, 4), (1, 1)], ids=str)
def test_rows_read_early_and_patched_are_the_rows_read_late(batches, mesh):
    store, state, _ = program(mesh, "catch_up_adam", "float32")

    @jax.jit
    def both(state, tokens, following):
        plan, next_plan = store.plan(tokens), store.plan(following)
        early, held = store.load(state, next_plan), store.load(state, plan)
        held = store.advance(held, plan, store.reduce(plan, store.rows(held, plan, 3)), 3)
        late = store.load(store.save(state, plan, held), next_plan)
        return early, store.patch(early, next_plan, held, plan), late

    with on_mesh(mesh):
        for kind in ("uniform", "zipf"):
            early, patched, late = jax.device_get(both(state, *(put(x, lookups(2)) for x in batches[kind][0][:2])))
            jax.tree.map(np.testing.assert_array_equal, patched, late)
            assert (early["0"].rows != late["0"].rows).any()


def test_tables_of_different_widths_travel_in_one_call(rng):
    layouts = {"0": TableLayout((53, 59), 8), "2": TableLayout((61, 7), 8)}
    widths, shape = {"0": 3, "2": 5}, (8, 6, 2)
    ids, values, grads = {}, {}, {}
    for la, layout in layouts.items():
        ids[la] = (rng.integers(0, layout.head_rows, shape) + np.array(layout.offsets)).astype(np.int32)
        values[la] = rng.normal(size=(layout.num_rows, widths[la])).astype(np.float32)
        grads[la] = rng.integers(-9, 9, (*shape, widths[la])).astype(np.float32)

    @jax.jit
    def through(ids, tables, grads):
        plan = routing.plan_rows(ids, layouts)
        take = routing.on_shards(lambda rows, ids_U: rows.at[ids_U].get(mode="fill", fill_value=0), SHARDED, SHARDED)
        owned = {la: take(tables[la], p.owned_U) for la, p in plan.items()}
        return plan, routing.send_rows(owned, plan, "all_to_all"), routing.collect_grads(grads, plan, "all_to_all")

    def sharded(layout, values):
        placed = np.zeros((8 * layout.rows_per_shard, values.shape[1]), np.float32)
        placed[layout.logical_order()] = values
        return put(placed)

    with on_mesh((2, 4)):
        tables = {la: sharded(layout, values[la]) for la, layout in layouts.items()}
        plan, seen, sums = jax.device_get(through(jax.tree.map(put, ids), tables, jax.tree.map(put, grads)))
    for la, layout in layouts.items():
        np.testing.assert_array_equal(seen[la], values[la][ids[la]])
        expected = np.zeros_like(values[la])
        np.add.at(expected, ids[la].reshape(-1), grads[la].reshape(-1, widths[la]))
        owned_SU = plan[la].owned_U.reshape(8, -1)
        place_SU = owned_SU + layout.rows_per_shard * np.arange(8)[:, None]
        real_SU = owned_SU < layout.rows_per_shard
        placed = np.zeros((8 * layout.rows_per_shard, widths[la]), np.float32)
        placed[place_SU[real_SU]] = sums[la].reshape(8, -1, widths[la])[real_SU]
        np.testing.assert_array_equal(placed[layout.logical_order()], expected)


def test_tables_cut_for_a_mesh_are_not_touched_outside_it(key):
    store = make_store((4, 1))
    with on_mesh((4, 1)):
        state = store.init(key)
    for act in (lambda: store.init(key), lambda: store.materialize(state, 0)):
        with pytest.raises(ConfigError, match=r"4 shards, but there is no mesh: run this within jax.set_mesh"):
            act()
