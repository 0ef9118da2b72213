"""Rows in FP8 with one power-of-two scale per 32 values, the format of DeepSeek-V4.1's tables.

Codes are float8 e4m3fn (largest 448, no infinities). A scale is an e8m0 byte b: it means 2^(b - 127), and 255 means
NaN. A block is 1 x 32 values along a row (the dense matrices of the same checkpoints have blocks of 32 x 32), so
256 values take 264 bytes.

Legend: R rows, D row width, a multiple of 32; K = D / 32 blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ConfigError, OptimizerConfig, require
from engram_jax.memory.row_optimizers.base import RowOptimizer
from engram_jax.memory.table import Slots

BLOCK = 32
CODE = jnp.float8_e4m3fn
UNIT = 127
"""The byte of scale 1."""


def num_blocks(head_dim: int) -> int:
    """Number of scales of a row of `head_dim` values.

    Raises:
      ConfigError: `head_dim` is not a multiple of 32.
    """
    require(
        head_dim > 0 and head_dim % BLOCK == 0,
        f"engram_head_dim={head_dim} is not a multiple of {BLOCK}: FP8 rows have one scale per {BLOCK} values. "
        "Keep these rows in bfloat16, or choose another width.",
    )
    return head_dim // BLOCK


def quantize(rows_RD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows -> codes e4m3fn [R, D] and scales uint8 [R, K].

    A block's scale is the smallest power of two with amax <= 448 * scale, but at least 2^-126, float32's smallest
    normal number. The error of a value x is then at most max(2^-4 |x|, 2^-10 scale), where 2^-10 scale < 2^-17 amax.
    NaN and infinities become NaN and do not change the block's scale: amax is the largest finite value. Finite values
    beyond 1.9375 * 2^127 are rounded to 2^128 and read as infinite; subnormal values may read as zero.
    """
    blocks_RKB = rows_RD.astype(jnp.float32).reshape(-1, num_blocks(rows_RD.shape[1]), BLOCK)
    finite_RKB = jnp.isfinite(blocks_RKB)
    amax_RK = jnp.max(jnp.where(finite_RKB, jnp.abs(blocks_RKB), 0), axis=-1)
    bits_RK = jax.lax.bitcast_convert_type(amax_RK, jnp.int32)
    # 448 = 1.75 * 2^8: the exponent of amax less 8, and one more if its mantissa is beyond 1.75.
    exponent_RK, mantissa_RK = bits_RK >> 23, bits_RK & 0x7FFFFF
    scales_RK = jnp.maximum(exponent_RK - 8 + (mantissa_RK > 0x600000), 1)
    inverse_RK = _power_of_two(2 * UNIT - scales_RK)
    # Backends convert infinity differently: to NaN, or to the largest code.
    codes_RKB = jnp.where(finite_RKB, blocks_RKB * inverse_RK[..., None], jnp.nan).astype(CODE)
    return codes_RKB.reshape(rows_RD.shape), scales_RK.astype(jnp.uint8)


def dequantize(codes_RD: jax.Array, scales_RK: jax.Array) -> jax.Array:
    """float32 [R, D]. A block whose scale is 255 is NaN throughout."""
    bytes_RK = scales_RK.astype(jnp.int32)
    # 2^(b - 127) in two factors: for byte 0 it is not a normal float32, though most scaled values are normal.
    half_RK = bytes_RK >> 1
    low_RK = _power_of_two(half_RK + 64)
    high_RK = jnp.where(scales_RK == 255, jnp.nan, _power_of_two(bytes_RK - half_RK + 63))
    blocks_RKB = codes_RD.astype(jnp.float32).reshape(-1, num_blocks(codes_RD.shape[1]), BLOCK)
    return (blocks_RKB * low_RK[..., None] * high_RK[..., None]).reshape(codes_RD.shape)


def _power_of_two(biased: jax.Array) -> jax.Array:
    """2^(biased - 127) for int32 in 1..254."""
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def pack(codes_RD: jax.Array, scales_RK: jax.Array) -> jax.Array:
    """Rows as bytes, each row's codes and then its scales: uint8 [R, D + D/32]."""
    return jnp.concatenate([jax.lax.bitcast_convert_type(codes_RD, jnp.uint8), scales_RK], axis=1)


def unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes e4m3fn [R, D] and scales uint8 [R, K] of packed rows, uint8 [R, D + D/32]."""
    width = packed.shape[1]
    require(
        width > 0 and width % (BLOCK + 1) == 0,
        f"Packed FP8 rows are {width} bytes wide, not a multiple of {BLOCK + 1} ({BLOCK} codes to a scale).",
    )
    head_dim = width // (BLOCK + 1) * BLOCK
    return jax.lax.bitcast_convert_type(packed[:, :head_dim], CODE), packed[:, head_dim:]


@dataclass(frozen=True)
class FrozenFP8(RowOptimizer):
    """The rule for FP8 rows, which are only read: the table's rows are codes, and the slot `scale` holds their scales.

    So a quantised table is an ordinary `TableState` and works with every placement. FP8 rows cannot be trained, so
    `optimizer.table_optimizer` does not offer this rule.
    """

    moves_rows = False

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> FrozenFP8:
        raise ConfigError(_FROZEN)

    def init(self, rows_RD: jax.Array) -> Slots:
        """Scales of 1: the bytes are 127."""
        return {"scale": jnp.full_like(rows_RD[:, : num_blocks(rows_RD.shape[1])], UNIT, jnp.uint8)}

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        return dequantize(rows_UD, slots["scale"]), slots

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        raise ConfigError(_FROZEN)


_FROZEN = (
    "FP8 rows are frozen and cannot be trained: dequantise them into a float32 or bfloat16 table with one of the "
    "optimizers of optimizer.table_optimizer."
)
