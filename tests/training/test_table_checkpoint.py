"""Tables through checkpoints: every bit on any mesh, within a chunk of memory, through kills, damage and refusals."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import CheckpointConfig, ConfigError, EngramConfig, OptimizerConfig, replace, to_dict
from engram_jax.memory import chunks, table_files
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table_files import ShardWriter
from engram_jax.memory.table_index import TableFileError
from engram_jax.registries import ROW_OPTIMIZERS
from engram_jax.runs import run_folder, table_checkpoint
from engram_jax.runs.checkpoint import UNFINISHED, Checkpoints
from engram_jax.runs.parts import assemble
from engram_jax.runs.state import TrainState
from engram_jax.runs.table_checkpoint import restore_tables, save_tables
from engram_jax.sharding import MESH_AXES, make_mesh

CONFIG = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=4, engram_vocab_size=(41, 67))
CHUNK = 800
"""Bytes of a chunk here: a shard has several."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(table_files, "CHUNK_BYTES", CHUNK)


def store_on(mesh, optimizer="catch_up_adam", config=CONFIG, **settings):
    rule = ROW_OPTIMIZERS[optimizer].create(OptimizerConfig(), np.full(9, 1e-2))
    return MemoryStore.create(config, TokenMap.identity(50), rule, shards=mesh.size, **settings)


def mesh_of(data, fsdp=1):
    return make_mesh(data, fsdp, jax.devices()[: data * fsdp])


def filled(store, mesh, seed):
    """Tables of arbitrary rows, the same logical ones on every mesh; padding is not zero."""
    rng = np.random.default_rng(seed)
    sharding = jax.NamedSharding(mesh, jax.P(MESH_AXES))
    tables = {}
    for layer, layout in store.layouts.items():

        def placed(like, layout=layout):
            values = rng.normal(size=(layout.num_rows, *like.shape[1:])) * 2.0 ** rng.integers(-9, 9)
            array = np.full((layout.shards * layout.rows_per_shard, *like.shape[1:]), 7, like.dtype)
            array[layout.logical_order()] = values.astype(like.dtype)
            array[layout.logical_order()[:2]] = -0.0
            return jax.device_put(array, sharding)

        tables[layer] = jax.tree.map(placed, store.row_shapes())
    return tables


def logical_bytes(store, tables):
    return {
        layer: jax.tree.map(lambda x, la=layer: store.layouts[la].to_logical(np.asarray(x)).tobytes(), table)
        for layer, table in tables.items()
    }


def types(tables):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape[1:]), tables)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("optimizer", "row_dtype"), [*((name, "float32") for name in ROW_OPTIMIZERS), ("catch_up_adam", "bfloat16")]
)
def test_there_and_back_over_other_meshes_keeps_every_bit(optimizer, row_dtype, tmp_path):
    mesh = mesh_of(8)
    store = store_on(mesh, optimizer, row_dtype=row_dtype)
    tables = filled(store, mesh, 1)
    first = logical_bytes(store, tables)
    assert set(tables["0"].slots) == set(store.optimizer.init(tables["0"].rows))
    for hop, shape in enumerate([(1,), (4,), (2, 4), (8,)]):
        with jax.set_mesh(mesh):
            save_tables(tmp_path / str(hop), store, mesh, tables)
        mesh = mesh_of(*shape)
        store = store_on(mesh, optimizer, row_dtype=row_dtype)
        with jax.set_mesh(mesh):
            restored = restore_tables(tmp_path / str(hop), store, mesh)
            described = store.abstract_state().tables
        assert types(restored) == types(tables)
        assert jax.tree.map(lambda x: x.sharding.spec, restored) == jax.tree.map(lambda x: x.sharding.spec, described)
        tables = restored
        assert logical_bytes(store, tables) == first


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_saving_and_restoring_take_little_memory_beside_the_table(tmp_path):
    """A table of 130 MB on one device, in chunks of 2 MB."""
    measured = run_apart("measure_memory", tmp_path)
    shard, saving, restoring = (int(number) for number in measured.stdout.split()[-3:])
    assert measured.returncode == 0 and shard > 120e6
    assert saving < 0.2 * shard
    assert restoring < 1.2 * shard  # the new table among it


