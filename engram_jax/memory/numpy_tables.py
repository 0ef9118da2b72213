"""Tables that a compiled program cannot reach (memory.placement=numpy): rows are carried in before a step, out after.

`MemoryState.tables[layer]` is then a `TableState` of NumPy arrays, which hold what this process feeds to its own
devices: the shards of the mesh's addressable devices, one after the other in the mesh's order, [A * R, ...]. The
store's verbs for tables are host functions here: they must not be jitted, and they write in place, as donation does
for tables on devices. What they hand to and take from a program has the same form as with any other placement:
[S * U, ...], cut over all devices.

Legend: S shards, A of them fed by this process; R local rows of a shard, U rows of a batch or chunk, D row width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from engram_jax.memory import routing
from engram_jax.memory.description import LoadedRows, MemoryDescription, MemoryPlan
from engram_jax.memory.placements.numpy_arrays import NumpyPlacement
from engram_jax.memory.table import TableState

Tables = dict[str, TableState]


# --- the store's verbs ---


def allocate(store: MemoryDescription) -> Tables:
    """Tables of zeros. Raises `ConfigError` where memory or disk does not suffice."""
    here = len(sharding_over_devices().addressable_devices)
    num_rows = {layer: here * layout.rows_per_shard for layer, layout in store.layouts.items()}
    named = _placement(store).allocate_all({f"layer-{la}": n for la, n in num_rows.items()}, store.row_shapes())
    return {layer: named[f"layer-{layer}"] for layer in num_rows}


def abstract_tables(store: MemoryDescription) -> Tables:
    """Shapes and dtypes of this process's tables."""
    here, like = len(sharding_over_devices().addressable_devices), store.row_shapes()

    def shapes(rows: int) -> TableState:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((here * rows, *x.shape[1:]), x.dtype), like)

    return {layer: shapes(layout.rows_per_shard) for layer, layout in store.layouts.items()}


def load(store: MemoryDescription, tables: Tables, plan: MemoryPlan) -> LoadedRows:
    """The plan's rows as they lie in the tables, on the devices of their owners: [S * U, ...] per layer."""
    placement = _placement(store)
    loaded = {}
    for layer, p in plan.items():
        shards = _shards(tables[layer], store.layouts[layer].rows_per_shard)
        parts = [placement.take(shard, ids_U) for shard, ids_U in zip(shards, _parts(p.owned_U), strict=True)]
        loaded[layer] = to_devices(parts, p.owned_U.sharding, store.shards)
    return loaded


def save(store: MemoryDescription, tables: Tables, plan: MemoryPlan, loaded: LoadedRows) -> Tables:
    """Writes rows back, in place; waits for the device to have them.

    Without tables there is nothing to write: a compiled step has none, and its caller saves what it returns.
    """
    placement = _placement(store)
    for layer, table in tables.items():
        shards = _shards(table, store.layouts[layer].rows_per_shard)
        for shard, ids_U, batch in zip(shards, _parts(plan[layer].owned_U), _tree_parts(loaded[layer]), strict=True):
            placement.put(shard, ids_U, batch)
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


def read_chunk(store: MemoryDescription, table: TableState, start: int, count: int) -> TableState:
    """Local rows start .. start + count of every shard: device arrays [S * count, ...], zero beyond a shard's end."""
    sharding = sharding_over_devices()
    ids_U = np.arange(start, start + count, dtype=np.int32)
    shards = _shards(table, len(table.uses) // len(sharding.addressable_devices))
    return to_devices([_placement(store).take(shard, ids_U) for shard in shards], sharding, store.shards)


def write_chunk(store: MemoryDescription, table: TableState, start: int, chunk: TableState) -> TableState:
    """The inverse of `read_chunk`, in place; rows beyond a shard's end are dropped."""
    shards = _shards(table, len(table.uses) // len(sharding_over_devices().addressable_devices))
    for shard, part in zip(shards, _tree_parts(chunk), strict=True):
        for array_R, new_U in zip(jax.tree.leaves(shard), jax.tree.leaves(part), strict=True):
            place = array_R[start : start + len(new_U)]
            new_U = new_U[: len(place)]
            if np.any(new_U) or np.any(place):  # files stay sparse where zeros would replace zeros
                place[...] = new_U
    return table


# --- between host and devices ---


def _placement(store: MemoryDescription) -> NumpyPlacement:
    assert isinstance(store.placement, NumpyPlacement)
    return store.placement


def sharding_over_devices() -> jax.sharding.Sharding:
    """Of arrays cut over all devices of the current mesh; the first device outside one."""
    axes = routing.mesh_axes()
    if not axes:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(axes))  # type: ignore[arg-type]


def _shards(table: TableState, rows: int) -> list[TableState]:
    """Views of the shards that lie here, of `rows` rows each."""
    starts = range(0, len(table.uses), rows)
    return [jax.tree.map(lambda x, start=start: x[start : start + rows], table) for start in starts]


def _parts(array_U: jax.Array) -> list[np.ndarray]:
    """What the devices of this process hold of an array, in the mesh's order. Waits for it."""
    shards = sorted(array_U.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data) for shard in shards]


def _tree_parts(tree: TableState) -> list[TableState]:
    """`_parts` of every leaf: one tree per device."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(part) for part in zip(*map(_parts, leaves), strict=True)]


def shards_here(sharding: jax.sharding.Sharding, shards: int) -> list[int]:
    """The shards of this process's devices, ascending."""
    return sorted(index[0].start or 0 for index in sharding.addressable_devices_indices_map((shards,)).values())  # type: ignore[index]


def to_devices(parts: Sequence[TableState], sharding: jax.sharding.Sharding, shards: int) -> TableState:
    """The inverse of `_tree_parts`: [S * U, ...], each part on its device."""
    places = sharding.addressable_devices_indices_map((shards,))
    devices = sorted(places, key=lambda device: places[device][0].start or 0)  # type: ignore[index]

    def join(*blocks: np.ndarray) -> jax.Array:
        shape = (shards * len(blocks[0]), *blocks[0].shape[1:])
        arrays = [jax.device_put(block, device) for block, device in zip(blocks, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, _of_rank(sharding, len(shape)), arrays)

    return jax.tree.map(join, *parts)


def _of_rank(sharding: jax.sharding.Sharding, rank: int) -> jax.sharding.Sharding:
    """With every dim spelt out, as in the results of a program: jit compiles again for the short form."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    dims = tuple(sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, jax.P(*dims, *[None] * (rank - len(dims))))  # type: ignore[arg-type]
