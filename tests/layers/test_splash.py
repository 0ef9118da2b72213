"""The TPU attention kernel, interpreted, against the product of all queries and keys: also where sequences are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.layers.attention import attention, causal_mask
from engram_jax.layers.splash import _backward_block, splash_attention
from engram_jax.sharding import make_mesh, spec

B, T, N, H, V = 4, 256, 2, 24, 16
SCALE = 0.3  # not 1/sqrt(H): YaRN changes it


def inputs(rng, kv_heads):
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((B, T, N, H), (B, T, kv_heads, H), (B, T, kv_heads, V), (B, T, N, V))
    )
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1)[:, ::-1].astype(np.int32)
    return (q, k, v), jnp.asarray(segments), weight


def value_and_gradients(attend, qkv, segments, weight):
    def loss(q, k, v):
        y = attend(q, k, v, segments)
        return jnp.sum(y * weight), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return y, grads


def reference(q, k, v, segments):
    return attention(q, k, v, causal_mask(T, segments), SCALE)


def kernel(q, k, v, segments):
    return splash_attention(q, k, v, segments, SCALE, interpret=True)


def assert_close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [N, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_whole_product(kv_heads, packed, rng):
    qkv, segments, weight = inputs(rng, kv_heads)
    segments = segments if packed else None
    expected = value_and_gradients(reference, qkv, segments, weight)
    assert_close(jax.jit(lambda: value_and_gradients(kernel, qkv, segments, weight))(), expected)


def test_equals_it_where_sequences_and_heads_are_cut(rng):
    qkv, segments, weight = inputs(rng, N)
    expected = value_and_gradients(reference, qkv, segments, weight)
    mesh = make_mesh(2, context=2, tensor=2)
    with jax.set_mesh(mesh):
        q, weight = jax.device_put((qkv[0], weight), jax.NamedSharding(mesh, spec("batch", "seq", "heads", None)))
        k, v = jax.device_put(qkv[1:], jax.NamedSharding(mesh, spec("batch", None, "heads", None)))
        segments = jax.device_put(segments, jax.NamedSharding(mesh, spec("batch", "seq")))
        got = jax.jit(lambda *args: value_and_gradients(kernel, args[:3], *args[3:]))(q, k, v, segments, weight)
    assert_close(got, expected)


def test_long_sequences_have_larger_blocks_of_keys_in_the_backward_pass(rng):
    """1,152 positions: 9 blocks of 128 queries, 3 blocks of 384 keys."""
    assert [_backward_block(length, 512) for length in (512, 4096, 8192, 32_768)] == [512, 512, 1024, 2048]
    assert [_backward_block(length, 128) for length in (128, 1024, 1152, 128 * 1009)] == [128, 128, 384, 128]
    T = 1152
    q, k, v, weight = (jnp.asarray(rng.normal(size=(1, T, 1, w)), jnp.float32) for w in (H, H, V, V))
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [500, 300, 352], axis=1).astype(np.int32))

    def whole(q, k, v, segments):
        return attention(q, k, v, causal_mask(T, segments), SCALE)

    expected = value_and_gradients(whole, (q, k, v), segments, weight)
    assert_close(jax.jit(lambda: value_and_gradients(kernel, (q, k, v), segments, weight))(), expected)


def test_a_length_that_is_no_whole_tile_is_refused(rng):
    (q, k, v), segments, _ = inputs(rng, N)
    with pytest.raises(ConfigError, match=r"data.seq_len=200 .* not a multiple of 128"):
        splash_attention(q[:, :200], k[:, :200], v[:, :200], segments[:, :200])
