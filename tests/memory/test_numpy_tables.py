"""Tables in NumPy arrays and files train like tables on devices, whether or not rows are read ahead."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engram_jax.config import ConfigError, EngramConfig
from engram_jax.memory import chunks, numpy_tables
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.placements import DevicePlacement, NumpyPlacement, numpy_arrays
from engram_jax.memory.plan import fits
from engram_jax.memory.row_carrier import RowCarrier
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableState
from engram_jax.sharding import lookups, make_mesh

pytestmark = pytest.mark.newest

V, B, T, STEPS = 500, 8, 24, 20
CONFIG = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=4, engram_vocab_size=(230, 410))


def make(mesh, placement, row_dtype="float32"):
    """The store, and the context to use it in."""
    shards = mesh[0] * mesh[1] if mesh else 1
    optimizer = CatchUpAdam(np.full(200, 1e-2))
    store = MemoryStore.create(
        CONFIG, TokenMap.identity(V), optimizer, placement=placement, shards=shards, init_std=0.5, row_dtype=row_dtype
    )
    context = jax.set_mesh(make_mesh(*mesh, jax.devices()[:shards])) if mesh else contextlib.nullcontext()
    return store, context


def batch(step):
    """Zipfian tokens [B, T], and weights for the gradients of their rows."""
    rng = np.random.default_rng(step)
    tokens = np.minimum(rng.zipf(1.3, (B, T)), V - 1).astype(np.int32)
    return placed(tokens), placed(rng.normal(size=(B, T, 4, 4)).astype(np.float32))


def placed(x):
    mesh = jax.sharding.get_mesh()
    return jnp.asarray(x) if mesh.empty else jax.device_put(x, jax.NamedSharding(mesh, lookups(np.ndim(x))))


def placed_on_all(x):
    mesh = jax.sharding.get_mesh()
    return jax.device_put(x, jax.devices()[0] if mesh.empty else jax.NamedSharding(mesh, jax.P()))


def make_step(store):
    """As in training: whatever lies on devices is in `memory`, and the batch's rows come in from numpy_tables."""

    def step(memory, plan, held, weights, k):
        rows = store.rows(held, plan, k)
        grads = store.reduce(plan, {layer: jnp.sin(rows[layer]) * weights for layer in rows})
        held = store.advance(held, plan, grads, k)
        return store.save(memory, plan, held), held, rows

    return jax.jit(step, donate_argnums=(0, 2))


@functools.cache
def compiled(mesh, row_dtype="float32"):
    """Planning, and the step without tables: both the same for all placements outside the program."""
    store, _ = make(mesh, NumpyPlacement(), row_dtype)
    return jax.jit(store.plan), make_step(store)


def host(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def joined(tables):
    """Tables outside the program, their shards one after the other: copies, in the form of tables on devices."""
    return {la: jax.tree.map(lambda *parts: np.concatenate(parts), *shards) for la, shards in tables.items()}


@functools.cache
def on_devices(mesh, row_dtype="float32"):
    """What every other placement must reproduce: rows seen in each step, tables, rows used, materialized tables."""
    store, context = make(mesh, DevicePlacement(), row_dtype)
    seen = []
    with context:
        memory, (plan_of, _) = store.init(jax.random.key(0)), compiled(mesh)
        step, load = make_step(store), jax.jit(store.load)
        for k in range(STEPS):
            tokens, weights = batch(k)
            plan = plan_of(tokens)
            memory, _, rows = step(memory, plan, load(memory, plan), weights, jnp.int32(k))
            seen.append(host(rows))
        return seen, host(memory.tables), host(memory.rows_used), host(jax.jit(store.materialize)(memory, STEPS))


def from_outside(mesh, placement=NumpyPlacement(), row_dtype="float32", reads_ahead=True):
    store, context = make(mesh, placement, row_dtype)
    seen = []
    with context, contextlib.closing(RowCarrier(store, reads_ahead)) as carrier:
        memory, (plan_of, step) = store.init(jax.random.key(0)), compiled(mesh, row_dtype)
        tables, inside = memory.tables, MemoryState({}, jax.tree.map(placed_on_all, memory.rows_used))
        plans = [plan_of(batch(k)[0]) for k in range(STEPS + 1)]
        assert all(fits(plan) for plan in plans)
        for k in range(STEPS):
            held = carrier.load(tables, plans[k])
            carrier.read_ahead(tables, plans[k + 1])
            inside, held, rows = step(inside, plans[k], held, batch(k)[1], jnp.int32(k))
            carrier.save(tables, plans[k], held)
            seen.append(host(rows))
        carrier.settle()
        assert inside.tables == {}
        assert step._cache_size() == 1  # rows that were patched and rows that were not are one type
        whole = store.materialize(MemoryState(tables, inside.rows_used), STEPS)
        return seen, joined(tables), host(inside.rows_used), whole


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("mesh", [None, pytest.param((1, 1), marks=pytest.mark.slow), (2, 4)])
def test_twenty_steps_equal_tables_on_devices_bit_for_bit(mesh):
    assert_same(from_outside(mesh), on_devices(mesh))


def test_bfloat16_rows_equal_tables_on_devices_bit_for_bit():
    result = from_outside(None, row_dtype="bfloat16")
    assert result[1]["0"].rows.dtype == ml_dtypes.bfloat16
    *bits, whole = on_devices(None, "bfloat16")
    assert_same(list(result[:-1]), bits)
    # Rows as of now are made of equal bits by two programs; jax 0.10's other emitters (tests/conftest.py) round apart.
    rounding = {"rtol": 2**-23, "atol": 1e-7} if "fusion_emitters=false" in os.environ["XLA_FLAGS"] else {"rtol": 0}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **rounding), result[-1], whole)


