"""Rotary position embedding (Su et al. 2021).

Letters: B batch, T position in the row, N head, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotates dims (i, i + H/2) of every head by the angle `position * theta**(-2i/H)`.

    Half-split pairing: both halves are contiguous, so nothing is shuffled across vector lanes. Checkpoints with
    interleaved pairs (2i, 2i+1), as DeepSeek's, need their rope columns permuted once at import. Scores depend on
    position differences only. Angles are float32 (or wider); the result has `x.dtype`.
    """
    half = x_BTNH.shape[-1] // 2
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequency_H = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle_BTNH = positions_BT.astype(wide)[:, :, None, None] * frequency_H[None, None, None]
    cos, sin = jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)
    a, b = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
