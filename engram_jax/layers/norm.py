"""RMS normalisation over the last dim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.sharding import spec


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) * gain over the last dim; `gain` has the shape of the last dims of `x` that it scales.

    Computed in float32 (or wider), returned in `x.dtype`. With eps = 1e-20, the backbone's value, a row of zeros gives
    zeros and its gradient is finite (1e10 times the gain), in float32 as well: 1e-20 is far above the smallest float32.
    """
    x_wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + eps)
    return (x_wide * scale * jax.lax.expand_dims(gain, range(x.ndim - gain.ndim))).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a trained gain [dim], which starts at 1."""

    def __init__(self, dim: int, eps: float):
        self.gain = nnx.Param(jnp.ones((dim,), jnp.float32, out_sharding=spec("norm")))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., dim] -> the same shape and dtype."""
        return rms_norm(x, self.gain[...], self.eps)
