"""Plans and summed gradients against NumPy, on ids that repeat, fill the table, or are all one."""

import jax
import numpy as np
import pytest

from engram_jax.memory import routing

pytestmark = pytest.mark.newest
ROWS = 50


def id_batches():
    rng = np.random.default_rng(0)
    return {
        "uniform": rng.integers(0, ROWS, (2, 7, 4)),
        "zipf": np.minimum(rng.zipf(1.3, (2, 7, 4)) - 1, ROWS - 1),
        "all equal": np.full((2, 7, 4), 13),
        "all distinct": rng.permutation(ROWS)[:48].reshape(2, 6, 4),
        "ends of the table": np.array([0, ROWS - 1, 0, ROWS - 1]).reshape(1, 1, 4),
    }


@pytest.mark.parametrize("name", id_batches())
def test_gather_spread_and_sum_equal_numpy(name):
    ids = id_batches()[name].astype(np.int32)
    rng = np.random.default_rng(1)
    table, grads = rng.normal(size=(ROWS, 3)).astype(np.float32), rng.normal(size=(*ids.shape, 3)).astype(np.float32)

    @jax.jit
    def run(table, ids, grads):
        plan = routing.plan_rows(ids, ROWS)
        rows = routing.take(table, plan)
        summed = routing.gather_gradients(grads, plan)
        return plan, routing.spread(rows, plan), routing.put(table, plan, rows + 1), summed

    plan, seen, written, summed = run(table, ids, grads)
    distinct = np.unique(ids)
    np.testing.assert_array_equal(plan.unique_U[: len(distinct)], distinct)
    assert np.all(np.asarray(plan.unique_U[len(distinct) :]) >= ROWS)
    assert np.all(np.diff(plan.unique_U) > 0)
    np.testing.assert_array_equal(seen, table[ids])

    dense = np.zeros_like(table)
    np.add.at(dense, ids.reshape(-1), grads.reshape(-1, 3))
    np.testing.assert_allclose(summed[: len(distinct)], dense[distinct], rtol=1e-5, atol=1e-6)
    assert not np.any(summed[len(distinct) :])

    expected = table.copy()
    expected[distinct] += 1
    np.testing.assert_array_equal(written, expected)  # touched rows changed, untouched ones did not
