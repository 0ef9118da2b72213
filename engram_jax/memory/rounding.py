"""Rounding of float32 rows to bfloat16 storage, right on average, so that small updates are not lost.

A bfloat16 has 8 significant bits: its ulp is 2^-7 to 2^-8 of its value, and rounding to nearest drops every update of
less than half of that, for ever. Stochastic rounding takes it with the probability that makes the mean exact.

How far a trained row strays: the rounding error e_k of step k has mean zero given the past and lies in an interval of
width ulp (the largest on the path). After n steps of a rule that moves rows alike wherever they are, or pulls them
together, the sum E of the errors has standard deviation <= sqrt(n) ulp / 2, and by Azuma's inequality
P(|E| >= t) <= 2 exp(-2 t^2 / (n ulp^2)). Steps of size d much less than ulp do better: an error's variance is at most
d * ulp, so E's deviation is sqrt(distance travelled * ulp).

Legend: U any set of rows, D row width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST = 0x7F7F  # bits of the largest finite bfloat16


def stochastic_round(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down with the probability that makes the mean x. The shape is any.

    `noise`: uniform uint16 of x's shape. Representable values, signed zeros, infinities and NaN come back as they are,
    whatever the noise. Finite values stay finite: beyond the largest bfloat16 they become that, which is the only
    bias.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The upper half of a float32 is a bfloat16. As integers, magnitudes are in order, across exponents too: adding
    # noise to the lower half carries into the upper one with probability (lower half) / 2^16.
    upper = ((bits + noise.astype(jnp.uint32)) >> 16).astype(jnp.uint16)
    magnitude = jnp.minimum(upper & 0x7FFF, LARGEST).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper & 0x8000 | magnitude, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def row_noise(key: jax.Array, logical_U: jax.Array, width: int) -> jax.Array:
    """Noise for `stochastic_round`: uint16 [U, width], a function of (key, logical row) alone.

    Where a row lies, and which rows it is rounded with, makes no difference, so sharded tables round as one does. The
    key must be a new one at every step (and table), or the errors of a row add up in one direction.
    """

    def one(row: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, row), (width,), jnp.uint16)

    return jax.vmap(one)(logical_U)
