"""Tables in two tiers against NumPy and against tables on the device: every bit, and who is hot when."""

import functools
import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiered_aot
from tpu_aot import BATCH, ROWS, WIDTH, run_apart

from engram_jax.config import ConfigError, EngramConfig, MemoryConfig
from engram_jax.memory import chunks, table_files
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.placements import DevicePlacement, HostPlacement, TieredPlacement, host, tiered
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableState
from engram_jax.registries import PLACEMENTS
from engram_jax.runs.table_checkpoint import restore_tables, save_tables
from engram_jax.sharding import MESH_AXES, lookups, make_mesh

pytestmark = pytest.mark.newest

R, U, D = 64, 24, 6
SHARDED = jax.P(MESH_AXES)
CASES = [(0.001, False, "float32"), (0.2, True, "bfloat16"), (0.2, False, "float32"), (1.0, True, "float32")]
"""Share of the rows that are hot (8 of 64, 16, all; a batch has 24), whether several share a line, their dtype."""


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """A batch of 24 rows crosses in up to five rounds, the last of them not full."""
    monkeypatch.setattr(tiered, "ROUND_ROWS", 5)


@pytest.fixture(params=[pytest.param((1, 1), marks=pytest.mark.slow), (4, 2)], ids=["1 device", "8 devices"])
def mesh(request):
    data, fsdp = request.param
    mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with jax.set_mesh(mesh):
        yield mesh


def on_shards(function):
    return jax.shard_map(function, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)


def one_row(row_dtype="float32"):
    return tiered_aot.one_row(row_dtype, D)


@functools.cache
def compiled(mesh, share, as_records=False, row_dtype="float32", rows=R):
    """The jitted functions of a placement's table."""
    placement = TieredPlacement(share, DevicePlacement(as_records), HostPlacement())
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


@pytest.mark.parametrize(("share", "as_records", "row_dtype"), CASES)
def test_reads_and_writes_the_rows_asked_for(mesh, share, as_records, row_dtype):
    rng = np.random.default_rng(0)
    on = compiled(mesh, share, as_records, row_dtype)
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


@pytest.mark.parametrize(("share", "as_records", "row_dtype"), CASES)
def test_promotes_the_rows_used_most_for_those_used_least(mesh, share, as_records, row_dtype):
    rng = np.random.default_rng(1)
    on = compiled(mesh, share, as_records, row_dtype)
    every = np.tile(np.arange(R, dtype=np.int32), (mesh.size, 1))
    table = on.put(on.new(), send(mesh, every), send(mesh, random_rows(mesh, rng, row_dtype, count=R)))
    uses = np.asarray(on.take(table, send(mesh, every)).uses).reshape(mesh.size, R)
    moved = 0
    for beyond in (3, U, 0, 1):
        ids, before = random_ids(mesh, rng, beyond), hot_ids(mesh, table)
        rates = np.asarray(on.hit_rate(table, send(mesh, ids)))
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
            batch = send(mesh, ids[None])
            rates.append(on.hit_rate(table, batch)[0])
            best.append(np.mean(np.isin(ids[:real], np.argsort(-counts, stable=True)[:2000])))
            held = on.take(table, batch)
            table = on.put(table, batch, TableState(held.rows, held.slots, held.uses + 1))
            counts[ids[:real]] += 1
            if (k + 1) % every == 0:
                table = on.promote(table, batch)
    by_exchange = np.reshape(rates, (-1, every)).mean(1)
    print("hot, by exchanges done:", by_exchange.round(2), "at best:", np.reshape(best, (-1, every)).mean(1).round(2))
    assert by_exchange[0] < 0.15 and by_exchange[1] > 0.25  # a single exchange brings most of what there is to gain
    assert by_exchange[-1] > 0.9 * np.mean(best[-every:]) > 0.4


