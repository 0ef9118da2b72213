"""Tables in two tiers against NumPy and against tables on the device: every bit, and who is hot when.

As a program it compiles for TPUs that are not there (tpu_aot.py): python tests/memory/test_tiered.py v5p:2x2x2 bfloat16
"""

import functools
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_aot import BATCH, ROWS, WIDTH, memory, run_apart, topology_mesh

from engram_jax.config import ConfigError, EngramConfig, MemoryConfig
from engram_jax.memory import table_files
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.placements import PLACEMENTS, DevicePlacement, HostPlacement, TieredPlacement, host, tiered
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryState, MemoryStore
from engram_jax.memory.table import TableState
from engram_jax.sharding import make_mesh
from engram_jax.training.table_checkpoint import restore_tables, save_tables

pytestmark = pytest.mark.newest

R, U, D = 64, 24, 6
SHARDED = jax.P(("data", "fsdp"))
CASES = [(0.001, False, "float32"), (0.2, True, "bfloat16"), (0.2, False, "float32"), (1.0, True, "float32")]
"""Share of the rows that are hot (8 of 64, 16, all; a batch has 24), whether lines of the hot ones pack several, dtype.
"""


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """A batch of 24 rows crosses in up to five rounds, the last of them not full."""
    monkeypatch.setattr(tiered, "ROUND_ROWS", 5)


@pytest.fixture(params=[(1, 1), (4, 2)], ids=["1 device", "8 devices"])
def mesh(request):
    data, fsdp = request.param
    mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with jax.set_mesh(mesh):
        yield mesh


def on_shards(function):
    return jax.shard_map(function, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)


def one_row(row_dtype="float32", width=D):
    row = jax.ShapeDtypeStruct
    slots = {"m": row((1, width), "float32"), "last_step": row((1,), "int32")}
    return TableState(row((1, width), row_dtype), slots, row((1,), "int32"))


@functools.cache
def compiled(mesh, share, packs_rows=False, row_dtype="float32", rows=R):
    """The jitted functions of a placement's table."""
    placement = TieredPlacement(share, DevicePlacement(packs_rows), HostPlacement())
    new = on_shards(lambda: placement.allocate(rows, one_row(row_dtype)))
    at_rest = placement.at_rest(mesh, jax.eval_shape(new))
    return SimpleNamespace(
        new=jax.jit(new, out_shardings=at_rest),
        take=jax.jit(on_shards(placement.take)),
        put=jax.jit(on_shards(placement.put), donate_argnums=0, out_shardings=at_rest),
        promote=jax.jit(on_shards(placement.promote), donate_argnums=0, out_shardings=at_rest),
        hit_rate=jax.jit(on_shards(lambda table, ids: placement.hit_rate(table, ids)[None])),
    )


def send(mesh, tree):
    """[S, count, ...] -> sharded [S * count, ...]."""
    sharding = jax.NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda x: jax.device_put(np.reshape(x, (-1, *x.shape[2:])), sharding), tree)


def random_ids(mesh, rng, beyond):
    """[S, U] ascending and distinct on each shard, the last `beyond` of them no rows of it."""
    ids = [np.sort(rng.choice(R, U - beyond, replace=False)) for _ in range(mesh.size)]
    return np.concatenate([np.array(ids), np.tile(R + np.arange(beyond), (mesh.size, 1))], axis=1).astype(np.int32)


def random_rows(mesh, rng, row_dtype="float32", count=U):
    def values(leaf):
        return (8 * rng.standard_normal((mesh.size, count, *leaf.shape[1:]))).astype(leaf.dtype)

    rows = jax.tree.map(values, one_row(row_dtype))
    return TableState(rows.rows, rows.slots, rng.integers(0, 9, rows.uses.shape).astype(np.int32))


def assert_same_bits(got, expected):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(g).reshape(e.shape).view(np.uint8), e.view(np.uint8))


def hot_ids(mesh, table):
    return np.asarray(table.hot_ids).reshape(mesh.size, -1)


