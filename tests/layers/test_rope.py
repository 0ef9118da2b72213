"""Rotary embedding against complex numbers, and the property it exists for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.rope import rope

pytestmark = pytest.mark.newest


def reference(x_BTNH, positions_BT, theta):
    half = x_BTNH.shape[-1] // 2
    z = x_BTNH[..., :half] + 1j * x_BTNH[..., half:]
    for i in range(half):
        z[..., i] *= np.exp(1j * positions_BT * theta ** (-2 * i / (2 * half)))[..., None]
    return np.concatenate([z.real, z.imag], axis=-1)


def test_equals_complex_rotation_forward_and_gradient():
    rng = np.random.default_rng()
    x, g = rng.normal(size=(2, 2, 7, 3, 8))
    positions = rng.integers(0, 5000, (2, 7))
    with jax.enable_x64(True):
        y, vjp = jax.vjp(lambda x: rope(x, jnp.asarray(positions), 10_000.0), jnp.asarray(x))
        (gx,) = vjp(jnp.asarray(g))
    np.testing.assert_allclose(y, reference(x, positions, 10_000.0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(gx, reference(g, -positions, 10_000.0), rtol=0, atol=1e-9)  # a rotation's transpose


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng()
    q, k = jnp.asarray(rng.normal(size=(2, 1, 6, 2, 16)), jnp.float32)

    def score(shift):
        positions = jnp.arange(6)[None] + shift
        return jnp.einsum("btnh,bsnh->bnts", rope(q, positions, 100.0), rope(k, positions, 100.0))

    np.testing.assert_allclose(score(0), score(37), atol=2e-5)
    assert np.abs(score(0) - jnp.einsum("btnh,bsnh->bnts", q, k)).max() > 0.1
