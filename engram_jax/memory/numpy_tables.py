"""Tables outside compiled programs (`Placement.in_program` is False): Python reads and writes their rows between steps.

`MemoryState.tables[layer]` is then a list with one shard for each device of this process, in the mesh's order, each as
the placement keeps it. The functions here are the store's verbs for such tables. They cannot be jitted, and they write
in place, as programs do with donated tables. Rows cross as NumPy arrays; on the devices they have the same form as
with any other placement: [S * U, ...], cut over all devices.

Legend: S shards (devices of the mesh); R local rows of a shard, U rows of a batch or chunk, D row width.
"""

from __future__ import annotations

import jax
import numpy as np

from engram_jax.memory import routing
from engram_jax.memory.description import LoadedRows, MemoryDescription, MemoryPlan
from engram_jax.memory.placements import Table
from engram_jax.memory.table import TableState
from engram_jax.memory.transfer import parts_here, sharding_over_devices, to_devices, tree_parts_here

Tables = dict[str, list[Table]]
"""By layer, the shards that this process feeds to its devices."""


def allocate(store: MemoryDescription) -> Tables:
    """Tables of zeros.

    Raises:
      ConfigError: the tables do not fit.
    """
    here = len(sharding_over_devices().addressable_devices)
    num_rows = {f"layer-{layer}": layout.rows_per_shard for layer, layout in store.layouts.items()}
    tables = store.placement.allocate_tables(num_rows, here, store.row_shapes())
    return {layer: tables[f"layer-{layer}"] for layer in store.layers}


def load(store: MemoryDescription, tables: Tables, plan: MemoryPlan) -> LoadedRows:
    """The plan's rows as the tables hold them, on the devices of their owners: [S * U, ...] per layer."""
    take, loaded = store.placement.take, {}
    for layer, p in plan.items():
        parts = [take(shard, ids_U) for shard, ids_U in zip(tables[layer], parts_here(p.owned_U), strict=True)]
        loaded[layer] = to_devices(parts, p.owned_U.sharding, store.shards)
    return loaded


def save(store: MemoryDescription, tables: Tables, plan: MemoryPlan, loaded: LoadedRows) -> Tables:
    """Writes rows back, in place; waits until the devices have computed them.

    A compiled step has no tables ({}): there this writes nothing, and the caller saves the rows that the step returns.
    """
    for layer, shards in tables.items():
        ids, batches = parts_here(plan[layer].owned_U), tree_parts_here(loaded[layer])
        for shard, ids_U, batch in zip(shards, ids, batches, strict=True):
            store.placement.put(shard, ids_U, batch)
    return tables


def materialize(
    store: MemoryDescription, tables: Tables, step: jax.Array | int, chunk_rows: int
) -> dict[str, np.ndarray]:
    """Every row as it stands after `step` updates: float32 [num_rows, head_dim] per layer, on every process."""
    axes = routing.mesh_axes()

    def read(chunk: TableState, step: jax.Array) -> jax.Array:
        rows = routing.on_shards(
            lambda loaded, step: store.optimizer.read(loaded.rows, loaded.slots, step)[0],
            (jax.P(axes), jax.P()),
            jax.P(axes),
        )(chunk, step)
        return jax.reshard(rows, jax.P()) if axes else rows

    read = jax.jit(read)
    result = {}
    for layer, layout in store.layouts.items():
        rows_ND = np.empty((layout.num_rows, store.config.engram_head_dim), np.float32)
        count = min(chunk_rows, layout.rows_per_shard)
        for start in range(0, layout.rows_per_shard, count):
            chunk = np.asarray(read(read_chunk(store, tables[layer], start, count), np.int32(step)))
            for shard in range(layout.shards):
                for run in layout.runs(shard):
                    first, end = max(run.local, start), min(run.local + run.length, start + count)
                    if first < end:
                        place, source = run.logical + first - run.local, shard * count + first - start
                        rows_ND[place : place + end - first] = chunk[source : source + end - first]
        result[layer] = rows_ND
    return result


def read_chunk(store: MemoryDescription, shards: list[Table], start: int, count: int) -> TableState:
    """Local rows start .. start + count of every shard: device arrays [S * count, ...], zero beyond a shard's end."""
    ids_U = np.arange(start, start + count, dtype=np.int32)
    parts = [store.placement.take(shard, ids_U) for shard in shards]
    return to_devices(parts, sharding_over_devices(), store.shards)


def write_chunk(store: MemoryDescription, shards: list[Table], start: int, chunk: TableState) -> list[Table]:
    """The inverse of `read_chunk`, in place; rows beyond a shard's end are dropped."""
    for shard, part in zip(shards, tree_parts_here(chunk), strict=True):
        store.placement.put_range(shard, start, part)
    return shards