@pytest.mark.parametrize(("share", "packs_rows", "row_dtype"), CASES)
def test_reads_and_writes_the_rows_asked_for(mesh, share, packs_rows, row_dtype):
    rng = np.random.default_rng(0)
    on = compiled(mesh, share, packs_rows, row_dtype)
    table = on.new()
    # The oracle has as many rows more as a batch: those beyond the table's end, which stay zero.
    expected = jax.tree.map(lambda x: np.zeros((mesh.size, R + U, *x.shape[1:]), x.dtype), one_row(row_dtype))
    shards = np.arange(mesh.size)[:, None]
    everything = np.tile(np.arange(R, dtype=np.int32), (mesh.size, 1))
    hot_before = set()
    for beyond in (3, 0, U, 20):
        ids, new = random_ids(mesh, rng, beyond), random_rows(mesh, rng, row_dtype)
        table = on.put(table, send(mesh, ids), send(mesh, new))
        for array, rows in zip(jax.tree.leaves(expected), jax.tree.leaves(new), strict=True):
            array[shards, ids[:, : U - beyond]] = rows[:, : U - beyond]
        assert_same_bits(on.take(table, send(mesh, everything)), jax.tree.map(lambda x: x[:, :R].copy(), expected))
        hot_before.add(hot_ids(mesh, table).tobytes())
        table = on.promote(table, send(mesh, ids))
        assert_same_bits(on.take(table, send(mesh, everything)), jax.tree.map(lambda x: x[:, :R].copy(), expected))
        ids = random_ids(mesh, rng, beyond)
        assert_same_bits(on.take(table, send(mesh, ids)), jax.tree.map(lambda x, ids=ids: x[shards, ids], expected))
    assert len(hot_before) > 1 or share == 1.0


def expected_uses(uses_R, hot, ids):
    """Uses of the hot rows after an exchange, ascending, and how many rows came."""
    best = np.sort(uses_R[np.setdiff1d(ids, hot)])[::-1]
    least = np.sort(uses_R[hot])
    count = min(len(best), len(least))
    better = best[:count] > least[:count]
    return np.sort(np.where(better, best[:count], least[:count]).tolist() + least[count:].tolist()), better.sum()


@pytest.mark.parametrize(("share", "packs_rows", "row_dtype"), CASES)
def test_promotes_the_rows_used_most_for_those_used_least(mesh, share, packs_rows, row_dtype):
    rng = np.random.default_rng(1)
    on = compiled(mesh, share, packs_rows, row_dtype)
    every = np.tile(np.arange(R, dtype=np.int32), (mesh.size, 1))
    table = on.put(on.new(), send(mesh, every), send(mesh, random_rows(mesh, rng, row_dtype, count=R)))
    uses = np.asarray(on.take(table, send(mesh, every)).uses).reshape(mesh.size, R)
    moved = 0
    for beyond in (3, U, 0, 1):
        ids, before = random_ids(mesh, rng, beyond), hot_ids(mesh, table)
        rates = on.hit_rate(table, send(mesh, ids))
        table = on.promote(table, send(mesh, ids))
        after = hot_ids(mesh, table)
        for shard in range(mesh.size):
            rows = ids[shard, : U - beyond]
            expected, count = expected_uses(uses[shard], before[shard], rows)
            assert (np.diff(after[shard]) > 0).all() and after[shard].shape == before[shard].shape
            came = np.setdiff1d(after[shard], before[shard])
            assert len(came) == count and np.isin(came, rows).all()
            np.testing.assert_array_equal(np.sort(uses[shard, after[shard]]), expected)
            rate = np.mean(np.isin(rows, before[shard]), dtype=np.float32) if len(rows) else np.float32(np.nan)
            np.testing.assert_array_equal(rates[shard], rate)
            moved += count
        places = np.sort(np.asarray(table.hot_places).reshape(mesh.size, -1))
        np.testing.assert_array_equal(places, np.tile(np.arange(places.shape[1]), (mesh.size, 1)))
    assert moved > 0 or share == 1.0


def zipf_batches(rng, count, lookups, rows):
    """Distinct rows of each batch, padded: what is asked for how often is spread over the table as a hash does it."""
    spread = rng.permutation(rows)
    for _ in range(count):
        ids = np.unique(spread[(rng.zipf(1.2, lookups) - 1) % rows])
        beyond = rows + np.arange(lookups - len(ids))
        yield np.concatenate([ids, beyond]).astype(np.int32), len(ids)


def test_how_soon_zipfian_rows_are_hot():
    """Distinct rows of a batch found hot, of 20,000 rows a tenth hot, 1,000 lookups a batch, exchanged every 5."""
    rows, lookups, every = 20_000, 1_000, 5
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        on = compiled(mesh, 0.1, rows=rows)
        table, rates, best, counts = on.new(), [], [], np.zeros(rows, int)
        for k, (ids, real) in enumerate(zipf_batches(np.random.default_rng(2), 60, lookups, rows)):
            rates.append(float(on.hit_rate(table, ids)[0]))
            best.append(np.mean(np.isin(ids[:real], np.argsort(-counts, stable=True)[:2000])))
            held = on.take(table, ids)
            table = on.put(table, ids, TableState(held.rows, held.slots, held.uses + 1))
            counts[ids[:real]] += 1
            if (k + 1) % every == 0:
                table = on.promote(table, ids)
        print([round(float(r), 2) for r in rates[::every]], [round(float(r), 2) for r in best[::every]])
        print([round(float(r), 2) for r in rates[-5:]], [round(float(r), 2) for r in best[-5:]])
