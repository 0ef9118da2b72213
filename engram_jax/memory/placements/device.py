"""Tables in the memory of the devices that own them.

TPUs lay arrays out in tiles of 128 lanes. A table [R, D] with D < 128 is either padded to 128 or kept transposed, and
XLA transposes it back, whole, at every step: 12.1 GB moved and 2.1 GB of temporaries for 65,536 of 4,000,000 rows of 64
(compiled for v5p). So rows are packed there, p to a line of p * D lanes, and read and written by windows: 0.1 GB, 0.07
GB, and no padding. Elsewhere p is 1 and a line is a row.

Legend: R local rows, L = R / p lines, U rows of a batch, D row width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from engram_jax.config import ConfigError, MemoryConfig
from engram_jax.memory.table import TableState

LANES = 128


def lane_packing(width: int) -> int:
    """Rows to a line, so that lines fill whole tiles (8 if no smaller power of two does)."""
    return next((p for p in (1, 2, 4) if p * width % LANES == 0), 8)


@dataclass(frozen=True)
class DevicePlacement:
    packs_rows: bool = False
    """Several narrow rows to a line, as TPUs want it."""
    in_program: bool = field(default=True, init=False)

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> DevicePlacement:
        return cls(packs_rows=platform == "tpu")

    def at_rest(self, mesh: Mesh, table: TableState) -> None:
        return None

    def check_room(self, shard_bytes: int, shards_here: int) -> None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit is not None and shard_bytes > limit:
            raise ConfigError(
                f"The tables need {shard_bytes / 1e9:.1f} GB on each device, which has {limit / 1e9:.1f} GB: choose "
                "memory.placement=host or tiered, lower engram_vocab_size, or use more devices."
            )

    def allocate(self, num_rows: int, like: TableState) -> TableState:
        def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if leaf.ndim == 1 or not self.packs_rows:
                return jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype)
            pack = lane_packing(leaf.shape[1])
            return jnp.zeros((-(-num_rows // pack), pack * leaf.shape[1]), leaf.dtype)

        return jax.tree.map(zeros, like)

    def take(self, table: TableState, ids_U: jax.Array) -> TableState:
        rows = len(table.uses)
        return jax.tree.map(lambda array: _take(array, ids_U, rows), table)

    def put(self, table: TableState, ids_U: jax.Array, batch: TableState) -> TableState:
        rows = len(table.uses)
        return jax.tree.map(lambda array, new_U: _put(array, ids_U, new_U, rows), table, batch)


def _take(array_L: jax.Array, ids_U: jax.Array, rows: int) -> jax.Array:
    if len(array_L) == rows:
        return array_L.at[ids_U].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)
    width = array_L.shape[1] // -(-rows // len(array_L))
    windows = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return lax.gather(
        array_L,
        _corners(array_L, ids_U, rows, width),
        windows,
        slice_sizes=(1, width),
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
    )


def _put(array_L: jax.Array, ids_U: jax.Array, new_U: jax.Array, rows: int) -> jax.Array:
    if len(array_L) == rows:
        return array_L.at[ids_U].set(new_U, mode="drop", indices_are_sorted=True, unique_indices=True)
    windows = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return lax.scatter(
        array_L,
        _corners(array_L, ids_U, rows, new_U.shape[1]),
        new_U,
        windows,
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


def _corners(array_L: jax.Array, ids_U: jax.Array, rows: int, width: int) -> jax.Array:
    """Where each row's window begins: [U, 2]; beyond the array for ids that are no rows."""
    pack = array_L.shape[1] // width
    line_U = jnp.where(ids_U < rows, ids_U // pack, len(array_L))
    return jnp.stack([line_U, ids_U % pack * width], axis=-1)