@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.slow), (2, 4)])
def test_reading_ahead_and_files_change_no_bit(mesh, tmp_path):
    assert_same(from_outside(mesh, reads_ahead=False), on_devices(mesh))
    assert_same(from_outside(mesh, NumpyPlacement(str(tmp_path))), on_devices(mesh))
    with make(mesh, NumpyPlacement())[1]:
        ids = [np.asarray(compiled(mesh)[0](batch(k)[0])["0"].ids_BTH) for k in range(2)]
    assert len(np.intersect1d(*ids)) > 50  # so what is read ahead is stale


def test_the_next_batch_is_gathered_before_this_one_is_written(monkeypatch):
    order = []
    for verb in ("load", "save"):

        def noted(store, tables, plan, *held, verb=verb, original=getattr(numpy_tables, verb)):
            if tables:
                order.append((verb, int(plan["0"].ids_BTH[0, 0, 0])))
            return original(store, tables, plan, *held)

        monkeypatch.setattr(numpy_tables, verb, noted)
    store, _ = make(None, NumpyPlacement())
    tables = store.init(jax.random.key(0)).tables
    plans = [compiled(None)[0](jnp.full((1, 1), k, jnp.int32)) for k in range(4)]
    ids = [int(plan["0"].ids_BTH[0, 0, 0]) for plan in plans]
    for reads_ahead in (True, False):
        order.clear()
        with contextlib.closing(RowCarrier(store, reads_ahead)) as carrier:
            for k in range(3):
                held = carrier.load(tables, plans[k])
                carrier.read_ahead(tables, plans[k + 1])
                carrier.save(tables, plans[k], held)
            carrier.settle()
        ahead = [("load", 0), ("load", 1), ("save", 0), ("load", 2), ("save", 1), ("load", 3), ("save", 2)]
        after = [("load", 0), ("save", 0), ("load", 1), ("save", 1), ("load", 2), ("save", 2)]
        assert order == [(verb, ids[k]) for verb, k in (ahead if reads_ahead else after)]


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_first_rows_made_in_chunks_equal_those_on_devices(mesh, monkeypatch):
    store, context = make(mesh, DevicePlacement())
    with context:
        expected = host(store.init(jax.random.key(3)).tables)
        monkeypatch.setattr(chunks, "CHUNK_ROWS", 72)
        assert store.layouts["0"].rows_per_shard % 72
        assert_same(joined(make(mesh, NumpyPlacement())[0].init(jax.random.key(3)).tables), expected)


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_chunks_go_out_and_in_and_end_with_the_shard(mesh):
    store, context = make(mesh, NumpyPlacement())
    with context:
        table, copy = store.init(jax.random.key(1)).tables["2"], store.allocate()["2"]
        rows = store.layouts["2"].rows_per_shard
        for start in range(0, rows, 40):
            chunk = chunks.chunk_reader(store, 40)(table, start)
            assert chunks.chunk_writer(store, "2")(copy, start, chunk) is copy
            here = min(40, rows - start)
            of_shards = np.stack([shard.rows[start : start + here] for shard in table])
            np.testing.assert_array_equal(np.asarray(chunk.rows).reshape(store.shards, 40, 4)[:, :here], of_shards)
            assert not np.any(np.asarray(chunk.rows).reshape(store.shards, 40, 4)[:, here:])
        assert rows % 40
        assert_same(copy, table)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_take_and_put_equal_numpy_and_pass_over_ids_beyond_the_end(dtype):
    rows, count = 30_000, 10_000  # several threads' parts
    rng = np.random.default_rng(0)
    table = TableState(
        rng.normal(size=(rows, 3)).astype(dtype),
        {"m": rng.normal(size=(rows, 2, 2)).astype(np.float32), "last_step": rng.integers(0, 9, rows).astype(np.int32)},
        rng.integers(0, 9, rows).astype(np.int32),
    )
    ids = np.sort(rng.choice(rows, count, replace=False)).astype(np.int32)
    ids = np.concatenate([ids, rows + np.arange(500, dtype=np.int32)])
    placement = NumpyPlacement()
    taken = placement.take(table, ids)
    for array, out in zip(jax.tree.leaves(table), jax.tree.leaves(taken), strict=True):
        np.testing.assert_array_equal(out[:count], array[ids[:count]])
        assert out.shape[0] == count + 500 and not np.any(out[count:])

    expected = host(table)
    batch = jax.tree.map(lambda x: (x + 1).astype(x.dtype), taken)
    for array, new in zip(jax.tree.leaves(expected), jax.tree.leaves(batch), strict=True):
        array[ids[:count]] = new[:count]
    assert placement.put(table, ids, batch) is table
    assert_same(table, expected)
    placement.put(table, ids[count:], jax.tree.map(lambda x: x[count:], batch))
    assert_same(table, expected)
    assert not np.any(placement.take(table, ids[count:]).rows)


