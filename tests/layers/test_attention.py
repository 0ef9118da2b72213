"""MLA and GQA against loops in NumPy; causality and document isolation by gradient; one device against a 2x4 mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, ModelConfig
from engram_jax.layers.attention import attention, causal_mask, make_attention
from engram_jax.layers.gqa import GQA
from engram_jax.layers.mla import MLA
from engram_jax.sharding import spec

pytestmark = pytest.mark.newest

IMPL = "rbg"  # its initializers compile in a fifth of the time

KINDS = {
    "mla": AttentionConfig("mla", 2, 2, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=7),
    "gqa": AttentionConfig("gqa", 4, 2, qk_nope_head_dim=4, qk_rope_head_dim=4),
}


def make(kind):
    """A layer whose weights are large enough for scores that matter."""
    config = ModelConfig(hidden_size=16, attention=KINDS[kind], initializer_range=0.4)
    return jax.jit(lambda: make_attention(config, rngs=nnx.Rngs(jax.random.key(3, impl=IMPL))))()


call = jax.jit(lambda layer, *args: layer(*args))


def packed(batch=2, length=11):
    """Segments 1, 2 and padding 0, with positions that restart."""
    segments = np.repeat([[1] * 4 + [2] * 5 + [0] * (length - 9)], batch, axis=0)
    positions = np.repeat([[*range(4), *range(5), *range(length - 9)]], batch, axis=0)
    return jnp.asarray(positions), jnp.asarray(segments)


def loop_attention(q, k, v, segments):
    """One query, one head at a time."""
    B, T, N, H = q.shape
    y = np.zeros((B, T, N, v.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        g = n // (N // k.shape[2])
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        weights = np.exp([q[b, t, n] @ k[b, s, g] / np.sqrt(H) for s in seen])
        y[b, t, n] = sum(w * v[b, s, g] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return y


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def loop_mla(layer, x, positions, segments):
    c = layer.config
    w = {
        name: np.asarray(getattr(layer, name)[...], np.float64)
        for name in ("q_dnh", "kv_down_dr", "kv_up_rnh", "o_nhd")
    }
    q = np.einsum("btd,dnh->btnh", x, w["q_dnh"])
    down = x @ w["kv_down_dr"]
    latent, k_pe = down[..., : c.kv_lora_rank], rotate(down[:, :, None, c.kv_lora_rank :], positions, c.rope_theta)
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True))
    kv = np.einsum("btr,rnh->btnh", latent, w["kv_up_rnh"])
    nope = c.qk_nope_head_dim
    q = np.concatenate([q[..., :nope], rotate(q[..., nope:], positions, c.rope_theta)], -1)
    k = np.concatenate([kv[..., :nope], np.broadcast_to(k_pe, (*kv.shape[:3], c.qk_rope_head_dim))], -1)
    return np.einsum("btnv,nvd->btd", loop_attention(q, k, kv[..., nope:], segments), w["o_nhd"])


def loop_gqa(layer, x, positions, segments):
    q, k, v = (
        np.einsum("btd,dnh->btnh", x, np.asarray(w[...], np.float64)) for w in (layer.q_dnh, layer.k_dgh, layer.v_dgh)
    )
    theta = layer.config.rope_theta
    y = loop_attention(rotate(q, positions, theta), rotate(k, positions, theta), v, segments)
    return np.einsum("btnh,nhd->btd", y, np.asarray(layer.o_nhd[...], np.float64))


@pytest.mark.parametrize(("kind", "loop"), [("mla", loop_mla), ("gqa", loop_gqa)])
def test_layer_equals_a_loop(kind, loop, rng):
    x = rng.normal(size=(2, 11, 16))
    positions, segments = packed()
    with jax.enable_x64(True):
        layer = make(kind)
        y = call(layer, jnp.asarray(x), positions, segments)
    np.testing.assert_allclose(y, loop(layer, x, np.asarray(positions), np.asarray(segments)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_gradients_equal_a_plain_softmax(kv_heads, rng):
    q, k, v = (rng.normal(size=s) for s in ((2, 9, 4, 6), (2, 9, kv_heads, 6), (2, 9, kv_heads, 3)))
    segments = jnp.asarray(rng.integers(0, 3, (2, 9)))

    def plain(q, k, v):
        k, v = (jnp.repeat(a, 4 // kv_heads, axis=2) for a in (k, v))
        visible = jnp.tril(jnp.ones((9, 9), bool))[None] & (segments[:, :, None] == segments[:, None])
        score = jnp.where(visible[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(6), -jnp.inf)
        return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(score), v)

    with jax.enable_x64(True):
        args = tuple(jnp.asarray(a) for a in (q, k, v))
        g = jnp.asarray(rng.normal(size=(2, 9, 4, 3)))
        expected, expected_vjp = jax.vjp(jax.jit(plain), *args)
        y, vjp = jax.vjp(jax.jit(lambda *a: attention(*a, causal_mask(9, segments))), *args)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
        for got, want in zip(vjp(g), expected_vjp(g), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("with_segments", [True, False])
def test_reads_exactly_the_past_of_its_own_document(kind, with_segments):
    layer, x = make(kind), jax.random.normal(jax.random.key(1), (1, 11, 16))
    positions, segments = packed(batch=1)
    jacobian = jax.jit(jax.jacrev(lambda x: layer(x, positions, segments if with_segments else None).sum(-1)[0]))(x)
    reads_TS = np.abs(jacobian[:, 0]).max(-1) > 0
    same = np.asarray(segments[0][:, None] == segments[0][None]) if with_segments else True
    np.testing.assert_array_equal(reads_TS, np.tril(np.ones((11, 11), bool)) & same)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_another_document_changes_nothing_not_even_a_bit(kind):
    layer, (positions, segments) = make(kind), packed()
    x = jax.random.normal(jax.random.key(1), (2, 11, 16))
    other = jnp.where(segments[..., None] == 1, 100 * x, x)
    y, y_other = call(layer, x, positions, segments), call(layer, other, positions, segments)
    np.testing.assert_array_equal(y[:, 4:], y_other[:, 4:])
    assert np.abs(y[:, :4] - y_other[:, :4]).max() > 0


def test_large_scores_neither_overflow_nor_leak():
    q, k = jnp.full((1, 4, 1, 8), 1e4), jnp.full((1, 4, 1, 8), 1e4).at[0, 2].set(-1e4)
    v = jnp.arange(4.0)[None, :, None, None]
    y, vjp = jax.vjp(lambda *a: attention(*a, causal_mask(4, None)), q, k, v)
    np.testing.assert_allclose(y[0, :, 0, 0], [0, 0.5, 0.5, 4 / 3], rtol=1e-6)
    assert all(np.isfinite(g).all() for g in vjp(jnp.ones_like(y)))


@pytest.mark.parametrize("kind", ["mla", pytest.param("gqa", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_single_device_output_and_gradients(mesh, kind):
    x, (positions, segments) = jax.random.normal(jax.random.key(1), (8, 12, 16)), packed(batch=8, length=12)

    @jax.jit
    def run(graph, x, positions, segments):
        def loss(graph, x):
            y = graph(x, positions, segments)
            return jnp.mean(y**2), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(graph, x)
        return y, nnx.to_pure_dict(nnx.state(grads[0])), grads[1]

    expected = run(make(kind), x, positions, segments)
    with jax.set_mesh(mesh):
        tokens = [jax.device_put(a, jax.NamedSharding(mesh, spec("batch", "seq"))) for a in (x, positions, segments)]
        got = run(make(kind), *tokens)
        assert jax.typeof(got[1]["o_nhd"]).sharding.spec == spec("heads", None, "embed")
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())


def test_parameters_have_the_published_shapes_and_the_layer_stacks():
    config = ModelConfig(hidden_size=16, attention=KINDS["mla"], num_hidden_layers=8, initializer_range=1.0)
    stacked = jax.jit(jax.vmap(lambda key: make_attention(config, rngs=nnx.Rngs(key))))(
        jax.random.split(jax.random.key(0, impl=IMPL), 64)
    )
    shapes = {name: a.shape[1:] for name, a in nnx.to_pure_dict(nnx.state(stacked)).items() if name != "kv_norm"}
    assert shapes == {"q_dnh": (16, 2, 10), "kv_down_dr": (16, 11), "kv_up_rnh": (7, 2, 11), "o_nhd": (2, 5, 16)}
    assert isinstance(stacked, MLA) and isinstance(make("gqa"), GQA)
    np.testing.assert_allclose(np.std(stacked.q_dnh[...]), 1.0, rtol=0.05)
    np.testing.assert_allclose(np.std(stacked.o_nhd[...]), 0.25, rtol=0.05)
    assert np.abs(stacked.q_dnh[0] - stacked.q_dnh[1]).max() > 0


def test_bfloat16_stays_near_float32():
    layer, (positions, segments) = make("mla"), packed()
    x = jax.random.normal(jax.random.key(1), (2, 11, 16))
    y = call(layer, x.astype(jnp.bfloat16), positions, segments)
    assert y.dtype == jnp.bfloat16
    exact = call(layer, x, positions, segments)
    assert np.linalg.norm(y.astype(jnp.float32) - exact) < 0.03 * np.linalg.norm(exact)