def run_apart(function, *arguments):
    """`function` of this file in a process of its own."""
    source = f"import sys, test_table_checkpoint as here; here.{function}(*sys.argv[1:])"
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def measure_memory(folder):
    """Prints the table's bytes, and by how much more than before it this process grew to save and to restore it."""
    table_files.CHUNK_BYTES, chunks.CHUNK_ROWS = 2 * 2**20, 2048
    mesh = mesh_of(1)

    def now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def reset_peak():
        Path("/proc/self/clear_refs").write_text("5")

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def store_of(rows):
        config = replace_engram(engram_layer_ids=(0,), engram_head_dim=64, engram_vocab_size=rows)
        return store_on(mesh, config=config)

    with jax.set_mesh(mesh):
        small = store_of(20_000)  # several chunks: whatever is loaded and compiled at first use is so after this
        save_tables(Path(folder) / "small", small, mesh, small.init(jax.random.key(0)).tables)
        restore_tables(Path(folder) / "small", small, mesh)
        large = store_of(42_000)
        tables = large.init(jax.random.key(0)).tables
        jax.block_until_ready(tables)
        size, before = large.num_bytes, now()
        reset_peak()
        save_tables(Path(folder) / "large", large, mesh, tables)
        saving = peak() - before
        del tables
        before = now()
        reset_peak()
        jax.block_until_ready(restore_tables(Path(folder) / "large", large, mesh))
        print(size, saving, peak() - before)


def replace_engram(**changes):
    return EngramConfig(**{**CONFIG.__dict__, **changes})


# --- in Orbax's checkpoints ---


def parts_on(mesh, **settings):
    return SimpleNamespace(store=store_on(mesh, **settings), mesh=mesh)


def state_of(step, parts):
    weights = {"weights": jax.random.normal(jax.random.key(step), (8, 600))}
    tables = filled(parts.store, parts.mesh, step)
    used = {layer: jnp.int32(step + len(layer)) for layer in tables}
    return TrainState(jnp.int32(step), weights, {}, {}, MemoryState(tables, used))


def save(directory, parts, *steps, meta=None):
    with jax.set_mesh(parts.mesh), Checkpoints(directory, CheckpointConfig(), parts, lambda line: None) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step, parts), meta or {})
        checkpoints.wait()
        return checkpoints.steps


def restore(directory, parts, check=lambda meta: None):
    """(step restored, lines logged), the state being what `state_of` had saved, bit for bit."""
    lines = []
    with jax.set_mesh(parts.mesh), Checkpoints(directory, CheckpointConfig(), parts, lines.append) as checkpoints:
        on_all = jax.NamedSharding(parts.mesh, jax.P())
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=on_all)
        weights = {"weights": jax.ShapeDtypeStruct((8, 600), jnp.float32, sharding=on_all)}
        memory = MemoryState({}, dict.fromkeys(parts.store.layers, number))
        state = checkpoints.restore(TrainState(number, weights, {}, {}, memory), check)
        if state is None:
            return None, lines
        expected = state_of(int(state.step), parts)
    assert logical_bytes(parts.store, state.memory.tables) == logical_bytes(parts.store, expected.memory.tables)
    np.testing.assert_array_equal(state.params["weights"], expected.params["weights"])
    assert jax.device_get(state.memory.rows_used) == jax.device_get(expected.memory.rows_used)
    return int(state.step), lines


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


