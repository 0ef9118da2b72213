"""Sinkhorn momentum against float64 NumPy, on one device and eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import OptimizerConfig
from engram_jax.memory.row_optimizers import SinkhornMomentum
from engram_jax.memory.row_optimizers.sinkhorn import balance
from engram_jax.memory.table import TableLayout

pytestmark = pytest.mark.newest

RATES = np.linspace(1e-2, 2e-2, 40)
LAYOUT = TableLayout((23, 29, 31), shards=8)
WIDTH = 6


def reference(rows, grads, rates=RATES, b=0.95, iterations=11, tau=1e-3, rms=0.18):
    """The published algorithm as written: rows and momentum after all steps of `grads` [steps, rows, D], float64."""
    rows, m = rows.astype(np.float64), np.zeros(rows.shape)
    for g, rate in zip(grads.astype(np.float64), rates, strict=False):
        m = b * m + (1 - b) * g
        x = b * m + (1 - b) * g
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.where(norms <= tau * norms.mean(), 0, x)
        for i in range(iterations):
            x = x / (np.linalg.norm(x, axis=(i + 1) % 2, keepdims=True) + 1e-20)
        rows = rows - rms * rate * np.sqrt(rows.shape[1]) * x
    return rows, m


def run(optimizer, rows, grads):
    """All steps on one device: rows and slots."""
    rows, is_row = jnp.float32(rows), jnp.ones(len(rows), bool)
    slots = optimizer.init(rows)
    update = jax.jit(lambda r, s, g, k: optimizer.update_table(r, s, g, k, is_row, lambda x: x))
    for step, g in enumerate(grads):
        rows, slots = update(rows, slots, jnp.float32(g), jnp.int32(step))
    return rows, slots


def zipf_gradients(rng, steps, rows):
    """Most rows are touched rarely, some never, and sizes and columns differ a hundredfold."""
    touched = rng.random((steps, rows, 1)) < np.geomspace(1, 0.01, rows)[:, None]
    touched[:, -5:] = False
    return rng.normal(size=(steps, rows, WIDTH)) * touched * np.geomspace(1e-4, 1e-6, WIDTH)


def test_equals_the_published_algorithm():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(LAYOUT.num_rows, WIDTH)).astype(np.float32)
    grads = zipf_gradients(rng, 40, len(start))
    rows, slots = run(SinkhornMomentum(RATES), start, grads)
    expected, m = reference(start, grads)
    assert np.abs(expected - start).mean() > 0.02
    np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(slots["m"], m, rtol=1e-5, atol=1e-12)
    assert set(slots) == {"m"}


def test_balance_is_the_plain_loop_and_balances():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, WIDTH)) * np.geomspace(1, 1e-3, WIDTH) * np.exp(rng.normal(size=(200, 1)))
    x[3], x[:, 4] = 0, 0
    ours = np.asarray(balance(jnp.float32(x), 11, lambda x: x))
    for i in range(11):
        x = x / (np.linalg.norm(x, axis=(i + 1) % 2, keepdims=True) + 1e-20)
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.delete(np.linalg.norm(ours, axis=1), 3), 1, rtol=1e-6)
    columns = np.delete(np.linalg.norm(ours, axis=0), 4)
    np.testing.assert_allclose(columns, columns.mean(), rtol=2e-2)  # a factor of 1000 before


def test_eight_shards_with_garbage_in_their_padding_equal_one():
    rng = np.random.default_rng(2)
    start = rng.normal(size=(LAYOUT.num_rows, WIDTH)).astype(np.float32)
    grads = zipf_gradients(rng, 8, len(start)).astype(np.float32)
    # at this tau some rows move with their shard's mean that do not move with the table's, and the other way round
    optimizer, order = SinkhornMomentum(RATES, tau=0.3), LAYOUT.logical_order()
    expected, expected_slots = run(optimizer, start, grads)

    def local(rows_RD, m_RD, grads_RD, step):
        is_row_R = LAYOUT.logical(jax.lax.axis_index("x"), jnp.arange(len(rows_RD))) < LAYOUT.num_rows
        rows, slots = optimizer.update_table(
            rows_RD, {"m": m_RD}, grads_RD, step, is_row_R, lambda x: jax.lax.psum(x, "x")
        )
        return rows, slots["m"]

    rows = np.full((8 * LAYOUT.rows_per_shard, WIDTH), np.nan, np.float32)
    assert len(rows) > LAYOUT.num_rows
    m = np.full_like(rows, 1e9)
    rows[order], m[order] = start, 0
    mesh = jax.make_mesh((8,), ("x",))
    P = jax.P("x")
    update = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P, P, P, jax.P()), out_specs=(P, P)))
    with jax.set_mesh(mesh):
        for step, g in enumerate(grads):
            sharded = np.zeros_like(rows, shape=(len(rows), WIDTH), dtype=np.float32)
            sharded[order] = g
            rows, m = update(*(jax.device_put(a, jax.NamedSharding(mesh, P)) for a in (rows, m, sharded)), step)
    rows, m = np.asarray(rows), np.asarray(m)
    np.testing.assert_allclose(rows[order], expected, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(m[order], expected_slots["m"], rtol=1e-6)
    padding = np.setdiff1d(np.arange(len(rows)), order)
    np.testing.assert_array_equal(m[padding], 0)


def test_padding_does_not_count_in_the_mean_norm():
    """Norms 1, 1, 1, 1, 0.4 have the mean 0.88, so 0.4 is at most tau = 0.5 of it.

    With 11 rows of padding counted the mean would be 0.275, and with their garbage NaN.
    """
    optimizer = SinkhornMomentum(RATES, momentum=0.0, tau=0.5)
    grads = np.zeros((16, 4), np.float32)
    grads[:4], grads[4, 0] = np.eye(4), 0.4
    rows, is_row = jnp.ones((16, 4)), jnp.arange(16) < 5
    garbage = {"m": jnp.where(is_row[:, None], 0, jnp.nan) * jnp.ones((1, 4))}
    new, _ = optimizer.update_table(rows, garbage, jnp.float32(grads), jnp.int32(0), is_row, lambda x: x)
    moved = np.any(np.asarray(new != rows), axis=1)
    np.testing.assert_array_equal(moved, [True] * 4 + [False] * 12)


def test_rows_never_touched_never_move_and_moving_ones_move_equally_far():
    rng = np.random.default_rng(3)
    start = rng.normal(size=(50, WIDTH)).astype(np.float32)
    grads = rng.normal(size=(10, 50, WIDTH))
    grads[:, 20:] = 0
    rows, slots = run(SinkhornMomentum(RATES), start, grads)
    np.testing.assert_array_equal(rows[20:], start[20:])
    np.testing.assert_array_equal(slots["m"][20:], 0)
    before, _ = run(SinkhornMomentum(RATES), start, grads[:9])
    rms = np.sqrt(np.square(np.float64(rows) - np.float64(before)).mean(1))
    np.testing.assert_allclose(rms[:20], 0.18 * RATES[9], rtol=1e-4)


def test_a_row_touched_once_stops_when_its_momentum_is_small():
    """0.95^k falls below tau = 0.1 of a steady row's momentum; NumPy says when, and here no later step may move it."""
    rng = np.random.default_rng(4)
    start, grads = np.zeros((2, WIDTH), np.float32), np.ones((80, 2, WIDTH)) + 0.1 * rng.normal(size=(80, 2, WIDTH))
    grads[1:, 1] = 0
    optimizer, rates = SinkhornMomentum(np.ones(80), tau=0.1), np.ones(80)
    path = [run(optimizer, start, grads[:n])[0][1] for n in (1, 5, 60, 80)]
    expected = [reference(start, grads[:n], rates, tau=0.1)[0][1] for n in (1, 5, 60, 80)]
    np.testing.assert_allclose(path, expected, rtol=1e-4)
    assert np.all(np.abs(path[1] - path[0]) > 0.1)
    np.testing.assert_array_equal(path[2], path[3])


def test_without_gradients_nothing_moves():
    rows, _ = run(SinkhornMomentum(RATES), np.ones((4, 3)), np.zeros((2, 4, 3)))
    np.testing.assert_array_equal(rows, 1)


def test_gradients_as_small_as_a_mean_over_many_tokens_makes_them():
    """The update does not depend on the gradients' size, down to 1e-17 per number."""
    rng = np.random.default_rng(5)
    start, grads = np.zeros((30, WIDTH), np.float32), rng.normal(size=(3, 30, WIDTH))
    large, _ = run(SinkhornMomentum(RATES), start, grads)
    small, _ = run(SinkhornMomentum(RATES), start, grads * 1e-17)
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=2e-9)


def test_config_and_single_rows():
    config = OptimizerConfig(sinkhorn_momentum=0.9, sinkhorn_iters=5, sinkhorn_tau=0.01, muon_update_rms=0.2)
    rule = SinkhornMomentum.create(config, RATES)
    assert (rule.momentum, rule.iterations, rule.tau, rule.update_rms) == (0.9, 5, 0.01, 0.2)
    assert rule.whole_table
    rows = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="update_table"):
        rule.update(rows, rule.init(rows), rows, jnp.int32(0))
