"""Tables in host memory against NumPy, on one device and on eight: what is read, what is written, where it lies."""

import importlib.util
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tpu_aot import BATCH, ROWS, WIDTH, compile_apart

from engram_jax.config import ConfigError
from engram_jax.memory.placements import host
from engram_jax.memory.placements.host import HostPlacement, HostTable, check_room
from engram_jax.memory.table import TableState
from engram_jax.sharding import MESH_AXES, make_mesh

pytestmark = pytest.mark.newest

R, U, D = 64, 16, 6
SHARDED = jax.P(MESH_AXES)
PLACEMENT = HostPlacement()
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


@pytest.fixture(params=[pytest.param((1, 1), marks=pytest.mark.slow), (4, 2)], ids=["1 device", "8 devices"])
def mesh(request):
    data, fsdp = request.param
    mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with jax.set_mesh(mesh):
        yield mesh


def one_row(row_dtype: str) -> TableState:
    """Shapes and dtypes of a row: wide and single numbers, floats and integers."""
    row = jax.ShapeDtypeStruct
    slots = {"m": row((1, D), "float32"), "last_step": row((1,), "int32"), "scale": row((1,), "float32")}
    return TableState(row((1, D), row_dtype), slots, row((1,), "int32"))


def on_shards(function):
    return jax.shard_map(function, in_specs=SHARDED, out_specs=SHARDED)


def allocate(mesh, row_dtype: str) -> tuple[HostTable, HostTable]:
    """A table of zeros and what `out_shardings` must say of it."""
    new = on_shards(lambda: PLACEMENT.allocate(R, one_row(row_dtype)))
    at_rest = PLACEMENT.at_rest(mesh, jax.eval_shape(new))
    return jax.jit(new, out_shardings=at_rest)(), at_rest


def random_ids(mesh, rng: np.random.Generator, beyond: int = 3) -> np.ndarray:
    """[S, U] ascending and distinct on each shard, the last `beyond` of them no rows of it."""
    ids = [np.sort(rng.choice(R, U - beyond, replace=False)) for _ in range(mesh.size)]
    return np.concatenate([np.array(ids), np.tile(R + np.arange(beyond), (mesh.size, 1))], axis=1).astype(np.int32)


def random_rows(mesh, rng: np.random.Generator, row_dtype: str, count: int = U) -> TableState:
    """NumPy arrays [S, count, ...]."""

    def values(leaf):
        return (8 * rng.standard_normal((mesh.size, count, *leaf.shape[1:]))).astype(leaf.dtype)

    return jax.tree.map(values, one_row(row_dtype))


def send(mesh, tree):
    """[S, count, ...] -> sharded [S * count, ...] in device memory."""
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda x: jax.device_put(x.reshape(-1, *x.shape[2:]), sharding), tree)


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def assert_same_bits(got, expected):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype
        np.testing.assert_array_equal(bits(np.asarray(g).reshape(e.shape)), bits(e))


def pointers(tree) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards]


def memory_kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def shard_bytes(mesh, tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree)) // mesh.size


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_reads_and_writes_the_rows_asked_for(mesh, row_dtype):
    rng = np.random.default_rng(0)
    table, at_rest = allocate(mesh, row_dtype)
    assert memory_kinds(table) == {"pinned_host"}
    take = jax.jit(on_shards(PLACEMENT.take))
    put = jax.jit(on_shards(PLACEMENT.put), donate_argnums=0, out_shardings=at_rest)
    # The oracle has three rows more than the table: those beyond its end, which stay zero.
    expected = jax.tree.map(lambda x: np.zeros((mesh.size, R + 3, *x.shape[1:]), x.dtype), one_row(row_dtype))
    shards = np.arange(mesh.size)[:, None]
    everything = np.tile(np.arange(R, dtype=np.int32), (mesh.size, 1))

    for _ in range(3):
        ids, new = random_ids(mesh, rng), random_rows(mesh, rng, row_dtype)
        table = put(table, send(mesh, ids), send(mesh, new))
        for array, rows in zip(jax.tree.leaves(expected), jax.tree.leaves(new), strict=True):
            array[shards, ids[:, :-3]] = rows[:, :-3]
        assert memory_kinds(table) == {"pinned_host"}
        assert_same_bits(take(table, send(mesh, everything)), jax.tree.map(lambda x: x[:, :R], expected))

        ids = random_ids(mesh, rng)
        got = take(table, send(mesh, ids))
        assert memory_kinds(got) == {"device"}
        assert_same_bits(got, jax.tree.map(lambda x, ids=ids: x[shards, ids], expected))


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_writes_a_donated_table_in_place(mesh, row_dtype):
    rng = np.random.default_rng(1)
    table, at_rest = allocate(mesh, row_dtype)
    ids, new = send(mesh, random_ids(mesh, rng)), send(mesh, random_rows(mesh, rng, row_dtype))
    put = jax.jit(on_shards(PLACEMENT.put), donate_argnums=0, out_shardings=at_rest).lower(table, ids, new).compile()
    memory = put.memory_analysis()
    assert memory.alias_size_in_bytes == shard_bytes(mesh, table)
    assert memory.temp_size_in_bytes <= 2 * shard_bytes(mesh, new) < shard_bytes(mesh, table)
    before = pointers(table)
    written = put(table, ids, new)
    assert pointers(written) == before
    assert all(x.is_deleted() for x in jax.tree.leaves(table))


def test_without_donation_the_old_table_stays(mesh):
    rng = np.random.default_rng(2)
    table, _ = allocate(mesh, "float32")
    ids, new = send(mesh, random_ids(mesh, rng)), send(mesh, random_rows(mesh, rng, "float32"))
    written = jax.jit(on_shards(PLACEMENT.put))(table, ids, new)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(table))
    assert np.asarray(written.bits.rows).any()
    assert memory_kinds(written) == {"pinned_host"}