def test_a_donated_table_keeps_its_place(mesh):
    rng = np.random.default_rng(3)
    on = compiled(mesh, 0.2, rows=4096)
    ids, new = send(mesh, random_ids(mesh, rng, 0)), send(mesh, random_rows(mesh, rng))
    table = on.new()

    def pointers(tree):
        return [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards]

    def kinds(tree):
        return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}

    def size(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree)) // mesh.size

    before = pointers(table)
    for function, arguments in ((on.put, (ids, new)), (on.promote, (ids,))):
        used = function.lower(table, *arguments).compile().memory_analysis()
        assert used.alias_size_in_bytes == size(table)
        # An exchange sorts the ids of the hot rows, as 64-bit numbers.
        assert used.temp_size_in_bytes < 6 * size(new) + 6 * size(table.hot_ids) < 0.2 * size(table.tail)
        old, table = table, function(table, *arguments)
        assert pointers(table) == before
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert kinds(table.tail) == {"pinned_host"}
        assert kinds((table.hot, table.hot_ids, table.hot_places)) == {"device"}
    assert kinds(on.take(table, ids)) == {"device"}


# --- in a store ---

B, T, V, STEPS = 8, 6, 40, 21
CONFIG = EngramConfig(engram_layer_ids=(1,), engram_n_heads=2, engram_head_dim=D, engram_vocab_size=(151, 211))


def store_on(mesh, name, hot_rows=0.25):
    settings = MemoryConfig(placement=name, hot_rows=hot_rows)
    return MemoryStore.create(
        CONFIG,
        TokenMap.identity(V),
        CatchUpAdam(np.full(STEPS, 1e-2)),
        placement=PLACEMENTS[name].create(settings, "cpu"),
        shards=mesh.size,
        init_std=0.5,
        row_dtype="bfloat16",
    )


def everything(store, tables):
    """All that is kept for every row, as the chunks of a checkpoint have it."""
    return {
        layer: jax.device_get(chunks.chunk_reader(store, layout.rows_per_shard)(tables[layer], 0))
        for layer, layout in store.layouts.items()
    }


@functools.cache
def train(mesh, name, reads_ahead):
    """A store, its state after STEPS steps with an exchange after every third, what was read, the last plan."""
    store = store_on(mesh, name)
    at_rest = MemoryState({layer: store.at_rest(layer) for layer in store.layers}, None)
    plan_of = jax.jit(store.plan)

    def put(x):
        return jax.device_put(x, jax.NamedSharding(mesh, lookups(x.ndim)))

    def step(state, plan, targets_BT1D, k, held, next_plan):
        early = store.load(state, next_plan) if reads_ahead else None
        held = held or store.load(state, plan)
        rows = store.rows(held, plan, k)
        grads = jax.grad(lambda rows: sum(jnp.sum((r - targets_BT1D) ** 2) for r in rows.values()))(rows)
        held = store.advance(held, plan, store.reduce(plan, grads), k)
        if early is None:
            return store.save(state, plan, held), None, rows
        early, held = jax.lax.optimization_barrier((early, held))
        return store.save(state, plan, held), store.patch(early, next_plan, held, plan), rows

    step = jax.jit(step, donate_argnums=(0, 4), out_shardings=(at_rest, None, None))
    rng = np.random.default_rng(7)
    tokens = np.minimum(rng.zipf(1.3, (STEPS + 1, B, T)), V - 1).astype(np.int32)
    tokens[5] = 2  # padding only
    plans = [plan_of(put(t), put(np.sign(t - 2) ** 2)) for t in tokens]
    state, held, seen = store.init(jax.random.key(1)), None, []
    if name == "tiered":
        promote = jax.jit(store.promote, donate_argnums=0, out_shardings=at_rest)
    for k in range(STEPS):
        targets = put(rng.normal(size=(B, T, 1, D)).astype(np.float32))
        state, held, rows = step(state, plans[k], targets, jnp.int32(k), held, plans[k + 1] if reads_ahead else None)
        seen.append(jax.device_get(rows))
        if name == "tiered" and k % 3 == 2:
            state = promote(state, plans[k])
    return store, state, seen, plans[-1]