def test_ids_that_are_no_rows_read_as_zero_and_write_nothing():
    store, _ = make(None, NumpyPlacement())
    state = store.init(jax.random.key(0))
    before = joined(state.tables)
    plan = jax.jit(store.plan_ids)({la: jnp.full((1, 2, 4), 10**6, jnp.int32) for la in store.layers})
    held = store.load(state, plan)
    assert not any(np.any(x) for x in jax.tree.leaves(held))
    written = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), held)
    new = store.save(state, plan, jax.device_put(written, jax.devices()[0]))
    assert_same(joined(new.tables), before)
    assert int(new.rows_used["0"]) == 0


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_an_all_padding_batch_leaves_what_the_model_sees(mesh):
    store, context = make(mesh, NumpyPlacement())
    with context:
        state = store.init(jax.random.key(0))
        before = store.materialize(state, 0)
        tokens, weights = placed(np.full((B, T), 2, np.int32)), placed(np.zeros((B, T, 4, 4), np.float32))
        plan_of, step = compiled(mesh)
        plan = plan_of(tokens, placed(np.zeros((B, T), np.int32)))
        inside, held, _ = step(MemoryState({}, state.rows_used), plan, store.load(state, plan), weights, jnp.int32(0))
        numpy_tables.save(store, state.tables, plan, held)
        assert_same(store.materialize(state, 1), before)
        assert int(np.sum(joined(state.tables)["0"].uses)) == int(inside.rows_used["0"]) > 0


def test_update_and_fetch_outside_a_loop_write_in_place():
    store, _ = make(None, NumpyPlacement())
    state = store.init(jax.random.key(0))
    rows_RD, before = state.tables["0"][0].rows, state.tables["0"][0].rows.copy()
    plan = compiled(None)[0](batch(0)[0])
    grads = store.reduce(plan, {layer: batch(0)[1] for layer in plan})
    new = store.update(state, plan, grads, 0)
    assert new.tables["0"][0].rows is rows_RD
    touched = np.unique(plan["0"].ids_BTH)
    np.testing.assert_array_equal(np.flatnonzero(np.any(rows_RD != before, axis=1)), touched)
    np.testing.assert_array_equal(np.flatnonzero(new.tables["0"][0].uses), touched)
    np.testing.assert_array_equal(store.fetch(new, plan, 1)["0"], rows_RD[np.asarray(plan["0"].ids_BTH)])


