"""Rotary embedding and YaRN against complex numbers and the published formulas, and the properties they exist for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, ModelConfig, YarnConfig
from engram_jax.layers.attention import make_attention
from engram_jax.layers.rope import frequencies, rope, rotated_length, softmax_scale

pytestmark = pytest.mark.newest

PLAIN = AttentionConfig(rope_theta=10_000.0)
PAPER = AttentionConfig(rope_theta=10_000.0, yarn=YarnConfig(factor=10.0))
DEEPSEEK_V3 = YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
SMALL = YarnConfig(factor=8.0, mscale=1.0, mscale_all_dim=0.0, original_max_position_embeddings=512)


def published(yarn, theta, width):
    """Frequencies by counting turns: kept above beta_fast, divided below beta_slow, a line over the index between."""
    turns = [yarn.original_max_position_embeddings * theta ** (-2 * i / width) / (2 * math.pi) for i in range(width)]
    last_fast = max([i for i in range(width) if turns[i] >= yarn.beta_fast], default=0)
    first_slow = min([i for i in range(width) if turns[i] <= yarn.beta_slow], default=width - 1)
    result = []
    for i in range(width // 2):
        gamma = 1 - min(max((i - last_fast) / (first_slow - last_fast), 0), 1)
        plain = theta ** (-2 * i / width)
        result.append(gamma * plain + (1 - gamma) * plain / yarn.factor)
    return np.array(result)


def reference(x_BTNH, positions_BT, frequency_H, length=1.0):
    half = x_BTNH.shape[-1] // 2
    z = x_BTNH[..., :half] + 1j * x_BTNH[..., half:]
    z = z * length * np.exp(1j * positions_BT[:, :, None, None] * frequency_H)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize(
    ("config", "length"),
    [(PLAIN, 1.0), (PAPER, 1.0), (AttentionConfig(rope_theta=500.0, yarn=SMALL), 0.1 * math.log(8) + 1)],
)
def test_equals_complex_rotation_forward_and_gradient(config, length, rng):
    x, g = rng.normal(size=(2, 2, 7, 3, 8))
    positions = rng.integers(0, 40_000, (2, 7))
    frequency = published(config.yarn, config.rope_theta, 8)
    with jax.enable_x64(True):
        y, vjp = jax.vjp(lambda x: rope(x, jnp.asarray(positions), config), jnp.asarray(x))
        (gx,) = vjp(jnp.asarray(g))
    np.testing.assert_allclose(y, reference(x, positions, frequency, length), rtol=0, atol=1e-9)
    np.testing.assert_allclose(gx, reference(g, -positions, frequency, length), rtol=0, atol=1e-9)  # its transpose


@pytest.mark.parametrize("width", [8, 16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 150_000.0])
@pytest.mark.parametrize("yarn", [PAPER.yarn, DEEPSEEK_V3, SMALL], ids=["paper", "v3", "small"])
def test_frequencies_equal_the_published_formula(yarn, theta, width):
    got = frequencies(AttentionConfig(rope_theta=theta, yarn=yarn), width)
    np.testing.assert_allclose(got, published(yarn, theta, width), rtol=2e-6)
    assert got[0] == 1 and np.all(np.diff(got) < 0)


def test_the_papers_stage_slows_what_never_turned():
    """Width 64, 4,096 positions: pairs 0..10 turn 32 times, pairs 23.. less than once."""
    ratio = frequencies(PAPER, 64) / frequencies(PLAIN, 64)
    np.testing.assert_array_equal(ratio[:11], 1)
    np.testing.assert_allclose(ratio[23:], 0.1, rtol=1e-6)
    assert np.all(np.diff(ratio[10:24]) < 0)
    assert PAPER.yarn.max_position_embeddings == 40_960


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factor_one_changes_no_bit(dtype, rng):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16), dtype)
    positions = jnp.asarray(rng.integers(0, 5000, (2, 5)))
    off = AttentionConfig(yarn=YarnConfig(1.0, 4.0, 2.0, 1.0, 0.3, 7))
    half = x.shape[-1] // 2
    angle = (
        positions.astype(jnp.float32)[:, :, None, None]
        * (10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half))[None, None, None]
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    before = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)
    np.testing.assert_array_equal(rope(x, positions, off), before)
    assert softmax_scale(off) == off.qk_head_dim**-0.5


def test_scores_depend_on_the_distance_only(rng):
    q, k = jnp.asarray(rng.normal(size=(2, 1, 6, 2, 16)), jnp.float32)

    def score(config, shift):
        positions = jnp.arange(6)[None] + shift
        return jnp.einsum("btnh,bsnh->bnts", rope(q, positions, config), rope(k, positions, config))

    for config in (AttentionConfig(rope_theta=100.0), AttentionConfig(rope_theta=100.0, yarn=YarnConfig(factor=4.0))):
        np.testing.assert_allclose(score(config, 0), score(config, 37), atol=2e-5)
        assert np.abs(score(config, 0) - jnp.einsum("btnh,bsnh->bnts", q, k)).max() > 0.1


def test_temperature_is_the_released_codes():
    assert softmax_scale(PAPER) == pytest.approx(192**-0.5 * (0.0707 * math.log(10) + 1) ** 2)
    v3 = dataclasses.replace(PLAIN, yarn=DEEPSEEK_V3)
    assert softmax_scale(v3) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert rotated_length(PAPER.yarn) == rotated_length(DEEPSEEK_V3) == 1
    assert softmax_scale(AttentionConfig(yarn=SMALL)) == pytest.approx(192**-0.5)
    assert rotated_length(SMALL) == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_attention_layers_apply_the_temperature_to_whole_scores(kind):
    """Where all positions are 0 nothing is rotated, and longer queries do what the temperature does."""
    attention = AttentionConfig(kind, 2, 2, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, kv_lora_rank=4)
    stretched = dataclasses.replace(attention, yarn=YarnConfig(factor=10.0))

    def layer(config):
        config = ModelConfig(hidden_size=8, attention=config, initializer_range=0.8)
        return make_attention(config, rngs=nnx.Rngs(jax.random.key(1, impl="rbg")))

    x, nowhere = jax.random.normal(jax.random.key(2), (1, 6, 8)), jnp.zeros((1, 6), jnp.int32)
    plain, expected = layer(attention), layer(stretched)(x, nowhere)
    assert np.abs(plain(x, nowhere) - expected).max() > 1e-3
    plain.q_dnh[...] = plain.q_dnh[...] * (0.0707 * math.log(10) + 1) ** 2
    np.testing.assert_allclose(plain(x, nowhere), expected, rtol=0, atol=1e-5)
