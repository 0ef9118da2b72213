"""One Engram layer's table as an ordinary parameter, for any Flax model and any optax optimizer.

    self.table = DenseTable(constants.num_rows(layer), head_dim, rngs=rngs)             in the model's __init__
    ids_BTH    = ngram_row_ids(constants, layer, canonicalize(token_map, tokens_BT))    (hashing.py)
    rows_BTHD  = self.table(ids_BTH)                                                    rows for the reader

Row ids are those of `MemoryStore`, so a trained table can move to a store and back (`MemoryStore.materialize`). The
gradient is a dense array of the table's size, and an optimizer such as `optax.adam` passes over all of it at every
step. So the time of a step grows with the table, and memory holds two to four copies of it. Use the store for more than
about a million rows.

Legend: R rows (padding included), B batch, T seq, H rows per token, D row width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import require
from engram_jax.memory.table import RowInit


class DenseTable(nnx.Module):
    """The rows of one Engram layer in one `nnx.Param`, float32 [R, D]."""

    def __init__(
        self,
        num_rows: int,
        head_dim: int,
        *,
        std: float = 0.02,
        shard_over: str | tuple[str, ...] = (),
        rngs: nnx.Rngs,
    ):
        """Makes rows from N(0, std), each a function of the key and its id alone.

        Args:
          num_rows: rows of the table.
          head_dim: their width D.
          std: standard deviation of the rows.
          shard_over: axes of the current mesh (explicit or auto) over which the rows are cut. They are padded to a
            multiple of the devices. Empty, or outside a mesh: every device holds all rows.

        Raises:
          ConfigError: `num_rows` or `head_dim` is not positive, or the mesh lacks an axis.
        """
        require(num_rows > 0 and head_dim > 0, f"num_rows={num_rows} and head_dim={head_dim} must be positive.")
        mesh = jax.sharding.get_abstract_mesh()
        axes = () if mesh.empty else (shard_over,) if isinstance(shard_over, str) else shard_over
        unknown = [axis for axis in axes if axis not in mesh.axis_names]
        require(not unknown, f"shard_over={shard_over!r}: the mesh has no axis {unknown}, only {mesh.axis_names}.")
        shards = math.prod(mesh.shape[axis] for axis in axes)
        ids_R = jnp.arange(-(-num_rows // shards) * shards, dtype=jnp.int32)
        rows_RD = RowInit(head_dim, std)(rngs.params(), ids_R)
        self.num_rows = num_rows
        self.rows_rd = nnx.Param(rows_RD, out_sharding=(axes, None)) if axes else nnx.Param(rows_RD)

    def __call__(self, ids_BTH: jax.Array) -> jax.Array:
        """Rows float32 [B, T, H, D] of logical ids int32 [B, T, H], sharded like the ids. Ids from R on read NaN."""
        mesh = jax.typeof(ids_BTH).sharding.mesh
        sharding = None
        if not mesh.empty and mesh.are_all_axes_explicit:
            sharding = jax.NamedSharding(mesh, jax.P(*jax.typeof(ids_BTH).sharding.spec, None))
        return self.rows_rd[...].at[ids_BTH].get(mode="fill", wrap_negative_indices=False, out_sharding=sharding)