@pytest.mark.usefixtures("emitted_as_for_users")
def test_one_program_reads_the_next_rows_and_writes_the_last(mesh):
    """Prefetching: the rows read are those before the write, and the table is not copied for it."""
    rng = np.random.default_rng(3)
    table, at_rest = allocate(mesh, "float32")
    put = jax.jit(on_shards(PLACEMENT.put), donate_argnums=0, out_shardings=at_rest)
    first_ids, first = random_ids(mesh, rng), random_rows(mesh, rng, "float32")
    table = put(table, send(mesh, first_ids), send(mesh, first))

    def step(table, ids, new, next_ids):
        early = on_shards(PLACEMENT.take)(table, next_ids)
        ids, early = jax.lax.optimization_barrier((ids, early))
        return on_shards(PLACEMENT.put)(table, ids, new), early

    second = random_rows(mesh, rng, "float32")
    device = jax.tree.map(lambda x: x.sharding, send(mesh, first))
    arguments = send(mesh, (first_ids, second, first_ids))
    program = jax.jit(step, donate_argnums=0, out_shardings=(at_rest, device)).lower(table, *arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < shard_bytes(mesh, table)
    before = pointers(table)
    table, early = program(table, *arguments)
    assert pointers(table) == before
    late = jax.jit(on_shards(PLACEMENT.take))(table, send(mesh, first_ids))
    for got, rows in ((early, first), (late, second)):
        got = jax.tree.map(lambda x, like: np.asarray(x).reshape(like.shape)[:, :-3], got, rows)
        assert_same_bits(got, jax.tree.map(lambda x: x[:, :-3], rows))


def test_a_loop_carries_the_table_without_copies(mesh):
    table, at_rest = allocate(mesh, "bfloat16")

    def fill(table):
        def chunk(i, table):
            ids = i * U + jnp.arange(U, dtype=jnp.int32)
            rows = jax.tree.map(
                lambda x: jnp.broadcast_to(ids.reshape(-1, *[1] * (x.ndim - 1)), (U, *x.shape[1:])).astype(x.dtype),
                one_row("bfloat16"),
            )
            return PLACEMENT.put(table, ids, rows)

        return jax.lax.fori_loop(0, R // U, chunk, table)

    fill = partial(jax.shard_map, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)(fill)
    program = jax.jit(fill, donate_argnums=0, out_shardings=at_rest).lower(table).compile()
    assert program.memory_analysis().temp_size_in_bytes < shard_bytes(mesh, table)
    table = program(table)
    np.testing.assert_array_equal(table.bits.uses, np.tile(np.arange(R), mesh.size))
    rows = np.asarray(table.bits.rows).view(jnp.bfloat16)
    np.testing.assert_array_equal(rows, np.tile(np.arange(R)[:, None], (mesh.size, D)).astype(jnp.bfloat16))


def test_works_outside_a_mesh():
    table = jax.jit(lambda: PLACEMENT.allocate(R, one_row("bfloat16")))()
    assert memory_kinds(table) == {"pinned_host"}
    ids = jnp.array([1, 5, R], jnp.int32)
    rows = jax.tree.map(lambda x: jnp.full((3, *x.shape[1:]), 7, x.dtype), one_row("bfloat16"))
    table = jax.jit(PLACEMENT.put, donate_argnums=0)(table, ids, rows)
    assert memory_kinds(table) == {"pinned_host"}
    got = jax.jit(PLACEMENT.take)(table, jnp.array([0, 1, 5, R], jnp.int32))
    np.testing.assert_array_equal(got.uses, [0, 7, 7, 0])
    np.testing.assert_array_equal(got.rows, np.array([[0] * D, [7] * D, [7] * D, [0] * D], jnp.bfloat16))


def test_room_is_checked_before_anything_is_allocated(monkeypatch):
    check_room(3_000_000_000, available_bytes=3_000_000_000)
    with pytest.raises(ConfigError, match=r"need 5\.1 GB.*has 3\.0 GB.*lower engram_vocab_size"):
        check_room(5_100_000_000, available_bytes=3_000_000_000)
    with pytest.raises(ConfigError):
        check_room(2**60)
    monkeypatch.setattr(host, "available_host_bytes", lambda: None)
    check_room(2**60)


def test_available_memory(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = host.available_host_bytes()
    assert available is not None and 2**20 < available < total

    def no_such_file(*_, **__):
        raise FileNotFoundError

    def not_here(_):
        raise ValueError

    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    assert host.available_host_bytes() == 4_096_000
    monkeypatch.setattr(os, "sysconf", not_here)
    assert host.available_host_bytes() is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: jax[tpu]")
@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", ["v5p:2x2x2", "v6e:2x4"])
def test_compiled_for_tpus_no_table_leaves_the_host(topology, row_dtype):
    compiled = compile_apart(topology, row_dtype)
    table = ROWS * ((jnp.dtype(row_dtype).itemsize + 4 + 4) * WIDTH + 4 + 4)
    batch = BATCH * (3 * 128 + 2) * 4  # a row of 64 floats fills 128 lanes
    allocate, step, unstated = (compiled[name] for name in ("allocate", "step", "step, layout not stated"))
    assert allocate["host_output"] == table
    assert allocate["device_temp"] < 2**20
    assert step["host_argument"] == step["host_output"] == step["host_alias"] == table
    assert step["device_temp"] < 2 * batch < 0.02 * table
    assert allocate["host_temp"] == step["host_temp"] == 0
    assert allocate["tiled"] == step["tiled"] == []
    # The control: what `at_rest` is for.
    assert unstated["host_temp"] == table and unstated["tiled"]
