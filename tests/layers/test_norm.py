"""RMS norm against NumPy, and at the two places where eps matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers.norm import RMSNorm, rms_norm

pytestmark = pytest.mark.newest


def reference(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


@pytest.mark.parametrize("eps", [1e-20, 1e-5, 3.0])
@pytest.mark.parametrize("gain_shape", [(16,), (3, 16)])
def test_equals_numpy_and_finite_differences_in_float64(eps, gain_shape, rng):
    x, gain, g = rng.normal(size=(5, 3, 16)), rng.normal(size=gain_shape), rng.normal(size=(5, 3, 16))
    dx, dgain = rng.normal(size=x.shape), rng.normal(size=gain.shape)
    with jax.enable_x64(True):
        y, vjp = jax.vjp(lambda x, gain: rms_norm(x, gain, eps), jnp.asarray(x), jnp.asarray(gain))
        y, gx, ggain = jax.device_get((y, *vjp(jnp.asarray(g))))
    np.testing.assert_allclose(y, reference(x, gain, eps), rtol=1e-12)
    h = 1e-5
    slope = (reference(x + h * dx, gain + h * dgain, eps) - reference(x - h * dx, gain - h * dgain, eps)) / (2 * h)
    np.testing.assert_allclose((gx * dx).sum() + (ggain * dgain).sum(), (slope * g).sum(), rtol=1e-6, atol=1e-6)


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient_in_float32():
    x = jnp.zeros((2, 8)).at[1].set(1e-3)
    y, vjp = jax.vjp(lambda x, gain: rms_norm(x, gain, 1e-20), x, jnp.full(8, 2.0))
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_allclose(y[1], 2, rtol=1e-6)
    gx, ggain = vjp(jnp.ones_like(y))
    np.testing.assert_allclose(gx[0], 2e10, rtol=1e-5)
    np.testing.assert_allclose(ggain, 1, rtol=1e-6)


def test_bfloat16_is_normalised_in_float32(rng):
    norm = RMSNorm(512, 1e-20)
    x = jnp.asarray(rng.normal(size=(4, 512)), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    exact = jnp.asarray(reference(np.asarray(x, np.float64), 1.0, 1e-20), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(exact, np.float32), rtol=2**-7)
