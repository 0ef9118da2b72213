"""The TPU kernels of the grouped matmul, interpreted, against one product per group; rows beyond the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.grouped_matmul import _kernels, grouped_matmul


@pytest.mark.parametrize("counts", [[100, 0, 60, 40], [0, 0, 0, 200], [3, 5, 7, 9], [0, 130, 0, 126]])
@pytest.mark.parametrize("matmul", [grouped_matmul, lambda x, w, n: _kernels(x, w, n, True)], ids=["ragged", "kernels"])
def test_one_product_per_group_in_value_and_gradients(matmul, counts, rng):
    S, D, F = 300, 24, 40
    x, weight, target = rng.normal(size=(S, D)), rng.normal(size=(4, D, F)), rng.normal(size=(S, F))
    group = np.repeat(np.arange(4), counts)
    real = len(group)

    def loss(x, weight):
        y = matmul(x, weight, jnp.asarray(counts, jnp.int32))[:real]
        return jnp.sum((y - target[:real]) ** 2)

    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
    got, (d_x, d_weight) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays)
    y = np.einsum("sd,sdf->sf", x[:real], weight[group])
    d_y = 2 * (y - target[:real])
    expected = np.zeros_like(weight)
    np.add.at(expected, group, np.einsum("sd,sf->sdf", x[:real], d_y))
    np.testing.assert_allclose(got, np.sum((y - target[:real]) ** 2), rtol=1e-4)
    np.testing.assert_allclose(d_x[:real], np.einsum("sf,sdf->sd", d_y, weight[group]), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(d_weight, expected, rtol=1e-3, atol=1e-2)
