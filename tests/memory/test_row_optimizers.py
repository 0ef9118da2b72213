"""Catch-up Adam against dense Adam, dense Adam against optax, row-wise rules against NumPy; what all rules share."""

from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.config import ConfigError, OptimizerConfig
from engram_jax.memory.quantized import FrozenFP8
from engram_jax.memory.row_optimizers import (
    CatchUpAdam,
    DenseAdam,
    LazyAdam,
    RowwiseAdagrad,
    RowwiseRMSprop,
    bytes_per_row,
)
from engram_jax.optimizers.schedules import learning_rates
from engram_jax.registries import ROW_OPTIMIZERS

pytestmark = pytest.mark.newest

ROWS, WIDTH, LOOKUPS = 3000, 8, 64


def schedule(steps, peak=2e-3):
    """Warm-up and two decays."""
    config = OptimizerConfig(learning_rate=peak, warmup_steps=steps // 20)
    return learning_rates(config, steps)


def zipf_ids(rng, count):
    ranks = np.minimum(rng.zipf(1.1, count) - 1, ROWS - 1)
    return (ranks * 1_000_003 % ROWS).astype(np.int32)


def gradient_of(rows_LD, key):
    """Noise about a pull to a fixed place: gradients that depend on the rows read, so errors feed back."""
    return 0.3 * (rows_LD - 0.5) + jax.random.normal(key, rows_LD.shape)


def simulate(optimizer, steps, seed=0, lazy=False):
    """Rows [ROWS, WIDTH] after `steps` updates of Zipf-distributed rows, and the start."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(np.stack([zipf_ids(rng, LOOKUPS) for _ in range(steps)]))
    start = jnp.asarray(rng.normal(size=(ROWS, WIDTH)) * 0.02, jnp.float32)

    def one_step(carry, step_ids):
        table, slots = carry
        step, ids_L = step_ids
        unique_U, slot_L = jnp.unique(ids_L, size=LOOKUPS, fill_value=ROWS, return_inverse=True)
        batch, batch_slots = jax.tree.map(lambda a: a.at[unique_U].get(mode="fill", fill_value=0), (table, slots))
        if lazy:  # what sparse optimizers usually do: rows stand still while nobody reads them
            batch_slots = batch_slots | {"last_step": jnp.full_like(batch_slots["last_step"], step)}
        batch, batch_slots = optimizer.read(batch, batch_slots, step)
        seen_LD = batch[slot_L]
        grads_LD = gradient_of(seen_LD, jax.random.fold_in(jax.random.key(1), step))
        grads_UD = jax.ops.segment_sum(grads_LD, slot_L, LOOKUPS)
        if optimizer.whole_table:
            grads_RD = jnp.zeros_like(table).at[unique_U].add(grads_UD, mode="drop")
            return optimizer.update(table, slots, grads_RD, step), None
        new = optimizer.update(batch, batch_slots, grads_UD, step)
        return jax.tree.map(lambda a, b: a.at[unique_U].set(b, mode="drop"), (table, slots), new), None

    steps_ids = (jnp.arange(steps, dtype=jnp.int32), ids)
    (table, slots), _ = jax.jit(lambda s: jax.lax.scan(one_step, (s, optimizer.init(s)), steps_ids))(start)
    if not lazy:
        table, _ = jax.jit(optimizer.read)(table, slots, np.int32(steps))
    return np.asarray(table, np.float64), np.asarray(start, np.float64)


def test_catch_up_equals_dense_over_2000_steps_where_lazy_does_not():
    rates = schedule(2000)
    dense, start = simulate(DenseAdam(rates), 2000)
    caught_up, _ = simulate(CatchUpAdam(rates), 2000)
    lazy, _ = simulate(CatchUpAdam(rates), 2000, lazy=True)
    moved = np.abs(dense - start).mean()
    assert np.abs(caught_up - dense).mean() <= 1e-3 * moved
    assert np.abs(caught_up - dense).max() <= 1e-2 * moved
    assert np.abs(lazy - dense).mean() > 0.3 * moved


def test_dense_adam_is_optax_adam():
    rates, rng = schedule(60), np.random.default_rng(3)
    ours, reference = DenseAdam(rates, eps=1e-8), optax.adam(lambda k: jnp.asarray(rates)[k], 0.9, 0.95, 1e-8)
    rows = expected = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    slots, opt_state = ours.init(rows), reference.init(rows)

    @jax.jit
    def update(rows, slots, expected, opt_state, grads, step):
        updates, opt_state = reference.update(grads, opt_state)
        return *ours.update(rows, slots, grads, step), optax.apply_updates(expected, updates), opt_state

    for step in range(60):
        grads = (rng.normal(size=(5, 3)) * (rng.random((5, 1)) < 0.5)).astype(np.float32)
        rows, slots, expected, opt_state = update(rows, slots, expected, opt_state, grads, np.int32(step))
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("waited", [0, 1, 2, 17, 400, 1500])
def test_one_wait_equals_the_steps_it_stands_for(waited):
    """Against float64 Adam with zero gradients, step by step, across warm-up and both decays."""
    rates = schedule(1800)
    rng = np.random.default_rng(waited)
    p, m, v = rng.normal(size=(3, 4, 6))
    v = v**2
    touched = 30
    optimizer = CatchUpAdam(rates)
    slots = {"m": jnp.float32(m), "v": jnp.float32(v), "last_step": jnp.full((4,), touched, jnp.int32)}
    rows, slots = jax.jit(optimizer.read)(jnp.float32(p), slots, np.int32(touched + waited))
    for k in range(touched + 1, touched + waited + 1):
        m, v = 0.9 * m, 0.95 * v
        p = p - rates[k - 1] * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.95**k)) + 1e-20)
    np.testing.assert_allclose(rows, p, rtol=1e-5, atol=2e-7)
    np.testing.assert_allclose(slots["m"], m, rtol=2e-4, atol=1e-30)
    np.testing.assert_allclose(slots["v"], v, rtol=2e-4, atol=1e-30)
    assert np.all(slots["last_step"] == touched + waited)


def test_epsilon_error_stays_within_the_stated_bound():
    rates, eps = np.full(800, 1e-2), 1e-6
    g = np.float64(1e-4)  # sqrt(v) = 2.2e-5 after one step
    m, v = 0.1 * g, 0.05 * g**2
    slots = {"m": jnp.float32([[m]]), "v": jnp.float32([[v]]), "last_step": jnp.int32([600])}
    rows, _ = jax.jit(CatchUpAdam(rates, eps=eps).read)(np.zeros((1, 1), np.float32), slots, np.int32(800))
    p, ratio, root = 0.0, abs(m) / np.sqrt(v), np.sqrt(v)
    for k in range(601, 801):
        m, v = 0.9 * m, 0.95 * v
        p -= rates[k - 1] * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.95**k)) + eps)
    error = abs(float(rows[0, 0]) - p)
    assert 0 < error <= rates[0] * ratio * (eps / root) * 0.9 / (0.95 - 0.9)


def test_a_row_never_touched_never_moves_and_a_run_may_outlast_its_schedule():
    rates = schedule(100)
    optimizer = CatchUpAdam(rates)
    rows = jnp.ones((2, 3))
    slots = optimizer.init(rows)
    read = jax.jit(optimizer.read)
    np.testing.assert_array_equal(read(rows, slots, np.int32(100))[0], rows)
    touched = {"m": rows, "v": rows, "last_step": jnp.full((2,), 90, jnp.int32)}
    late, _ = read(rows, touched, np.int32(140))
    longer = CatchUpAdam(np.concatenate([rates, np.full(200, rates[-1])]))
    longer, _ = jax.jit(longer.read)(rows, touched, np.int32(140))
    np.testing.assert_allclose(late, longer, rtol=1e-5)


# --- lazy Adam ---


def test_lazy_adam_is_adam_at_the_steps_that_touch_a_row_counted_from_the_start():
    """A loop over rows and steps in float64. Dense Adam, fed the same gradients, goes elsewhere."""
    start, grads, touched = rowwise_case(steps=200, rows=12, width=3)
    rates = schedule(200)[:200]
    rows, slots = run_touched(LazyAdam(rates), start, grads, touched)
    p, m, v = start.copy(), np.zeros(start.shape), np.zeros(start.shape)
    for step in range(200):
        for row in np.flatnonzero(touched[step]):
            g, k = grads[step, row], step + 1
            m[row] = 0.9 * m[row] + 0.1 * g
            v[row] = 0.95 * v[row] + 0.05 * g**2
            p[row] -= rates[step] * (m[row] / (1 - 0.9**k)) / (np.sqrt(v[row] / (1 - 0.95**k)) + 1e-20)
    np.testing.assert_allclose(rows, p, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(slots["m"], m, rtol=1e-4, atol=1e-6 * np.abs(m).max())
    np.testing.assert_allclose(slots["v"], v, rtol=1e-4, atol=1e-30)
    np.testing.assert_array_equal(rows[7], jnp.float32(start[7]))  # never touched
    dense, _ = run_touched(DenseAdam(rates), start, grads * touched[..., None], np.ones_like(touched))
    rare = np.flatnonzero((touched.sum(0) > 0) & (touched.sum(0) < 20))
    assert len(rare) and np.all(np.abs(dense - p)[rare].mean(1) > 0.2 * np.abs(np.asarray(dense) - start)[rare].mean(1))


# --- row-wise rules ---


def rowwise_case(steps=400, rows=40, width=5):
    """Start [rows, width], gradients [steps, rows, width], and who is touched [steps, rows]: some rarely, one never."""
    rng = np.random.default_rng(11)
    touched = rng.random((steps, rows)) < np.geomspace(0.005, 0.9, rows)
    touched[:, 7] = False
    sizes = np.exp(rng.normal(size=(1, rows, 1)) * 4)  # rows whose gradients differ by orders of magnitude
    return rng.normal(size=(rows, width)), rng.normal(size=(steps, rows, width)) * sizes, touched


def run_touched(optimizer, start, grads, touched):
    """Only touched rows are read, updated and written, as a store does."""

    def one_step(carry, inputs):
        step, grads_RD, touched_R = inputs
        rows, slots = optimizer.read(*carry, step)
        new = optimizer.update(rows, slots, grads_RD, step)
        return jax.tree.map(lambda a, b: jnp.where(touched_R.reshape(-1, *[1] * (a.ndim - 1)), b, a), carry, new), None

    start = jnp.float32(start)
    inputs = (jnp.arange(len(grads), dtype=jnp.int32), jnp.float32(grads), jnp.asarray(touched))
    (rows, slots), _ = jax.jit(lambda s: jax.lax.scan(one_step, (s, optimizer.init(s)), inputs))(start)
    return jax.jit(optimizer.read)(rows, slots, np.int32(len(grads)))


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_rowwise_rmsprop_equals_the_dense_rule(b2):
    start, grads, touched = rowwise_case()
    rates = schedule(len(grads), peak=0.05)[: len(grads)]
    rows, slots = run_touched(RowwiseRMSprop(rates, b2), start, grads, touched)
    p, v = start.copy(), np.zeros(len(start))
    for k, (g, rate) in enumerate(zip(grads * touched[..., None], rates, strict=True), start=1):
        v = b2 * v + (1 - b2) * (g**2).mean(1)
        p -= rate * g / (np.sqrt(v / (1 - b2**k)) + 1e-20)[:, None]
    assert np.abs(p - start).mean() > 0.4
    np.testing.assert_allclose(rows, p, rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(slots["v"], v, rtol=2e-5, atol=1e-30)
    np.testing.assert_array_equal(rows[7], jnp.float32(start[7]))


def test_rowwise_adagrad_equals_the_dense_rule():
    start, grads, touched = rowwise_case()
    rates = schedule(len(grads), peak=0.05)[: len(grads)]
    rows, slots = run_touched(RowwiseAdagrad(rates), start, grads, touched)
    p, v = start.copy(), np.zeros(len(start))
    for g, rate in zip(grads * touched[..., None], rates, strict=True):
        v += (g**2).mean(1)
        p -= rate * g / (np.sqrt(v) + 1e-20)[:, None]
    assert np.abs(p - start).mean() > 0.05
    np.testing.assert_allclose(rows, p, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(slots["v"], v, rtol=1e-5)
    np.testing.assert_array_equal(rows[7], jnp.float32(start[7]))


@pytest.mark.parametrize("rule", [RowwiseAdagrad, RowwiseRMSprop])
def test_a_gradient_of_zero_is_not_divided_by_zero(rule):
    optimizer, rows = rule(np.ones(1)), jnp.ones((1, 4))
    new, _ = optimizer.update(rows, optimizer.init(rows), jnp.zeros((1, 4)), jnp.int32(0))
    np.testing.assert_array_equal(new, rows)


# --- what all rules share ---


def test_every_choice_of_the_config_is_a_rule_and_every_rule_a_choice():
    choices = get_type_hints(OptimizerConfig)["table_optimizer"].__args__
    assert set(choices) == set(ROW_OPTIMIZERS)


@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_bfloat16_rows_have_float32_slots_and_are_read_as_float32(name):
    optimizer = ROW_OPTIMIZERS[name].create(OptimizerConfig(), schedule(10))
    rows = jnp.full((3, 8), 1.5, jnp.bfloat16)
    slots = optimizer.init(rows)
    assert {slot.dtype.name for slot in slots.values()} <= {"float32", "int32"}
    assert all(len(slot) == len(rows) for slot in slots.values())
    read, slots = optimizer.read(rows, slots, jnp.int32(4))
    assert read.dtype == jnp.float32
    np.testing.assert_array_equal(read, 1.5)
    grads = jnp.ones((3, 8))
    if optimizer.whole_table:
        new, new_slots = optimizer.update_table(rows, slots, grads, jnp.int32(4), jnp.ones(3, bool), lambda x: x)
    else:
        new, new_slots = optimizer.update(read, slots, grads, jnp.int32(4))
    assert new.dtype == jnp.float32 and np.all(new == 1.5 if name == "frozen" else new < 1.5)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new_slots) == jax.tree.map(lambda a: (a.shape, a.dtype), slots)


def test_the_config_reaches_the_rules():
    config, rates = OptimizerConfig(adam_b1=0.8, adam_b2=0.9, adam_eps=1e-9), schedule(10)
    for name in ("catch_up_adam", "dense_adam", "lazy_adam"):
        rule = ROW_OPTIMIZERS[name].create(config, rates)
        assert (rule.b1, rule.b2, rule.eps) == (0.8, 0.9, 1e-9)
    rms, adagrad = RowwiseRMSprop.create(config, rates), RowwiseAdagrad.create(config, rates)
    assert (rms.b2, rms.eps, adagrad.eps) == (0.9, 1e-9, 1e-9)
    assert all(rule.learning_rates is rates for rule in (rms, adagrad))


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("catch_up_adam", 8 * 80 + 4),
        ("dense_adam", 8 * 80),
        ("lazy_adam", 8 * 80),
        ("rowwise_adagrad", 4),
        ("rowwise_rmsprop", 8),
        ("sinkhorn", 4 * 80),
    ],
)
def test_bytes_per_row(name, state):
    optimizer = ROW_OPTIMIZERS[name].create(OptimizerConfig(), schedule(10))
    assert bytes_per_row(optimizer, 80) == (4 * 80, state)
    assert bytes_per_row(optimizer, 80, jnp.bfloat16) == (2 * 80, state)


def test_bytes_per_row_of_shipped_rows():
    assert bytes_per_row(FrozenFP8(), 256, jnp.float8_e4m3fn) == (256, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sinkhorn_iters", 10), ("sinkhorn_iters", -1), ("sinkhorn_momentum", 1.0), ("sinkhorn_tau", -0.1)],
)
def test_settings_that_cannot_work_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        OptimizerConfig(**{field: value})
