"""Tables in the memory of the devices that own them: one array per field, or on TPUs one array of records (records.py).

Legend: U rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.config import ConfigError, MemoryConfig
from engram_jax.memory.placements.base import Placement, refuse_folder
from engram_jax.memory.placements.records import Records
from engram_jax.memory.table import TableState


@dataclass(frozen=True)
class DevicePlacement(Placement):
    """Every shard in the memory of its device."""

    as_records: bool = False
    """One array holds each row with its slots and its uses, the layout that TPUs read fast."""
    on_device = True

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> DevicePlacement:
        refuse_folder(config)
        return cls(as_records=platform == "tpu")

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