MOMENTS = ["a first chunk is written", "some shards are closed", "tables are written", "the state is being written"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (i % 2)) for i, m in enumerate(MOMENTS)])
def test_killed_while_saving_the_step_before_is_there(moment, tmp_path):
    killed = run_apart("save_and_die", tmp_path, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert any(path.name.startswith(f"2{UNFINISHED}") for path in tmp_path.iterdir())
    parts = parts_on(mesh_of(1))
    assert restore(tmp_path, parts) == (1, ["Checkpoint 2 was only half written when the run ended: skipped."])
    assert save(tmp_path, parts, 2) == [1, 2]
    assert not any(UNFINISHED in path.name for path in tmp_path.iterdir())
    assert restore(tmp_path, parts) == (2, [])


def save_and_die(directory, moment):
    """Saves step 1, and is killed while it saves step 2."""
    table_files.CHUNK_BYTES = CHUNK
    parts = parts_on(mesh_of(4))
    save(Path(directory), parts, 1)

    def then_die(owner, name, on_call=1):
        honest, calls = getattr(owner, name), []

        def dying(*args, **kwargs):
            result = honest(*args, **kwargs)
            calls.append(args)
            if len(calls) == on_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dying)

    if moment == MOMENTS[0]:
        then_die(ShardWriter, "write")
    elif moment == MOMENTS[1]:
        then_die(ShardWriter, "close", 3)
    elif moment == MOMENTS[2]:
        then_die(table_checkpoint, "save_tables")
    else:
        then_die(Checkpoints, "save")
    save(Path(directory), parts, 2)


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["a chunk", "an index", pytest.param("a shard", marks=pytest.mark.slow)])
def test_a_damaged_table_is_named_and_the_checkpoint_before_it_taken(harm, tmp_path):
    parts = parts_on(mesh_of(2, 4))
    save(tmp_path, parts, 1, 2)
    table = tmp_path / "2" / "tables" / "2"
    if harm == "a chunk":
        file = table / "00003-of-00008.slots.m.bin"
        data = bytearray(file.read_bytes())
        data[3] ^= 4
        file.write_bytes(data)
        reason = r"damaged in chunk 0"
    elif harm == "an index":
        (table / "00003-of-00008.json").unlink()
        reason = r"incomplete: 1 of its 8 shards"
    else:
        for file in table.glob("00003-of-00008.*.bin"):
            os.truncate(file, file.stat().st_size // 2)
        reason = r"00003-of-00008\..* has [0-9,]+ bytes where"
    step, lines = restore(tmp_path, parts)
    assert step == 1 and len(lines) == 1
    assert lines[0].startswith("Checkpoint 2 cannot be read (") and lines[0].endswith("): skipped.")
    assert re.search(reason, lines[0])
    assert save(tmp_path, parts, 2) == [1, 2]
    assert restore(tmp_path, parts) == (2, [])


@pytest.mark.newest
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": replace_engram(engram_vocab_size=(41, 71))}, r"rows in head 2 instead of 71"),
        ({"config": replace_engram(engram_n_heads=3)}, r"4 heads instead of 6"),
        ({"config": replace_engram(engram_head_dim=5)}, r"float32\[4\] instead of float32\[5\]"),
        ({"optimizer": "rowwise_rmsprop"}, r"an unexpected field 'slots.m'"),
        ({"row_dtype": "bfloat16"}, r"'rows' as float32\[4\] instead of bfloat16\[4\]"),
    ],
    ids=["vocab size", "heads", "width", "optimizer", "dtype"],
)
def test_another_stores_tables_are_refused_before_anything_is_made(changes, reason, tmp_path, monkeypatch):
    mesh = mesh_of(8)
    store = store_on(mesh)
    save_tables(tmp_path, store, mesh, filled(store, mesh, 1))
    monkeypatch.setattr(MemoryStore, "allocate", lambda self: pytest.fail("tables were allocated"))
    with jax.set_mesh(mesh), pytest.raises(TableFileError, match=reason):
        restore_tables(tmp_path, store_on(mesh, **changes), mesh)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("model__engram__engram_vocab_size", 700),
        pytest.param("model__engram__engram_n_heads", 4, marks=pytest.mark.slow),
        ("model__engram__engram_kernel_size", 2),
        pytest.param("optimizer__table_optimizer", "rowwise_adagrad", marks=pytest.mark.slow),
        pytest.param("memory__row_dtype", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_another_runs_checkpoint_is_refused_by_the_setting_that_differs(change, value, config, tokenizer, tmp_path):
    """And neither skipped as a damaged one nor overwritten."""
    parts, mesh = assemble(config, tokenizer), mesh_of(1)
    other = assemble(replace(config, **{change: value}), tokenizer)

    def meta(parts):
        constants = parts.store.constants.to_dict()
        same = {"tokenizer_sha256": "t", "corpus_sha256": "c"}
        return {"config": to_dict(parts.config), "hash_constants": constants, **same}

    save(tmp_path, parts_on(mesh), 1, 2, meta=meta(parts))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"belongs to a run with other settings \(.*{change.replace('__', '.')}"):
        restore(tmp_path, parts_on(mesh), lambda saved: run_folder.check_meta(saved, meta(other), other))
    assert contents(tmp_path) == before
    assert restore(tmp_path, parts_on(mesh), lambda saved: run_folder.check_meta(saved, meta(parts), parts))[0] == 2
