"""Tables in the memory of the devices that own them."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from engram_jax.config import MemoryConfig
from engram_jax.memory.table import TableState


@dataclass(frozen=True)
class DevicePlacement:
    in_program: bool = field(default=True, init=False)

    @classmethod
    def create(cls, config: MemoryConfig) -> DevicePlacement:
        return cls()

    def allocate(self, num_rows: int, like: TableState) -> TableState:
        return jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), like)

    def take(self, table: TableState, ids_U: jax.Array) -> TableState:
        def rows(array_R: jax.Array) -> jax.Array:
            return array_R.at[ids_U].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

        return jax.tree.map(rows, table)

    def put(self, table: TableState, ids_U: jax.Array, batch: TableState) -> TableState:
        def replaced(array_R: jax.Array, new_U: jax.Array) -> jax.Array:
            return array_R.at[ids_U].set(new_U, mode="drop", indices_are_sorted=True, unique_indices=True)

        return jax.tree.map(replaced, table, batch)
