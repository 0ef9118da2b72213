"""Plans made ahead: cut to what batches need, made again when one needs more, and without a trace in the numbers."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.errors import RunError
from engram_jax.memory import store as store_module
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.plan import Capacity, capacity, fits, overflow
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.sharding import BATCH, make_mesh
from engram_jax.training.planner import MULTIPLE, SLACK, PlannedBatches, Planner

pytestmark = pytest.mark.newest

V, B, T, D = 3000, 8, 16, 4
CONFIG = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=D, engram_vocab_size=(900, 1100))


@cache
def store_of(devices=8):
    return MemoryStore.create(
        CONFIG, TokenMap.identity(V), CatchUpAdam(np.full(99, 1e-2)), shards=devices, init_std=0.5
    )


@pytest.fixture(autouse=True)
def mesh():
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        yield mesh


def batch_of(tokens):
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(BATCH))
    tokens = np.broadcast_to(tokens, (B, np.shape(tokens)[-1] if np.ndim(tokens) else T)).astype(np.int32)
    return {"tokens": jax.device_put(tokens, sharding), "segment_ids": jax.device_put(np.ones_like(tokens), sharding)}


def all_equal():
    return batch_of(7)


def all_distinct(seed=0):
    return batch_of(np.random.default_rng(seed).permutation(V)[: B * T].reshape(B, T))


def zipfian(seed):
    return batch_of(np.minimum(np.random.default_rng(seed).zipf(1.2, (B, T)), V - 1))


def needs(plan):
    return {layer: Capacity(int(p.need.pair), int(p.need.owner)) for layer, p in plan.items()}


def given(plan):
    return {layer: capacity(p) for layer, p in plan.items()}


def room(places, layer):
    """Places for a need of `places`: a little more, in steps of eight, and never more than the shard has rows."""
    return min(MULTIPLE * -(-int(places * SLACK) // MULTIPLE) + MULTIPLE, store_of().layouts[layer].rows_per_shard)


def roomy(need):
    return {layer: Capacity(room(n.pair, layer), room(n.owner, layer)) for layer, n in need.items()}


def test_the_first_batch_sets_the_shapes_and_like_ones_keep_them():
    lines = []
    planner = Planner(store_of(), lines.append)
    first = planner(zipfian(0))
    assert given(first) == roomy(needs(first))
    safe = given(jax.jit(store_of().plan)(*zipfian(0).values()))
    for layer, chosen in given(first).items():
        assert chosen.pair < safe[layer].pair and chosen.owner < safe[layer].owner
    assert given(planner(zipfian(0))) == given(first)
    assert planner.replanned == 0 and lines == []


def test_a_batch_that_asks_for_more_is_planned_again_larger():
    lines = []
    planner = Planner(store_of(), lines.append)
    small, asked = planner(all_equal()), all_distinct()
    too_small = planner.start(asked)
    assert not fits(too_small)  # what must not reach a step
    large = planner.finish(asked, too_small)
    assert planner.replanned > 0 and len(lines) == planner.replanned
    assert lines[0].startswith("Memory: a batch asks for more rows of one device than the exchange had room for")
    assert fits(large) and all(int(overflow(p)) == 0 for p in large.values())
    safe = jax.jit(store_of().plan)(*asked.values())
    assert needs(large) == needs(safe)
    for layer in large:
        assert capacity(large[layer]) > capacity(small[layer])
        assert max(needs(small)[layer]) < min(needs(large)[layer])
    before = planner.replanned
    assert given(planner(all_equal())) == given(large)  # one pair of shapes from here on
    assert given(planner(all_distinct(1))) == given(large)
    assert planner.replanned == before


@pytest.mark.slow
def test_only_what_was_too_small_grows():
    """Sequences that ask the same of an owner share its list; different ones of the same size fill it up."""
    planner = Planner(store_of(), lambda line: None)
    distinct = np.random.default_rng(0).permutation(V)[: B * 64].reshape(B, 64)
    alike = planner(batch_of(distinct[0]))
    different = planner(batch_of(distinct))
    assert planner.replanned > 0
    before, after, need = given(alike), given(different), needs(different)
    for layer, (pair, owner) in before.items():
        assert need[layer].pair <= pair and need[layer].owner > owner
        assert after[layer] == (pair, room(need[layer].owner, layer))
    assert roomy(need)["0"].pair > before["0"].pair  # where it would have gone


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(all_equal, all_distinct), (all_distinct, all_equal)])
def test_a_plan_started_before_the_shapes_changed_takes_the_new_ones(kinds):
    planner = Planner(store_of(), lambda line: None)
    first, second = (kind() for kind in kinds)
    started = [planner.start(batch) for batch in (first, second, second)]
    plans = [planner.finish(batch, plan) for batch, plan in zip((first, second, second), started, strict=True)]
    assert all(fits(plan) for plan in plans)
    assert given(plans[1]) == given(plans[2]) == given(planner(first))


def test_capacities_stop_at_the_rows_there_are():
    config = EngramConfig(engram_layer_ids=(0,), engram_n_heads=2, engram_head_dim=D, engram_vocab_size=(11, 13))
    tiny = MemoryStore.create(config, TokenMap.identity(V), CatchUpAdam(np.ones(9)), shards=8)
    plan = Planner(tiny)(all_distinct())
    assert fits(plan) and max(capacity(plan["0"])) <= tiny.layouts["0"].rows_per_shard


def test_one_device_has_nothing_to_overflow():
    with jax.set_mesh(make_mesh(1, 1, jax.devices()[:1])):
        planner = Planner(store_of(1))
        for batch in (all_equal(), all_distinct()):
            assert planner(batch)["0"].routes is None
    assert planner.replanned == 0


def test_ids_that_are_no_rows_stop_the_run(monkeypatch):
    honest, spec = store_module.ngram_row_ids, jax.P(BATCH)

    def damaged(constants, layer, tokens, segments):
        ids = honest(constants, layer, tokens, segments)
        return ids.at[5, 3, 1].set(10**6 if layer == 2 else 0, out_sharding=spec)

    monkeypatch.setattr(store_module, "ngram_row_ids", damaged)
    with pytest.raises(RunError, match="Layer 0, head 1, sequence 5, position 3: the row id lies outside its head"):
        Planner(store_of())(zipfian(0))


# --- training through it ---


@cache
def step_of(devices):
    store = store_of(devices)

    def step(state, plan, k):
        rows = store.fetch(state, plan, k)
        grads = jax.tree.map(lambda r: jnp.sin(3 * r) + 0.1, rows)
        return store.update(state, plan, store.reduce(plan, grads), k), rows

    return jax.jit(step)


def train(plans, state=None, start=0):
    """(state, rows seen at each step), on the host."""
    state, seen = store_of().init(jax.random.key(1)) if state is None else state, []
    for k, plan in enumerate(plans, start):
        state, rows = step_of(8)(state, plan, jnp.int32(k))
        seen.append(jax.device_get(rows))
    return jax.device_get(state), seen


def batches(start=0):
    """Long runs of easy batches with hard ones in between."""
    for k in itertools.count(start):
        yield all_equal() if k in (0, 5) else all_distinct(k) if k in (2, 6) else zipfian(k)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def undisturbed():
    """Eight steps with room for any batch."""
    with jax.set_mesh(make_mesh(2, 4)):
        plan = jax.jit(store_of().plan)
        return train([plan(*batch.values()) for batch in itertools.islice(batches(), 8)])


def test_planned_steps_are_the_bits_of_roomy_ones(undisturbed):
    planner = Planner(store_of(), lambda line: None)
    plans = [planner(batch) for batch in itertools.islice(batches(), 8)]
    assert planner.replanned > 0 and len({tuple(given(plan).items()) for plan in plans}) > 1
    state, seen = train(plans)
    assert_same(seen, undisturbed[1])
    assert_same(state, undisturbed[0])


def test_batches_keep_their_order_and_their_plans():
    planner = Planner(store_of(), lambda line: None)
    drawn = []

    def draw():
        for batch in batches():
            drawn.append(batch)
            yield batch

    planned, plan_of = PlannedBatches(draw(), planner), jax.jit(store_of().plan)
    for k in range(6):
        if k % 2:
            following = planned.following
        batch, plan = planned.current
        assert batch is drawn[k] and planned.current[1] is plan
        assert len(drawn) <= k + PlannedBatches.AHEAD
        assert fits(plan)
        assert_same(plan["2"].ids_BTH, plan_of(*batch.values())["2"].ids_BTH)
        if k % 2:
            assert planned.following is following
            planned.advance()
            assert planned.current[1] is following
        else:
            planned.advance()


@pytest.mark.slow
def test_a_resumed_run_sees_the_same_batches(undisturbed):
    """It draws ahead, tunes anew, and ends in the same bits."""

    def run(batches, steps, state=None, start=0):
        planned = PlannedBatches(batches, Planner(store_of(), lambda line: None))

        def plans():
            for _ in range(steps):
                yield planned.current[1]
                planned.advance()

        return train(plans(), state, start)

    half, first = run(batches(), 3)
    sharded = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), half, store_of().init(jax.random.key(2)))
    state, second = run(batches(3), 5, sharded, 3)
    assert_same(first + second, undisturbed[1])
    assert_same(state, undisturbed[0])
