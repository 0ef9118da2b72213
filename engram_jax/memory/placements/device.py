"""Tables in the memory of the devices that own them: arrays beside each other, or, on TPU, records (records.py).

Legend: U rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engram_jax.config import ConfigError, MemoryConfig
from engram_jax.memory.placements.records import Records
from engram_jax.memory.table import TableState


@dataclass(frozen=True)
class DevicePlacement:
    as_records: bool = False
    """One array for a row and all that is kept for it, as TPUs want it."""
    in_program: bool = field(default=True, init=False)

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> DevicePlacement:
        return cls(as_records=platform == "tpu")

    def at_rest(self, mesh: Mesh, table: TableState | Records) -> None:
        return None

    def check_room(self, shard_bytes: int, shards_here: int) -> None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit is not None and shard_bytes > limit:
            raise ConfigError(
                f"The tables need {shard_bytes / 1e9:.1f} GB on each device, which has {limit / 1e9:.1f} GB: choose "
                "memory.placement=host or tiered, lower engram_vocab_size, or use more devices."
            )

    def allocate(self, num_rows: int, like: TableState) -> TableState | Records:
        if self.as_records:
            return Records.allocate(num_rows, like)
        return jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), like)

    def take(self, table: TableState | Records, ids_U: jax.Array) -> TableState:
        if isinstance(table, Records):
            return table.take(ids_U)
        return jax.tree.map(
            lambda x: x.at[ids_U].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True), table
        )

    def put(self, table: TableState | Records, ids_U: jax.Array, batch: TableState) -> TableState | Records:
        if isinstance(table, Records):
            return table.put(ids_U, batch)
        return jax.tree.map(
            lambda x, new_U: x.at[ids_U].set(new_U, mode="drop", indices_are_sorted=True, unique_indices=True),
            table,
            batch,
        )