@pytest.mark.parametrize("verb", ["take", "put"])
def test_what_the_thread_raises_reaches_the_training_thread(verb, monkeypatch):
    store, _ = make(None, NumpyPlacement())
    tables = store.init(jax.random.key(0)).tables
    plans = [compiled(None)[0](batch(k)[0]) for k in range(2)]
    with contextlib.closing(RowCarrier(store, True)) as carrier:
        held = carrier.load(tables, plans[0])

        def broken(*_):
            raise OSError("the disk is gone")

        monkeypatch.setattr(NumpyPlacement, verb, broken)
        carrier.read_ahead(tables, plans[1])
        carrier.save(tables, plans[0], held)
        if verb == "put":
            for _ in range(2):  # again and again, so that nothing is saved as if all were well
                with pytest.raises(OSError, match="the disk is gone") as raised:
                    carrier.settle()
                assert "last checkpoint" in raised.value.__notes__[0]
        with pytest.raises(OSError, match="the disk is gone"):
            carrier.load(tables, plans[1])


def test_too_little_room_is_refused_before_anything_is_allocated(monkeypatch, tmp_path):
    store, _ = make(None, NumpyPlacement())
    row_bytes = 4 * 4 * 3 + 4 + 4
    needed = sum(layout.num_rows for layout in store.layouts.values()) * row_bytes
    monkeypatch.setattr(numpy_arrays, "available_host_bytes", lambda: needed)
    store.allocate()
    monkeypatch.setattr(numpy_arrays, "available_host_bytes", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"needs 0\.00 GB .* 0\.00 GB are available: set memory\.mmap_dir"):
        store.allocate()
    on_disk, _ = make(None, NumpyPlacement(str(tmp_path)))
    on_disk.allocate()
    files = sorted(tmp_path.rglob("*.bin"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ConfigError, match=r"memory\.mmap_dir=.* room for 0\.00 GB.* take 0\.00 GB: name a folder on a"):
        on_disk.allocate()
    assert sorted(tmp_path.rglob("*.bin")) == files


def test_available_host_bytes_is_what_the_kernel_says():
    available = numpy_arrays.available_host_bytes()
    if sys.platform == "linux":
        assert available is not None and 0 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_files_are_sparse_made_anew_and_of_one_run_only(tmp_path):
    store, _ = make(None, NumpyPlacement(str(tmp_path)))
    tables = store.init(jax.random.key(0)).tables
    folder = tmp_path / "process-0" / "layer-2"
    names = {f"{name}.bin" for name in ("rows", "slots.m", "slots.v", "slots.last_step", "uses")}
    assert {file.name for file in folder.iterdir()} == names
    assert (folder / "rows.bin").read_bytes() == tables["2"][0].rows.tobytes()
    assert (folder / "slots.m.bin").stat().st_blocks == 0 < (folder / "rows.bin").stat().st_blocks
    with pytest.raises(ConfigError, match=rf"mmap_dir={tmp_path} holds the tables .* \(process {os.getpid()}\)"):
        store.allocate()
    held_by_one_array = tables["2"][0].uses
    del tables
    with pytest.raises(ConfigError, match="name another folder"):
        store.allocate()
    del held_by_one_array
    assert not np.any(store.allocate()["2"][0].rows)


def test_a_folder_is_locked_against_other_processes_too(tmp_path):
    numpy_arrays._FolderLock(tmp_path / "free")
    lock = numpy_arrays._FolderLock(tmp_path / "taken")
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    run = [sys.executable, "-c", code]
    assert subprocess.run([*run, tmp_path / "free" / "lock"], capture_output=True).returncode == 0
    assert b"BlockingIOError" in subprocess.run([*run, tmp_path / "taken" / "lock"], capture_output=True).stderr
    del lock


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    store, _ = make(None, NumpyPlacement(str(tmp_path / "file")))
    with pytest.raises(ConfigError, match=r"memory\.mmap_dir=.*file.*Choose a folder"):
        store.allocate()
