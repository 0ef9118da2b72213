"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): M residual streams around every sub-layer F,

    x' = H_res x + H_post^T F(H_pre x),

whose coefficients depend on the token, with H_res kept doubly stochastic so that the streams' mean neither grows nor
fades with depth. Letters: B batch, T position, M stream, D hidden, C = M * D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from engram_jax.config import require
from engram_jax.sharding import in_use, spec

FLOAT32 = jax.lax.Precision.HIGHEST
"""Precision of the coefficients' products. By default an accelerator rounds to bfloat16, and the rows of H_res would
not sum to 1."""

STREAM_STAYS = 6.0
"""Diagonal of the static residual logits. A stream passes 3 e^-6 = 0.7 % of itself on per sub-layer (M = 4): close to
the identity, yet not saturated, for the gradient through Sinkhorn shrinks by the same e^-6."""


def sinkhorn(logits: jax.Array, iters: int) -> jax.Array:
    """Doubly stochastic matrices [..., M, M] near exp(logits): `iters` times columns, then rows, divided by their sums.

    The gradient is that of the finite iteration. Tokens are kept last while iterating, to fill vector lanes: 3.5 ms
    instead of 8 forward and backward for 4,096 4x4 matrices on CPU.
    """
    logits_MMX = jnp.moveaxis(logits, (-2, -1), (0, 1))
    # The first column division cancels any factor per column, so this changes nothing but the overflow.
    shift_1MX = jax.lax.stop_gradient(jnp.max(logits_MMX, axis=0, keepdims=True))

    def columns_then_rows(p_MMX, _):
        p_MMX = p_MMX / jnp.sum(p_MMX, axis=0, keepdims=True)
        return p_MMX / jnp.sum(p_MMX, axis=1, keepdims=True), None

    p_MMX, _ = jax.lax.scan(columns_then_rows, jnp.exp(logits_MMX - shift_1MX), length=iters)
    return jnp.moveaxis(p_MMX, (0, 1), (-2, -1))


def read_streams(x_BTMD: jax.Array, pre_BTM: jax.Array) -> jax.Array:
    """H_pre x: the sub-layer's input h_BTD, summed in float32, in `x.dtype`."""
    return jnp.einsum("btm,btmd->btd", pre_BTM, x_BTMD, precision=FLOAT32).astype(x_BTMD.dtype)


def write_streams(x_BTMD: jax.Array, y_BTD: jax.Array, post_BTM: jax.Array, res_BTMM: jax.Array) -> jax.Array:
    """H_res x + H_post^T y: the next streams, summed in float32, in `x.dtype`.

    Products, not sums over slices of streams: those are faster forward, but the gradient of every slice is a padded
    array of all streams (on CPU 580 MB of traffic against 190 for a wrapper of 4,096 x 4 x 128, forward and backward).
    """
    mixed_BTMD = jnp.einsum("btij,btjd->btid", res_BTMM, x_BTMD, precision=FLOAT32)
    return (mixed_BTMD + post_BTM[..., None] * y_BTD[:, :, None]).astype(x_BTMD.dtype)


def _token_logits(x_BTMD: jax.Array, phis: Sequence[jax.Array], eps: float) -> jax.Array:
    """RMSNorm of all streams of a token, projected by these matrices side by side: [B, T, their columns]."""
    B, T, M, D = x_BTMD.shape
    x_BTC = x_BTMD.astype(jnp.promote_types(x_BTMD.dtype, jnp.float32)).reshape(B, T, M * D)
    phi_cm = in_use(jnp.concatenate(phis, axis=1), "embed", "streams")
    act = spec("batch", "seq", "act")
    logits = jnp.einsum("btc,cm->btm", x_BTC, phi_cm.astype(x_BTC.dtype), precision=FLOAT32, out_sharding=act)
    # Dividing by the norm after the product is the same function, on M^2 + 2M numbers instead of M * D.
    return logits * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTC), axis=-1, keepdims=True) + eps)


