"""mHC against a NumPy loop of its equations, Sinkhorn's promises, and the behaviour at initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from engram_jax.config import ConfigError
from engram_jax.layers.hyper_connections import HyperConnection, read_streams, sinkhorn, write_streams
from engram_jax.sharding import spec

pytestmark = pytest.mark.newest

IMPL = "rbg"  # its initializers compile in a fifth of the time


def make(streams=4, iters=20, gate=0.01, hidden=12):
    return jax.jit(
        lambda: HyperConnection(hidden, streams, iters, gate, 1e-20, rngs=nnx.Rngs(jax.random.key(5, impl=IMPL)))
    )()


@jax.jit
def step(layer, x_BTMD, y_BTD):
    """What the sub-layer reads, and the streams after it answered y."""
    pre, post, res = layer.coefficients(x_BTMD)
    return read_streams(x_BTMD, pre), write_streams(x_BTMD, y_BTD, post, res), res


def loop_sinkhorn(logits, iters):
    p = np.exp(logits)
    for _ in range(iters):
        for j in range(p.shape[1]):
            p[:, j] /= p[:, j].sum()
        for i in range(p.shape[0]):
            p[i] /= p[i].sum()
    return p


def loop_step(layer, x, y):
    """One token: x [M, D], y [D] -> the sub-layer's input and the next streams (mHC, arXiv 2512.24880, section 4)."""
    w = {name: np.asarray(a, np.float64) for name, a in nnx.to_pure_dict(nnx.state(layer)).items()}
    M = x.shape[0]
    v = x.reshape(-1) / np.sqrt((x**2).mean())
    pre = 1 / (1 + np.exp(-(w["alpha"][0] * (v @ w["phi_pre_cm"]) + w["bias_pre"])))
    post = 2 / (1 + np.exp(-(w["alpha"][1] * (v @ w["phi_post_cm"]) + w["bias_post"])))
    res = loop_sinkhorn(w["alpha"][2] * (v @ w["phi_res_cm"]).reshape(M, M) + w["bias_res"], layer.sinkhorn_iters)
    h = sum(pre[m] * x[m] for m in range(M))
    return h, np.stack([sum(res[i, j] * x[j] for j in range(M)) + post[i] * y for i in range(M)])


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_equals_a_loop_over_tokens(streams, rng):
    x, y = rng.normal(size=(2, 3, streams, 12)), rng.normal(size=(2, 3, 12))
    with jax.enable_x64(True):
        layer = make(streams, gate=0.7)
        layer.bias_res[...] = jnp.asarray(rng.normal(size=(streams, streams)), jnp.float32)
        h, written, _ = jax.device_get(step(layer, jnp.asarray(x), jnp.asarray(y)))
    for b, t in np.ndindex(2, 3):
        expected_h, expected_streams = loop_step(layer, x[b, t], y[b, t])
        np.testing.assert_allclose(h[b, t], expected_h, rtol=0, atol=1e-12)
        np.testing.assert_allclose(written[b, t], expected_streams, rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences(rng):
    with jax.enable_x64(True):
        graphdef, params = nnx.split(make(3, gate=0.7))
        params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
        x, y, g = (jnp.asarray(rng.normal(size=s)) for s in ((2, 3, 3, 12), (2, 3, 12), (2, 3, 3, 12)))

        def loss(params, x, y):
            pre, post, res = nnx.merge(graphdef, params).coefficients(x)
            return jnp.sum(g * write_streams(x, y * read_streams(x, pre), post, res))

        check_grads(jax.jit(loss), (params, x, y), order=1, modes=["rev"], eps=1e-5, rtol=1e-6, atol=1e-6)


def test_sinkhorn_is_doubly_stochastic_and_undisturbed_by_row_and_column_factors(rng):
    # Within 3 of each other: every iteration then contracts by tanh(3/2)^2 = 0.82 or more (Birkhoff), 200 by 5e-18.
    logits = rng.uniform(-1.5, 1.5, (5, 7, 4, 4))
    with jax.enable_x64(True):
        factors = 50 * rng.normal(size=(5, 7, 1, 4)) + rng.normal(size=(5, 7, 4, 1)) + 900
        p = jax.device_get(sinkhorn(jnp.asarray(logits), 200))
        shifted = jax.device_get(sinkhorn(jnp.asarray(logits + factors), 200))
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(p.sum(-2), 1, atol=1e-9)
    np.testing.assert_allclose(p, shifted, atol=1e-9)
    np.testing.assert_allclose(p[2, 3], loop_sinkhorn(logits[2, 3], 200), atol=1e-12)
    np.testing.assert_allclose(sinkhorn(jnp.asarray(logits, jnp.float32), 20).sum(-1), 1, atol=1e-6)


def test_at_the_start_it_is_a_plain_residual_stream(rng):
    layer = make(gate=0.0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 12), (2, 5, 12)))
    x_BTMD = jnp.tile(x[:, :, None], (1, 1, 4, 1))
    h, written, res = step(layer, x_BTMD, y)
    np.testing.assert_allclose(h, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(written, jnp.tile((x + y)[:, :, None], (1, 1, 4, 1)), atol=1e-5)
    np.testing.assert_allclose(res, np.broadcast_to(np.eye(4), res.shape), atol=0.01)


def test_the_initial_gate_is_a_small_token_dependent_part():
    x = jax.random.normal(jax.random.key(1), (2, 64, 4, 12))
    spread = [
        np.asarray(c.std((0, 1))).max() for c in jax.jit(lambda layer, x: layer.coefficients(x))(make(gate=0.01), x)
    ]
    assert all(0 < s < 0.02 for s in spread)


def test_all_zero_streams_have_finite_gradients():
    def loss(layer, x):
        pre, post, res = layer.coefficients(x)
        return jnp.sum(write_streams(x, read_streams(x, pre), post, res))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(make(), jnp.zeros((1, 2, 4, 12)))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_one_stream_is_refused():
    with pytest.raises(ConfigError, match="hc_mult=1"):
        make(streams=1)


def test_a_mesh_gives_the_single_device_output_and_gradients(mesh):
    x = jax.random.normal(jax.random.key(1), (8, 6, 4, 12))

    @jax.jit
    def run(layer, x):
        def loss(layer, x):
            pre, post, res = layer.coefficients(x)
            y = write_streams(x, jnp.sin(read_streams(x, pre)), post, res)
            return jnp.mean(y**2), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, nnx.to_pure_dict(nnx.state(grads[0])), grads[1]

    expected = run(make(gate=0.5), x)
    with jax.set_mesh(mesh):
        got = run(make(gate=0.5), jax.device_put(x, jax.NamedSharding(mesh, spec("batch", "seq"))))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())


def test_bfloat16_streams_get_float32_coefficients():
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 12))
    coefficients_of = jax.jit(lambda layer, x: layer.coefficients(x))
    coefficients, exact = (coefficients_of(make(gate=0.5), a) for a in (x.astype(jnp.bfloat16), x))
    for got, want in zip(coefficients, exact, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=0.01)
    assert read_streams(x.astype(jnp.bfloat16), coefficients[0]).dtype == jnp.bfloat16
