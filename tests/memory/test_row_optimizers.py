"""Catch-up Adam against dense Adam, and dense Adam against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.config import OptimizerConfig
from engram_jax.memory import routing
from engram_jax.memory.row_optimizers import CatchUpAdam, DenseAdam
from engram_jax.optimizers.schedules import learning_rates

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
        plan = routing.plan_rows(ids_L[None, :, None], ROWS)
        batch, batch_slots = jax.tree.map(lambda a: routing.take(a, plan), (table, slots))
        if lazy:  # what sparse optimizers usually do: rows stand still while nobody reads them
            batch_slots = batch_slots | {"last_step": jnp.full_like(batch_slots["last_step"], step)}
        batch, batch_slots = optimizer.read(batch, batch_slots, step)
        seen_LD = routing.spread(batch, plan)[0, :, 0]
        grads_LD = gradient_of(seen_LD, jax.random.fold_in(jax.random.key(1), step))
        grads_UD = routing.gather_gradients(grads_LD[None, :, None], plan)
        if optimizer.whole_table:
            grads_RD = jnp.zeros_like(table).at[plan.unique_U].add(grads_UD, mode="drop")
            return optimizer.update(table, slots, grads_RD, step), None
        new = optimizer.update(batch, batch_slots, grads_UD, step)
        return jax.tree.map(lambda a, b: routing.put(a, plan, b), (table, slots), new), None

    steps_ids = (jnp.arange(steps, dtype=jnp.int32), ids)
    (table, slots), _ = jax.jit(lambda s: jax.lax.scan(one_step, (s, optimizer.init(s)), steps_ids))(start)
    if not lazy:
        table, _ = optimizer.read(table, slots, jnp.int32(steps))
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
    for step in range(60):
        grads = jnp.asarray(rng.normal(size=(5, 3)) * (rng.random((5, 1)) < 0.5), jnp.float32)
        rows, slots = ours.update(rows, slots, grads, jnp.int32(step))
        updates, opt_state = reference.update(grads, opt_state)
        expected = optax.apply_updates(expected, updates)
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
    rows, slots = optimizer.read(jnp.float32(p), slots, jnp.int32(touched + waited))
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
    rows, _ = CatchUpAdam(rates, eps=eps).read(jnp.zeros((1, 1)), slots, jnp.int32(800))
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
    read, _ = optimizer.read(rows, slots, jnp.int32(100))
    np.testing.assert_array_equal(read, rows)
    touched = {"m": rows, "v": rows, "last_step": jnp.full((2,), 90, jnp.int32)}
    late, _ = optimizer.read(rows, touched, jnp.int32(140))
    longer, _ = CatchUpAdam(np.concatenate([rates, np.full(200, rates[-1])])).read(rows, touched, jnp.int32(140))
    np.testing.assert_allclose(late, longer, rtol=1e-5)
