"""Grouped matrix product: rows are sorted by group, and each group has its own matrix.

Letters: S row, E group, D inner, F outer dim.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from engram_jax.sharding import platform

TILES = (512, 1024, 1024)
"""Rows, inner and outer numbers of a tile, at most: the largest that leave room for double buffers in VMEM."""


def grouped_matmul(x_SD: jax.Array, weight_EDF: jax.Array, count_E: jax.Array) -> jax.Array:
    """y_SF, float32 or wider: the first count_E[0] rows times weight_EDF[0], and so on; rows beyond are undefined.

    On TPU by jax's megablox kernels, elsewhere by `jax.lax.ragged_dot`. XLA:TPU has a kernel for it too, but computes
    the weights' gradient as E products over all rows (engram_27b compiled for v5p: 9.1 times the model's FLOPs).
    """
    if platform() == "tpu":
        return _kernels(x_SD, weight_EDF, count_E)
    wide = jnp.promote_types(x_SD.dtype, jnp.float32)
    return jax.lax.ragged_dot(x_SD, weight_EDF, count_E, preferred_element_type=wide)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernels(x_SD: jax.Array, weight_EDF: jax.Array, count_E: jax.Array, interpret: bool = False) -> jax.Array:
    num_rows = len(x_SD)
    x_SD, tiles = _whole_tiles(x_SD), _tiles(len(x_SD), weight_EDF.shape[1:])
    return gmm(x_SD, weight_EDF, count_E, jnp.float32, tiles, interpret=interpret)[:num_rows]


def _kernels_backward(interpret, args, dy_SF):
    x_SD, weight_EDF, count_E = args
    num_rows, inner_outer = len(x_SD), weight_EDF.shape[1:]
    dy_SF, x_SD = _whole_tiles(dy_SF.astype(x_SD.dtype)), _whole_tiles(x_SD)
    back, forth = (_tiles(num_rows, dims) for dims in (inner_outer[::-1], inner_outer))
    dx_SD = gmm(dy_SF, weight_EDF, count_E, x_SD.dtype, back, transpose_rhs=True, interpret=interpret)
    d_weight = tgmm(x_SD.T, dy_SF, count_E, weight_EDF.dtype, forth, interpret=interpret)
    return dx_SD[:num_rows], d_weight, None


_kernels.defvjp(
    lambda x_SD, weight_EDF, count_E, interpret: (
        _kernels(x_SD, weight_EDF, count_E, interpret),
        (x_SD, weight_EDF, count_E),
    ),
    _kernels_backward,
)


def _tiles(num_rows: int, dims: tuple[int, ...]) -> tuple[int, int, int]:
    rows = next(tile for tile in (512, 256, 128) if tile <= TILES[0] and (num_rows % tile == 0 or tile == 128))
    inner, outer = (_tile(dim, at_most) for dim, at_most in zip(dims, TILES[1:], strict=True))
    return rows, inner, outer


def _tile(dim: int, at_most: int) -> int:
    """The size of a tile: whole tiles of 128 lanes that divide the dim, if possible."""
    even = (tile for tile in range(at_most, 0, -128) if dim % tile == 0)
    return min(dim, next(even, at_most))


def _whole_tiles(x_SD: jax.Array) -> jax.Array:
    """x padded to a multiple of the smallest tile's rows."""
    missing = -len(x_SD) % 128
    return jnp.pad(x_SD, [(0, missing), (0, 0)]) if missing else x_SD
