"""A trained memory converted for serving: every row in FP8 without slots, about a quarter of its float32 bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from engram_jax.config import require
from engram_jax.memory.chunks import CHUNK_ROWS, chunk_reader, chunk_writer
from engram_jax.memory.description import MemoryState
from engram_jax.memory.placements import Placement
from engram_jax.memory.quantized import CODE, FrozenFP8, quantize
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableState


def freeze(
    store: MemoryStore, state: MemoryState, step: jax.Array | int, placement: Placement | None = None
) -> tuple[MemoryStore, MemoryState]:
    """The store and state of the same memory in FP8, with rows after `step` updates. Works in chunks: do not jit it.

    `fetch` of the frozen store dequantises the rows that it reads. Frozen rows cannot be trained. Call under the mesh
    of the store, if it has one.

    Args:
      step: updates that the state has had, an int32 scalar.
      placement: the placement of the frozen tables. None: the store's own.

    Raises:
      ConfigError: the width of a row is not a multiple of 32, or both stores would keep their tables in one folder.
    """
    folder = store.placement.folder
    require(
        not folder or (placement or store.placement).folder != folder,
        f"memory.mmap_dir={folder!r} holds the tables that are to be frozen: give `placement=` another folder.",
    )
    frozen = replace(store, optimizer=FrozenFP8(), row_dtype=CODE.dtype.name, placement=placement or store.placement)

    def local(chunk: TableState, step: jax.Array) -> TableState:
        rows, _ = store.optimizer.read(chunk.rows, chunk.slots, step)
        codes, scale = quantize(rows)
        return TableState(codes, {"scale": scale}, chunk.uses)

    convert = jax.jit(partial(store.on_shards, local))
    tables: dict[str, Any] = dict(frozen.allocate())
    for layer, layout in store.layouts.items():
        count = min(CHUNK_ROWS, layout.rows_per_shard)
        read, write = chunk_reader(store, count), chunk_writer(frozen, layer)
        for start in range(0, layout.rows_per_shard, count):
            chunk = convert(read(state.tables[layer], start), jax.numpy.int32(step))
            tables[layer] = write(tables[layer], start, chunk)
    used: Mapping[str, jax.Array] = state.rows_used
    return frozen, MemoryState(tables, dict(used))
