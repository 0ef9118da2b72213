"""Rotary position embedding (Su et al. 2021), stretched to longer contexts by YaRN (Peng et al. 2023).

Letters: B batch, T position in the row, N head, H head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import AttentionConfig, YarnConfig


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, config: AttentionConfig) -> jax.Array:
    """Rotates dims (i, i + H/2) of every head by the angle `position * frequencies(config, H)[i]`.

    Half-split pairing: both halves are contiguous, so nothing is shuffled across vector lanes. Checkpoints with
    interleaved pairs (2i, 2i+1), as DeepSeek's, need their rope columns permuted once at import. Scores depend on
    position differences only. Angles are float32 (or wider); the result has `x.dtype`.
    """
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequency_H = frequencies(config, x_BTNH.shape[-1], wide)
    angle_BTNH = positions_BT.astype(wide)[:, :, None, None] * frequency_H[None, None, None]
    cos, sin = jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)
    if (length := rotated_length(config.yarn)) != 1:
        cos, sin = cos * length, sin * length
    a, b = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def frequencies(config: AttentionConfig, width: int, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """Radians per position of each pair of dims, [width / 2]: `theta**(-2i/width)`, under YaRN some of them slowed.

    YaRN's "NTK-by-parts" (section 3.2): a pair that turns often within the original length tells near positions apart
    and stays. A pair that turns less than once would see angles that training never showed: it is divided by `factor`.
    """
    half = width // 2
    frequency_H = config.rope_theta ** (-jnp.arange(half, dtype=dtype) / half)
    if not config.yarn.enabled:
        return frequency_H
    slowed_H = slowed_share(config.yarn, config.rope_theta, width)
    return frequency_H * jnp.asarray(1 - slowed_H + slowed_H / config.yarn.factor, dtype)


def slowed_share(yarn: YarnConfig, theta: float, width: int) -> np.ndarray:
    """How far each pair is slowed, from 0 (unchanged) to 1 (divided by the factor): float64 [width / 2].

    A ramp over the index, between the pairs that turn `beta_fast` and `beta_slow` times, rounded outwards: as in YaRN's
    released code, DeepSeek's and Hugging Face's. The paper's equation 18 has a ramp over the number of turns instead,
    with the same ends.
    """

    def index_that_turns(times: float) -> float:
        # times = length * theta**(-2i/width) / 2 pi, solved for i
        return width * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(index_that_turns(yarn.beta_slow)), width - 1)
    return np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)


def _mscale(yarn: YarnConfig, weight: float) -> float:
    """The square root of YaRN's 1/t (equation 22, where the weight is 1; DeepSeek-V2: 0.707)."""
    return 0.1 * weight * math.log(yarn.factor) + 1.0 if yarn.enabled else 1.0


def rotated_length(yarn: YarnConfig) -> float:
    """Factor of a rotated vector's length: 1 where `mscale` equals `mscale_all_dim`, as in DeepSeek's models."""
    return _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim)


def softmax_scale(config: AttentionConfig) -> float:
    """Factor of the scores before the softmax: 1/sqrt(head width) and YaRN's temperature.

    DeepSeek's released code sharpens the whole score, the part without position included, by mscale squared.
    """
    return config.qk_head_dim**-0.5 * _mscale(config.yarn, config.yarn.mscale_all_dim) ** 2
