"""Whole tables, a chunk of rows at a time: filling, reading and writing them, for start, checkpoints and export.

A chunk is the same local rows of every shard. Filling, saving and restoring a table need the memory of one or two
chunks beside it, whatever its placement. Training steps do not use this file.

Legend: S shards (devices of the mesh), R local rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.memory import numpy_tables, routing, transfer
from engram_jax.memory.description import MemoryDescription, MemoryState
from engram_jax.memory.placements import Table
from engram_jax.memory.table import RowInit, TableState

CHUNK_ROWS = 65_536
"""Local rows of a chunk when tables are made."""


def new_tables(store: MemoryDescription, key: jax.Array, tables: dict[str, Table]) -> dict[str, Table]:
    """Allocated tables filled with their first rows, for `MemoryStore.init`. The tables are donated."""
    first = jax.jit(partial(first_rows, store), static_argnames=("layer", "count"))
    for layer in store.layers:
        write = chunk_writer(store, layer)
        rows, layer_key = store.layouts[layer].rows_per_shard, jax.random.fold_in(key, int(layer))
        count = min(CHUNK_ROWS, rows)
        for start in range(0, rows, count):
            chunk = first(layer_key, jnp.int32(start), layer, count)
            tables[layer] = write(tables[layer], start, chunk)
            jax.block_until_ready(tables[layer])  # otherwise chunks queue up in memory
    return tables


def first_rows(store: MemoryDescription, key: jax.Array, start: jax.Array, layer: str, count: int) -> TableState:
    """New local rows start .. start + count of every shard: [S * count, ...], zero in padding."""
    make = RowInit(store.config.engram_head_dim, store.init_std, store.row_dtype)

    def local(key: jax.Array, start: jax.Array) -> TableState:
        logical_U = store.logical_rows(layer, start + jnp.arange(count, dtype=jnp.int32))
        rows_UD = make(key, logical_U)
        rows_UD = jnp.where(logical_U[:, None] < store.num_rows(layer), rows_UD, jnp.zeros_like(rows_UD))
        return store.new_rows(rows_UD)

    return store.on_shards(local, key, start)


def chunk_reader(store: MemoryDescription, count: int) -> Callable[[Table, int], TableState]:
    """`chunk = read(table, start)`: local rows start .. start + count of every shard, as stored: [S * count, ...].

    Rows beyond a shard's end read as zero.
    """
    if not store.placement.in_program:
        return lambda table, start: numpy_tables.read_chunk(store, table, start, count)

    def local(table: Table, start: jax.Array) -> TableState:
        return store.placement.take(table, start + jnp.arange(count, dtype=jnp.int32))

    read = jax.jit(partial(store.on_shards, local))
    return lambda table, start: read(table, jnp.int32(start))


def chunk_writer(store: MemoryDescription, layer: str) -> Callable[[Table, int, TableState], Table]:
    """`table = write(table, start, chunk)`, the inverse of `chunk_reader`; the table is donated."""
    if not store.placement.in_program:
        return lambda table, start, chunk: numpy_tables.write_chunk(store, table, start, chunk)

    def local(table: Table, start: jax.Array, chunk: TableState) -> Table:
        return store.placement.put(table, start + jnp.arange(len(chunk.uses), dtype=jnp.int32), chunk)

    write = jax.jit(partial(store.on_shards, local), donate_argnums=0, out_shardings=store.at_rest(layer))
    return lambda table, start, chunk: write(table, jnp.int32(start), chunk)


def filled(
    store: MemoryDescription,
    layer: str,
    table: Table,
    read: Callable[[int, int, int], TableState],
    count: int = CHUNK_ROWS,
    convert: Callable[[TableState], TableState] = lambda chunk: chunk,
) -> Table:
    """A table filled with rows from `read`. Needs the memory of two chunks beside the table.

    Args:
      read: `read(shard, start, count)` gives local rows start .. start + count of a shard, NumPy arrays. It is also
        asked for rows beyond the shard's end, which are dropped.
      count: local rows of a chunk.
      convert: turns what was read into rows of this store, on the devices.
    """
    rows, sharding = store.layouts[layer].rows_per_shard, transfer.sharding_over_devices()
    shards = transfer.shards_here(sharding, store.shards)
    count = min(count, rows)
    write = chunk_writer(store, layer)
    for start in range(0, rows, count):
        parts = [read(shard, start, count) for shard in shards]  # while the previous chunk is written
        jax.block_until_ready(table)  # reading can be faster than writing: chunks would queue up in memory
        table = write(table, start, convert(transfer.to_devices(parts, sharding, store.shards)))
    return table


def logical_tables(
    store: MemoryDescription, state: MemoryState, step: jax.Array | int
) -> Mapping[str, jax.Array | np.ndarray]:
    """Every row after `step` updates, for `MemoryStore.materialize`: float32 [num_rows, head_dim] per layer."""
    if not store.placement.in_program:
        return numpy_tables.materialize(store, state.tables, step, CHUNK_ROWS)

    def local(table: Table, step: jax.Array, layer: str) -> jax.Array:
        loaded = store.placement.take(table, jnp.arange(store.layouts[layer].rows_per_shard, dtype=jnp.int32))
        return store.optimizer.read(loaded.rows, loaded.slots, step)[0]

    tables = {}
    for layer, layout in store.layouts.items():
        read = jax.jit(partial(store.on_shards, partial(local, layer=layer)))
        rows = read(state.tables[layer], jnp.asarray(step, jnp.int32))
        tables[layer] = layout.to_logical(jax.reshard(rows, jax.P()) if routing.mesh_axes() else rows)
    return tables
