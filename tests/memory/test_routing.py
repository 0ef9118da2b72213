"""Routing against NumPy: what every lookup sees, what every row is given, on every mesh and for hard batches."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.memory import routing
from engram_jax.memory.plan import Capacity, RowIdError, check, fits, overflow
from engram_jax.memory.table import TableLayout
from engram_jax.sharding import MESH_AXES, make_mesh

pytestmark = pytest.mark.newest

HEADS = {"0": (53, 59, 97, 101), "2": (61, 67, 3, 5)}
OFFSETS = {layer: np.cumsum((0, *heads[:-1])) for layer, heads in HEADS.items()}
WIDTH = 3
MESHES = [None, (1, 1), (2, 1), (1, 4), (8, 1), (2, 4)]


def in_heads(draw):
    """Ids [8, 6, 4] per layer; `draw(rows)` gives numbers below `rows`."""
    return {
        layer: np.stack([offset + draw(rows) for rows, offset in zip(heads, OFFSETS[layer], strict=True)], -1).astype(
            np.int32
        )
        for layer, heads in HEADS.items()
    }


def id_batches():
    rng = np.random.default_rng(0)
    return {
        "uniform": in_heads(lambda rows: rng.integers(0, rows, (8, 6))),
        "zipf": in_heads(lambda rows: np.minimum(rng.zipf(1.3, (8, 6)) - 1, rows - 1)),
        "all equal": in_heads(lambda rows: np.full((8, 6), rows // 2)),
        "first and last rows": in_heads(lambda rows: (rows - 1) * rng.integers(0, 2, (8, 6))),
    }


@contextlib.contextmanager
def on_mesh(shape):
    """Yields (devices, put): `put` shards a tree's leading dims over the mesh."""
    if shape is None:
        yield 1, jnp.asarray
        return
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    with jax.set_mesh(mesh):
        yield mesh.size, lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(MESH_AXES)))


def layouts(shards):
    return {layer: TableLayout(heads, shards) for layer, heads in HEADS.items()}


def sharded_table(layout, table):
    """A logical table [num_rows, D] as it lies over the shards."""
    array = np.full((layout.shards * layout.rows_per_shard, table.shape[1]), np.nan, np.float32)
    array[layout.logical_order()] = table
    return array


@partial(jax.jit, static_argnames=("devices", "capacities"))
def run(ids, tables, grads, devices, capacities=None):
    plan = routing.plan_rows(ids, layouts(devices), capacities and dict(capacities))
    owned = {}
    for layer, p in plan.items():
        take = routing.on_shards(
            lambda table, ids_U: table.at[ids_U].get(mode="fill", fill_value=0),
            (jax.P(routing.mesh_axes()),) * 2,
            jax.P(routing.mesh_axes()),
        )
        owned[layer] = take(tables[layer], p.owned_U)
    seen = routing.send_rows(owned, plan, "all_to_all")
    return plan, seen, routing.collect_grads(grads, plan, "all_to_all")


@partial(jax.jit, static_argnames=("devices", "capacities"))
def planned(ids, devices, capacities=None):
    return routing.plan_rows(ids, layouts(devices), capacities and dict(capacities))


def through_the_mesh(shape, ids, tables, grads, capacities=None):
    """Per layer: the plan, the rows each lookup sees, and the summed gradient of each logical row (dense)."""
    capacities = capacities and tuple(capacities.items())
    with on_mesh(shape) as (devices, put):
        cut = layouts(devices)
        stored = {layer: put(sharded_table(cut[layer], tables[layer])) for layer in ids}
        put_all = lambda tree: {layer: put(x) for layer, x in tree.items()}  # noqa: E731
        plan, seen, summed = jax.device_get(run(put_all(ids), stored, put_all(grads), devices, capacities))
    dense = {}
    for layer, layout in cut.items():
        owned = plan[layer].owned_U.reshape(devices, -1)
        assert (np.diff(owned, axis=1) > 0).all()
        by_shard = np.zeros((devices * layout.rows_per_shard, WIDTH), np.float32)
        sums = summed[layer].reshape(devices, -1, WIDTH)
        for shard in range(devices):
            real = owned[shard] < layout.rows_per_shard
            by_shard[shard * layout.rows_per_shard + owned[shard, real]] = sums[shard, real]
            assert not sums[shard, ~real].any()
        dense[layer] = by_shard[layout.logical_order()]
    return plan, seen, dense


