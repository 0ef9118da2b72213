"""Numbers about the memory during training, against n-grams counted in NumPy and gates overheard in the model.

Legend: B batch, T seq, H rows per token, O orders, K heads per order, M residual streams, R logical rows.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from monitored_model import CONFIG, B, K, M, T, make_batch, on_devices

from engram_jax.config import replace
from engram_jax.layers.engram import EngramReader
from engram_jax.memory.hashing import ngram_row_ids_numpy
from engram_jax.memory.placements import DevicePlacement
from engram_jax.runs.parts import assemble
from engram_jax.sharding import BATCH
from engram_jax.training.monitors import BUCKETS, collisions, make_monitor

pytestmark = pytest.mark.newest

LAYERS = ("0", "1")
LOOK_STEP = 92


@dataclass(frozen=True)
class SplitPlacement(DevicePlacement):
    """The first half of every shard is its fast tier."""

    has_tiers = True

    def hit_rate(self, table, owned_U):
        rows = len(table.uses)
        return jnp.sum(owned_U < rows // 2) / jnp.sum(owned_U < rows)


@dataclass(frozen=True)
class Looked:
    parts: object
    state: object
    batches: list
    """Those the memory was updated with."""
    metrics: dict
    overheard: dict
    """Gates by layer, as the readers of a plain model made them: [B, T, M]."""


STEPS = [*range(20), *range(50, 90, 3)]


def with_gates_apart(parts, state):
    """Gains that spread the gates; those of a new model lie within 0.01 of one half."""
    rng = np.random.default_rng(5)

    def spread(reader):
        gains_MD = (3 + rng.normal(size=(M, 16))).astype(np.float32)
        return reader | {"query_norm": jax.device_put(gains_MD, reader["query_norm"].sharding)}

    readers = {layer: spread(state.params["engram"][layer]) for layer in LAYERS}
    return dataclasses.replace(state, params=state.params | {"engram": readers})


@pytest.fixture(scope="module")
def looked(tokenizer):
    """`looked(num_devices)`: after updates with zero gradients at STEPS, a look at LOOK_STEP."""

    def run(num_devices):
        parts = assemble(replace(CONFIG, train__mesh_fsdp=min(num_devices, 2)), tokenizer, jax.devices()[:num_devices])
        parts = dataclasses.replace(parts, store=dataclasses.replace(parts.store, placement=SplitPlacement()))
        store, plan_of = parts.store, jax.jit(lambda batch: parts.store.plan(batch["tokens"], batch["segment_ids"]))

        @jax.jit
        def update(memory, plan, step):
            shapes = {layer: (*p.ids_BTH.shape, 4) for layer, p in plan.items()}
            zeros = {la: jnp.zeros(s, out_sharding=jax.P(BATCH)) for la, s in shapes.items()}
            return store.update(memory, plan, store.reduce(plan, zeros), step)

        with jax.set_mesh(parts.mesh):
            state = with_gates_apart(parts, parts.init_state())
            batches, memory = [make_batch(step) for step in STEPS], state.memory
            for step, batch in zip(STEPS, batches, strict=True):
                memory = update(memory, plan_of(on_devices(parts, batch)), jnp.int32(step))
                jax.block_until_ready(memory)  # many exchanges at once, on eight threads of two cores, can lock up
            step = jax.device_put(np.int32(LOOK_STEP), state.step.sharding)
            state = dataclasses.replace(state, memory=memory, step=step)
            batch = on_devices(parts, make_batch(1000))
            metrics = make_monitor(parts)(state, batch, plan_of(batch))
            gates = overhear(parts, state, batch) if num_devices == 1 else {}
        return Looked(parts, state, batches, {name: float(x) for name, x in metrics.items()}, gates)

    return functools.cache(run)


def overhear(parts, state, batch):
    """Gates of a forward pass whose readers are spied on."""
    heard = []

    def call(reader, x_BTMD, rows_BTHd, segment_ids_BT=None):
        update_BTMD, gate_BTM = reader.read(x_BTMD, rows_BTHd, segment_ids_BT)
        heard.append(gate_BTM)
        return update_BTMD

    @jax.jit
    def forward(state, batch):
        rows = parts.store.fetch(state.memory, parts.store.plan(batch["tokens"], batch["segment_ids"]), state.step)
        parts.model(state.params, state.buffers).hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
        return dict(zip(LAYERS, heard, strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngramReader, "__call__", call)
        return jax.device_get(forward(state, batch))


# --- the oracle: n-grams as tuples, rows as numbers, both counted ---


def ngrams(store, batch, order):
    """The n-gram of every position as a tuple of canonical ids, [B][T]; windows stop where documents do."""
    canonical = store.token_map.canonical_ids[batch["tokens"]]
    pad, segments = store.constants.pad_id, batch["segment_ids"]

    def one(b, t):
        back = [t - i for i in range(order)]
        return tuple(int(canonical[b, s]) if s >= 0 and segments[b, s] == segments[b, t] else pad for s in back)

    return [[one(b, t) for t in range(T)] for b in range(B)]


def row_ids(store, layer, batch):
    """[B, T, H]."""
    canonical = store.token_map.canonical_ids[batch["tokens"]]
    return ngram_row_ids_numpy(store.constants, int(layer), canonical, batch["segment_ids"])


def uses_of_rows(store, layer, batches):
    """Batches that touched each logical row: [R]."""
    uses_R = np.zeros(store.num_rows(layer), int)
    for batch in batches:
        uses_R[np.unique(row_ids(store, layer, batch))] += 1
    return uses_R


def seen_of_ngrams(store, batches, batch, order):
    """For each position of `batch`, how many of `batches` held its n-gram: [B, T]."""
    counts = Counter(
        itertools.chain.from_iterable(set(itertools.chain(*ngrams(store, earlier, order))) for earlier in batches)
    )
    return np.array([[counts[ngram] for ngram in row] for row in ngrams(store, batch, order)])


def expected_collisions(store, layer, batches, batch):
    """{metric: share} with the true count of every n-gram in place of the estimate."""
    uses_BTH = uses_of_rows(store, layer, batches)[row_ids(store, layer, batch)]
    real = batch["segment_ids"] > 0
    expected = {}
    for i, order in enumerate((2, 3)):
        uses_NK = uses_BTH[real][:, i * K : (i + 1) * K]
        seen_N1 = seen_of_ngrams(store, batches, batch, order)[real][:, None]
        assert (seen_N1 <= uses_NK).all()
        share_K = np.where(uses_NK > 0, 1 - seen_N1 / np.maximum(uses_NK, 1), 0).mean(axis=0)
        expected[f"memory/collision_{layer}/order{order}"] = share_K.mean()
        expected[f"memory/collision_{layer}/order{order}_worst_head"] = share_K.max()
    return expected


# --- the tests ---


@pytest.mark.parametrize("layer", LAYERS)
def test_collisions_are_those_of_counted_ngrams(looked, layer):
    """Eight heads a third full: the chance that all of them collide for one n-gram is 1e-4."""
    result = looked(1)
    expected = expected_collisions(result.parts.store, layer, result.batches, make_batch(1000))
    for name, share in expected.items():
        assert 0.05 < share < 0.5
        assert result.metrics[name] == pytest.approx(share, rel=1e-5), name


def test_uses_of_crowded_tables_hide_collisions_but_invent_none(tokenizer):
    """Rows so few that every head collides: the estimate is a lower bound."""
    config = replace(CONFIG, model__engram__engram_vocab_size=11)
    parts = assemble(config, tokenizer, jax.devices()[:1])
    batches, batch = [make_batch(seed) for seed in range(30)], make_batch(1000)
    uses_BTH = uses_of_rows(parts.store, "0", batches)[row_ids(parts.store, "0", batch)]
    real_BT = jnp.asarray(batch["segment_ids"] > 0)
    metrics = collisions(jnp.asarray(uses_BTH, jnp.int32).reshape(B, T, 2, K), real_BT)
    expected = expected_collisions(parts.store, "0", batches, batch)
    for name, share in metrics.items():
        assert 0 <= float(share) < expected[f"memory/collision_0/{name}"] - 0.1


def test_collisions_of_constructed_counts():
    """One real position with known rows; what stands at padding must not count."""
    uses_BTOK = jnp.full((1, 3, 2, 4), 7, jnp.int32)
    uses_BTOK = uses_BTOK.at[0, 0].set(jnp.array([[4, 1, 2, 1], [5, 5, 5, 5]]))
    uses_BTOK = uses_BTOK.at[0, 1].set(jnp.array([[0, 3, 0, 0], [0, 0, 0, 0]]))
    uses_BTOK = uses_BTOK.at[0, 2].set(jnp.array([[9, 1, 9, 9], [8, 1, 1, 1]]))
    metrics = collisions(uses_BTOK, jnp.array([[True, True, False]]))
    # order 2: the first n-gram's least count is 1, the second was never seen and head 1's row is all others'
    np.testing.assert_allclose(metrics["order2"], np.mean([[0.75, 0, 0.5, 0], [0, 1, 0, 0]]), rtol=1e-6)
    np.testing.assert_allclose(metrics["order2_worst_head"], 0.5, rtol=1e-6)
    assert metrics["order3"] == metrics["order3_worst_head"] == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_gates_by_stream_and_by_how_often_the_ngram_was_seen(looked, layer):
    result, batch = looked(1), make_batch(1000)
    real, gate_BTM = batch["segment_ids"] > 0, result.overheard[layer].astype(np.float64)
    uses_BTH = uses_of_rows(result.parts.store, layer, result.batches)[row_ids(result.parts.store, layer, batch)]
    seen_BT = uses_BTH[:, :, K:].min(axis=-1)
    true_BT = seen_of_ngrams(result.parts.store, result.batches, batch, 3)
    assert (seen_BT == true_BT)[real].mean() > 0.98
    groups = {f"stream{m}": gate_BTM[real][:, m] for m in range(M)}
    bounds = {"0": (0, 1), "1_3": (1, 4), "4_15": (4, 16), "16_63": (16, 64), "64_up": (64, math.inf)}
    groups |= {f"seen_{name}": gate_BTM[real & (seen_BT >= a) & (seen_BT < b)] for name, (a, b) in bounds.items()}
    for name, gates in groups.items():
        mean, std = (result.metrics[f"memory/gate_{layer}/{name}_{statistic}"] for statistic in ("mean", "std"))
        if name == "seen_64_up":  # there were fewer updates
            assert gates.size == 0 and math.isnan(mean) and math.isnan(std)
            continue
        assert gates.size > 5 and gates.std() > 0.02, name
        np.testing.assert_allclose(mean, gates.mean(), rtol=1e-5)
        np.testing.assert_allclose(std, gates.std(), rtol=1e-4)


def test_the_buckets_leave_no_gap():
    bounds = [*BUCKETS.values()]
    assert bounds[0][0] == 0 and bounds[-1][1] == np.iinfo(np.int32).max
    assert all(last + 1 == first for (_, last), (first, _) in itertools.pairwise(bounds))


@pytest.mark.parametrize("layer", LAYERS)
def test_staleness_is_over_distinct_rows_that_have_been_updated(looked, layer):
    result, batch = looked(1), make_batch(1000)
    last_R = np.full(result.parts.store.num_rows(layer), -1)
    for step, earlier in zip(STEPS, result.batches, strict=True):
        last_R[np.unique(row_ids(result.parts.store, layer, earlier))] = step + 1  # updates done by then
    read = np.unique(row_ids(result.parts.store, layer, batch))
    waited = LOOK_STEP - last_R[read][last_R[read] >= 0]
    assert len(waited) < len(read) and waited.min() == 2 and waited.max() > 40
    np.testing.assert_allclose(result.metrics[f"memory/staleness_{layer}/mean"], waited.mean(), rtol=1e-6)
    assert result.metrics[f"memory/staleness_{layer}/max"] == waited.max()


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_hit_rate_is_over_the_distinct_rows_of_all_shards(looked, num_devices, layer):
    result = looked(num_devices)
    layout = result.parts.store.layouts[layer]
    read = np.unique(row_ids(result.parts.store, layer, make_batch(1000)))
    place = layout.logical_order()[read] % layout.rows_per_shard
    hits = (place < layout.rows_per_shard // 2).mean()
    assert 0.2 < hits < 0.8
    np.testing.assert_allclose(result.metrics[f"memory/hit_rate_{layer}"], hits, rtol=1e-6)


def test_eight_devices_see_what_one_sees(looked):
    single, sharded = looked(1), looked(8)
    assert sharded.parts.mesh.size == 8 and single.metrics.keys() == sharded.metrics.keys()
    for name, value in single.metrics.items():
        if "hit_rate" not in name:  # the tiers of the test depend on the shards
            np.testing.assert_allclose(sharded.metrics[name], value, rtol=1e-4, err_msg=name)


def test_a_look_takes_nothing_and_changes_nothing(looked):
    state = looked(1).state
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_only_what_there_is_has_a_name(tokenizer):
    """No staleness without last_step, no hit rate without tiers; names that TensorBoard takes as they are."""
    config = replace(CONFIG, optimizer__table_optimizer="rowwise_adagrad")
    parts = assemble(config, tokenizer, jax.devices()[:1])
    with jax.set_mesh(parts.mesh):
        state = jax.eval_shape(parts._init)
        state = dataclasses.replace(state, memory=parts.store.abstract_state())
        batch = on_devices(parts, make_batch(0))
        plan = jax.eval_shape(parts.store.plan, batch["tokens"], batch["segment_ids"])
        metrics = jax.eval_shape(make_monitor(parts), state, batch, plan)
    collision = [f"collision_{la}/order{n}{what}" for la in LAYERS for n in (2, 3) for what in ("", "_worst_head")]
    groups = ["stream0", "stream1", *(f"seen_{name}" for name in ("0", "1_3", "4_15", "16_63", "64_up"))]
    gate = [f"gate_{la}/{group}_{what}" for la in LAYERS for group in groups for what in ("mean", "std")]
    assert metrics.keys() == {f"memory/{name}" for name in collision + gate}
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