class HyperConnection(nnx.Module):
    """The coefficients of one sub-layer's wrapper. At the start: read the mean stream, add y to every stream, keep each
    stream almost unmixed, so that equal streams behave as one ordinary pre-norm residual stream.

    `phi_*` start at 1/sqrt(M D): on the unit-RMS input their products have unit variance, so `gate_init` is the size of
    the token-dependent part. The RMS norm's gain is absorbed in them.
    """

    def __init__(
        self, hidden_size: int, hc_mult: int, sinkhorn_iters: int, gate_init: float, eps: float, *, rngs: nnx.Rngs
    ):
        require(hc_mult > 1, f"hc_mult={hc_mult}: hyper-connections need 2 or more streams (1: a plain residual).")
        M, C, std = hc_mult, hc_mult * hidden_size, (hc_mult * hidden_size) ** -0.5
        phi, vector = spec("embed", "streams"), spec("streams")
        self.phi_pre_cm = nnx.Param(normal(std)(rngs.params(), (C, M), jnp.float32, out_sharding=phi))
        self.phi_post_cm = nnx.Param(normal(std)(rngs.params(), (C, M), jnp.float32, out_sharding=phi))
        self.phi_res_cm = nnx.Param(normal(std)(rngs.params(), (C, M * M), jnp.float32, out_sharding=phi))
        self.alpha = nnx.Param(jnp.full((3,), gate_init, jnp.float32))
        self.bias_pre = nnx.Param(jnp.full((M,), -math.log(M - 1), jnp.float32))  # sigmoid: 1 / M
        self.bias_post = nnx.Param(jnp.zeros((M,), jnp.float32, out_sharding=vector))  # 2 sigmoid: 1
        self.bias_res = nnx.Param(STREAM_STAYS * jnp.eye(M, dtype=jnp.float32))
        self.sinkhorn_iters, self.eps = sinkhorn_iters, eps

    def coefficients(self, x_BTMD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The streams -> (pre_BTM in (0, 1), post_BTM in (0, 2), res_BTMM doubly stochastic), float32 or wider."""
        B, T, M, _ = x_BTMD.shape
        logits = _token_logits(x_BTMD, [self.phi_pre_cm[...], self.phi_post_cm[...], self.phi_res_cm[...]], self.eps)
        pre, post, res = jnp.split(logits, [M, 2 * M], axis=-1)
        alpha = self.alpha[...]
        pre_BTM = jax.nn.sigmoid(alpha[0] * pre + self.bias_pre[...][None, None])
        post_BTM = 2 * jax.nn.sigmoid(alpha[1] * post + self.bias_post[...][None, None])
        res_BTMM = sinkhorn(alpha[2] * res.reshape(B, T, M, M) + self.bias_res[...][None, None], self.sinkhorn_iters)
        return pre_BTM, post_BTM, res_BTMM


class StreamPort(nnx.Module):
    """One state read from the streams and written back, x' = x + H_post^T F(H_pre x): a hyper-connection without H_res,
    so that a silent F changes nothing. At the start it reads the mean stream and adds y to every stream.
    """

    def __init__(self, hidden_size: int, hc_mult: int, gate_init: float, eps: float, *, rngs: nnx.Rngs):
        M, C, std = hc_mult, hc_mult * hidden_size, (hc_mult * hidden_size) ** -0.5
        phi, vector = spec("embed", "streams"), spec("streams")
        self.phi_pre_cm = nnx.Param(normal(std)(rngs.params(), (C, M), jnp.float32, out_sharding=phi))
        self.phi_post_cm = nnx.Param(normal(std)(rngs.params(), (C, M), jnp.float32, out_sharding=phi))
        self.alpha = nnx.Param(jnp.full((2,), gate_init, jnp.float32))
        self.bias_pre = nnx.Param(jnp.full((M,), -math.log(M - 1), jnp.float32))
        self.bias_post = nnx.Param(jnp.zeros((M,), jnp.float32, out_sharding=vector))
        self.eps = eps

    def coefficients(self, x_BTMD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The streams -> (pre_BTM in (0, 1), post_BTM in (0, 2)), as of a `HyperConnection`."""
        logits = _token_logits(x_BTMD, [self.phi_pre_cm[...], self.phi_post_cm[...]], self.eps)
        pre, post = jnp.split(logits, 2, axis=-1)
        alpha = self.alpha[...]
        pre_BTM = jax.nn.sigmoid(alpha[0] * pre + self.bias_pre[...][None, None])
        return pre_BTM, 2 * jax.nn.sigmoid(alpha[1] * post + self.bias_post[...][None, None])
