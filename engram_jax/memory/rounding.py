"""Stochastic rounding of float32 rows to bfloat16: exact on average, so that small updates are not lost.

A bfloat16 has 8 significant bits: its ulp is 2^-7 to 2^-8 of its value. Rounding to nearest loses every update below
half an ulp. Stochastic rounding rounds up or down with the probabilities that make the mean exact.

Size of the error: the rounding error e_k of step k has mean zero given the past and lies in an interval of width ulp
(the largest on the path). Assume that the update does not drive apart two rows that differ by rounding. Then after n
steps the sum E of the errors has standard deviation <= sqrt(n) ulp / 2, and by Azuma's inequality
P(|E| >= t) <= 2 exp(-2 t^2 / (n ulp^2)). For steps of size d much less than ulp, an error's variance is at most
d * ulp, so the standard deviation of E is at most sqrt(distance travelled * ulp).

Legend: U any set of rows, D row width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST = 0x7F7F  # bits of the largest finite bfloat16


def stochastic_round(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 -> bfloat16 of the same shape, rounded up or down with the probabilities that make the mean x.

    `noise`: uniform uint16 of x's shape. Representable values, signed zeros, infinities and NaN do not change. Finite
    values stay finite: values beyond the largest bfloat16 become it, which is the only bias.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The upper half of a float32 is a bfloat16, and magnitudes are ordered like their bits as integers. Adding noise to
    # the lower half carries into the upper half with probability (lower half) / 2^16.
    upper = ((bits + noise.astype(jnp.uint32)) >> 16).astype(jnp.uint16)
    magnitude = jnp.minimum(upper & 0x7FFF, LARGEST).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper & 0x8000 | magnitude, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def row_noise(key: jax.Array, logical_U: jax.Array, width: int) -> jax.Array:
    """Noise for `stochastic_round`: uint16 [U, width], a function of (key, logical row) alone.

    The noise of a row does not depend on its device or on the other rows, so sharded tables round like whole ones. Give
    every step and every table its own key; otherwise the errors of a row add up in one direction.
    """

    def one(row: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, row), (width,), jnp.uint16)

    return jax.vmap(one)(logical_U)