@pytest.mark.parametrize("reads_ahead", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trains_as_a_table_on_the_device_does(mesh, reads_ahead):
    device, expected, expected_rows, _ = train(mesh, "device", reads_ahead)
    store, state, rows, plan = train(mesh, "tiered", reads_ahead)
    for got, wanted in zip(rows, expected_rows, strict=True):
        assert_same_bits(got, wanted)
    assert_same_bits(everything(store, state.tables), everything(device, expected.tables))
    assert jax.device_get(state.rows_used) == jax.device_get(expected.rows_used)
    for layer, rate in jax.jit(store.hit_rate)(state, plan).items():
        rows = store.layouts[layer].rows_per_shard
        owned, hot = np.asarray(plan[layer].owned_U).reshape(mesh.size, -1), hot_ids(mesh, state.tables[layer])
        asked = [ids[ids < rows] for ids in owned]
        found = sum(np.isin(ids, hot[shard]).sum() for shard, ids in enumerate(asked))
        assert float(rate) == pytest.approx(found / sum(map(len, asked)), rel=1e-6)
        assert float(rate) > 1.2 * 0.25  # more than any quarter of the rows


def test_checkpoints_go_from_any_placement_to_any(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "CHUNK_BYTES", 1000)  # several chunks
    store, state, _, plan = train(mesh, "tiered", True)
    tables, first = state.tables, everything(store, state.tables)
    for hop, name in enumerate(["device", "host", "tiered", "device"]):
        save_tables(tmp_path / str(hop), store, mesh, tables)
        store = store_on(mesh, name)
        tables = restore_tables(tmp_path / str(hop), store, mesh)
        if name == "tiered":
            state = MemoryState(tables, state.rows_used)
            hit_rate = jax.jit(store.hit_rate)
            before = hit_rate(state, plan)
            state = jax.jit(store.promote)(state, plan)  # what a run does next
            assert hit_rate(state, plan)["1"] > before["1"]
            tables = state.tables
        assert_same_bits(everything(store, tables), first)


def test_each_tier_must_have_room(monkeypatch):
    chip = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10**9})
    monkeypatch.setattr(jax, "local_devices", lambda: [chip])
    monkeypatch.setattr(host, "available_host_bytes", lambda: 32 * 10**9)
    tenth, fifth = (TieredPlacement(share, DevicePlacement(), HostPlacement()) for share in (0.1, 0.2))
    tenth.check_room(8 * 10**9, 4)
    with pytest.raises(ConfigError, match=r"memory.hot_rows=0.2 .* need 1\.6 GB on each device, which has 1\.0 GB"):
        fifth.check_room(8 * 10**9, 4)
    with pytest.raises(ConfigError, match=r"need 40\.0 GB on this host"):
        tenth.check_room(8 * 10**9, 5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: jax[tpu]")
@pytest.mark.parametrize(("topology", "row_dtype"), [("v5p:2x2x2", "float32"), ("v6e:2x4", "bfloat16")])
def test_compiled_for_tpus_no_tail_leaves_the_host(topology, row_dtype):
    compiled = run_apart(tiered_aot.__file__, topology, row_dtype)
    tail = ROWS * ((jnp.dtype(row_dtype).itemsize + 4) * WIDTH + 4 + 4)
    batch = BATCH * (2 * 128 + 2) * 4  # a row of 64 floats fills 128 lanes
    words = BATCH * (256 if row_dtype == "float32" else 128) * 4  # the batch as records
    allocate, step, promote = (compiled[name] for name in ("allocate", "step", "promote"))
    assert allocate["host_output"] == tail
    assert allocate["device_temp"] < 2**20
    for program, room in ((step, 5 * batch + words), (promote, batch)):
        assert program["host_argument"] == program["host_output"] == program["host_alias"] == tail
        assert program["device_temp"] < room < 0.06 * tail
    assert all(program["host_temp"] == 0 and program["tiled"] == [] for program in compiled.values())