@pytest.mark.parametrize("name", id_batches())
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_lookups_see_their_rows_and_rows_get_the_sum_of_their_gradients(name, shape, rng):
    ids = id_batches()[name]
    tables = {layer: rng.normal(size=(sum(heads), WIDTH)).astype(np.float32) for layer, heads in HEADS.items()}
    grads = {layer: rng.normal(size=(8, 6, 4, WIDTH)).astype(np.float32) for layer in HEADS}
    plan, seen, summed = through_the_mesh(shape, ids, tables, grads)
    for layer in HEADS:
        np.testing.assert_array_equal(seen[layer], tables[layer][ids[layer]])
        expected = np.zeros_like(tables[layer])
        np.add.at(expected, ids[layer].reshape(-1), grads[layer].reshape(-1, WIDTH))
        np.testing.assert_allclose(summed[layer], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(plan[layer].faults, [-1, 0])
    if shape is not None and shape != (1, 1):
        devices = shape[0] * shape[1]
        for layer, p in plan.items():
            asked = sum(len(np.unique(part)) for part in np.split(ids[layer], devices))
            assert p.routes.asked_S.sum() == asked == p.routes.arrived_S.sum()


def test_sums_are_the_same_bits_every_time(rng):
    ids = id_batches()["zipf"]
    tables = {layer: np.zeros((sum(heads), WIDTH), np.float32) for layer, heads in HEADS.items()}
    grads = {layer: rng.normal(size=(8, 6, 4, WIDTH)).astype(np.float32) for layer in HEADS}
    first, second = (through_the_mesh((2, 4), ids, tables, grads)[2] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def make_plan(ids, capacities=None, shape=(8, 1)):
    with on_mesh(shape) as (devices, put):
        plan = planned({layer: put(x) for layer, x in ids.items()}, devices, capacities and tuple(capacities.items()))
        return plan, fits(plan), {layer: int(overflow(p)) for layer, p in plan.items()}


def test_a_plan_that_does_not_fit_says_what_it_needs():
    ids = id_batches()["uniform"]
    plan, fitting, _ = make_plan(ids)
    need = {layer: Capacity(int(p.need.pair), int(p.need.owner)) for layer, p in plan.items()}
    assert fitting
    for layer, layout in layouts(8).items():  # against NumPy
        asked = [np.unique(part) for part in np.split(ids[layer], 8)]
        places = layout.logical_order()
        owners = [places[rows] // layout.rows_per_shard for rows in asked]
        assert need[layer].pair == max(np.bincount(o).max() for o in owners)
        every = places[np.unique(ids[layer])] // layout.rows_per_shard
        assert need[layer].owner == np.bincount(every).max()
    plan, fitting, excess = make_plan(ids, need)
    assert fitting and set(excess.values()) == {0}
    for place in ("pair", "owner"):
        tight = need["0"]._replace(**{place: getattr(need["0"], place) - 2})
        _, fitting, excess = make_plan(ids, {**need, "0": tight})
        assert not fitting and excess == {"0": 2, "2": 0}


def test_an_exact_fit_loses_nothing(rng):
    ids = id_batches()["zipf"]
    need = {la: Capacity(int(p.need.pair), int(p.need.owner)) for la, p in make_plan(ids)[0].items()}
    tables = {layer: rng.normal(size=(sum(heads), WIDTH)).astype(np.float32) for layer, heads in HEADS.items()}
    grads = {layer: rng.normal(size=(8, 6, 4, WIDTH)).astype(np.float32) for layer in HEADS}
    _, seen, summed = through_the_mesh((8, 1), ids, tables, grads, need)
    _, _, roomy = through_the_mesh((8, 1), ids, tables, grads)
    for layer in HEADS:
        np.testing.assert_array_equal(seen[layer], tables[layer][ids[layer]])
    jax.tree.map(np.testing.assert_array_equal, summed, roomy)  # the shapes change no bit


@pytest.mark.parametrize("shape", [None, (2, 4)], ids=str)
@pytest.mark.parametrize("wrong", [-1, 53, 2**31 - 1])
def test_an_id_outside_its_head_is_named(shape, wrong):
    ids = id_batches()["uniform"]
    ids["2"][6, 2, 1] = wrong  # head 1 of layer 2 is rows 61..127
    ids["2"][7, 0, 3] = wrong
    plan, _, _ = make_plan(ids, shape=shape)
    with pytest.raises(RowIdError, match=r"Layer 2, head 1, sequence 6, position 2"):
        check(plan)


def test_an_id_outside_its_head_reads_zero_and_writes_nothing():
    ids = id_batches()["uniform"]
    ids["0"][3, 1, 2] = 5  # a row, but of head 0
    tables = {layer: np.ones((sum(heads), WIDTH), np.float32) for layer, heads in HEADS.items()}
    grads = {layer: np.zeros((8, 6, 4, WIDTH), np.float32) for layer in HEADS}
    grads["0"][3, 1, 2] = 1
    for shape in (None, (2, 4)):
        _, seen, summed = through_the_mesh(shape, ids, tables, grads)
        assert (seen["0"] == 0).sum() == WIDTH and not seen["0"][3, 1, 2].any()
        assert not summed["0"].any()


def test_a_damaged_request_is_counted(monkeypatch):
    honest = routing._exchange

    def damaging(blocks, sizes, transport, axes):
        arrived = honest(blocks, sizes, transport, axes)
        return {layer: x.at[0].set(10**6) if layer == "2" else x for layer, x in arrived.items()}

    monkeypatch.setattr(routing, "_exchange", damaging)
    planned.clear_cache()
    plan, _, _ = make_plan(id_batches()["uniform"])
    planned.clear_cache()
    from_first = np.asarray(plan["2"].routes.arrived_S).reshape(8, 8)[:, 0]  # what device 0 asked of each owner
    hit = int((from_first > 0).sum())
    assert hit > 4
    with pytest.raises(RowIdError, match=rf"Layer 2: {hit} row requests arrived outside"):
        check(plan)


def test_a_mesh_or_batch_that_does_not_fit_is_refused():
    ids = id_batches()["uniform"]
    with on_mesh((2, 2)) as (_, put), pytest.raises(ConfigError, match=r"layer 0 is cut into 8 shards.*4 devices"):
        routing.plan_rows({layer: put(x) for layer, x in ids.items()}, layouts(8))
    short = {layer: x[:6] for layer, x in ids.items()}
    with on_mesh((2, 2)) as _, pytest.raises(ConfigError, match="6 sequences does not divide over 4 devices"):
        routing.plan_rows({layer: jnp.asarray(x) for layer, x in short.items()}, layouts(4))


def test_no_array_of_a_plan_grows_with_the_table():
    def sizes(rows):
        layout = {"0": TableLayout((rows,) * 4, 8)}
        with on_mesh((8, 1)) as (_, put):
            ids = {"0": put(np.zeros((8, 6, 4), np.int32))}
            plan = jax.eval_shape(lambda ids: routing.plan_rows(ids, layout), ids)
        return [x.shape for x in jax.tree.leaves(plan)]

    assert sizes(10_007) == sizes(1_000_003)
