"""Routing: plans which device reads which rows for a batch, and moves rows and gradients between devices.

    plan (integers only)        lookups -> distinct requests per owner =exchange=> distinct rows each owner must read
    send (owner -> asker)       rows_UD -> one block per asker         =exchange=> one row per lookup
    collect (asker -> owner)    one gradient per lookup, summed per request =exchange=> one sum per owned row

Every device asks for a row once, although its n-grams repeat (they are Zipfian). Every owner reads and updates a row
once, although many devices ask for it. Sums follow the order of stable sorts, so they have the same bits each time.

All shapes are static: a request block has C places per owner, and an owner's list has U places. `RowPlan.need` tells
the sizes that a batch needs. A plan that needs more than it has must not be used: `training/planner.py` makes it again
with larger sizes.

Outside a mesh, and on one device, nothing is exchanged: the requests are the owner's list.

Legend: B batch, T seq, H rows per token; S shards (devices); N lookups of one device; C places per owner in a request
block, K = S * C; U rows an owner's list holds (unused ones at the end); D row width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.memory.plan import Capacity, Routes, RowPlan
from engram_jax.memory.table import TableLayout
from engram_jax.sharding import lookups
from engram_jax.transports import TRANSPORTS, Axes

# --- planning ---


def mesh_axes() -> Axes:
    """All axes of the current mesh; empty outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else mesh.axis_names


def check_mesh(name: str, layout: TableLayout) -> None:
    """Raises `ConfigError` unless the table of layer `name` has one shard per device of the current mesh."""
    devices = 1 if not mesh_axes() else jax.sharding.get_abstract_mesh().size
    found = f"the mesh has {devices} devices" if mesh_axes() else "there is no mesh"
    require(
        layout.shards == devices,
        f"The table of layer {name} is cut into {layout.shards} shards, but {found}: run this within "
        "jax.set_mesh(mesh), and build the store for that mesh (MemoryStore.create(..., shards=mesh.size)).",
    )


def on_shards(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` applied by each device to its part; outside a mesh, `function` itself."""
    if not mesh_axes():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def safe_capacity(layout: TableLayout, lookups: int) -> Capacity:
    """Capacity for any batch of `lookups` per device, also if all lookups of a device ask one owner."""
    pair = min(lookups, layout.rows_per_shard)
    return Capacity(pair, min(layout.shards * pair, layout.rows_per_shard) if layout.shards > 1 else lookups)


def plan_rows(
    ids: Mapping[str, jax.Array],
    layouts: Mapping[str, TableLayout],
    capacities: Mapping[str, Capacity] | None = None,
    transport: str = "all_to_all",
) -> dict[str, RowPlan]:
    """Plans of several tables; one exchange carries the requests of all.

    Args:
      ids: logical row ids, int32 [B, T, H] per table. Every device plans for its own tokens (`sharding.lookups`).
      layouts: the tables' shards.
      capacities: sizes of blocks and lists per table. None: blocks as large as the batch, which cannot overflow.
      transport: a name in transports.py.

    Raises:
      ConfigError: the tables are cut for another mesh, or the batch does not divide over the devices.
    """
    if not ids:
        return {}
    axes = mesh_axes()
    devices = 1 if not axes else jax.sharding.get_abstract_mesh().size
    for name, layout in layouts.items():
        check_mesh(name, layout)
        for size, dims, what in zip(ids[name].shape, lookups(2), ("sequences", "positions"), strict=False):
            parts = _size(dims)
            require(size % parts == 0, f"A batch of {size} {what} does not divide over {parts} devices.")
    if capacities is None:
        capacities = {name: safe_capacity(layouts[name], ids[name].size // devices) for name in ids}

    def local(ids: dict[str, jax.Array]) -> dict[str, RowPlan]:
        if devices == 1:
            return {name: _plan_alone(ids[name], layouts[name], axes) for name in ids}
        asked = {name: _ask(ids[name], layouts[name], capacities[name].pair, axes) for name in ids}
        sizes = jnp.stack([a.sizes_S for a in asked.values()], axis=1)
        arrived_sizes = jax.lax.all_to_all(sizes, axes, 0, 0, tiled=True)
        routes = {name: (asked[name].sizes_S, arrived_sizes[:, i]) for i, name in enumerate(asked)}
        arrived = _exchange({name: a.requests_K for name, a in asked.items()}, routes, transport, axes)
        return {n: _own(asked[n], arrived[n], routes[n], layouts[n], capacities[n], axes) for n in ids}

    if axes:
        ids = {name: jax.reshard(x, lookups(3)) for name, x in ids.items()}
    return on_shards(local, (lookups(3),), {name: _specs(axes, alone=devices == 1) for name in ids})(dict(ids))


def _size(dims: Any) -> int:
    """Number of devices over which a dim with these axes in its spec is cut."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in ((dims,) if isinstance(dims, str) else dims or ()))


def _specs(axes: Axes, alone: bool) -> RowPlan:
    split: Any = jax.P(axes)
    whole: Any = jax.P()
    routes = None if alone else Routes(split, split, split, split)
    return RowPlan(lookups(3), split, split, split, routes, Capacity(whole, whole), whole)  # type: ignore[arg-type]


class _Asked(NamedTuple):
    ids_BTH: jax.Array
    slot_N: jax.Array
    order_N: jax.Array
    requests_K: jax.Array
    sizes_S: jax.Array
    need: jax.Array
    first_fault: jax.Array


def _ask(ids_BTH: jax.Array, layout: TableLayout, capacity: int, axes: Axes) -> _Asked:
    """This device's distinct requests, ordered by owner and local row."""
    shards, rows = layout.shards, layout.rows_per_shard
    owner_N, local_N, first_fault = _locate(ids_BTH, layout, axes)
    nowhere = shards * rows  # ids outside the table sort behind all others, and no device is asked for them
    key_N = jnp.where(owner_N < shards, owner_N * rows + local_N, nowhere)
    sorted_N, order_N = stable_sort(key_N)
    rank_N = _ranks(sorted_N)
    edges = jnp.searchsorted(sorted_N, rows * jnp.arange(shards + 1, dtype=jnp.int32)).astype(jnp.int32)
    count = rank_N[-1] + 1
    first_S1 = jnp.where(edges < len(rank_N), rank_N.at[edges].get(mode="clip"), count)
    sizes_S = first_S1[1:] - first_S1[:-1]
    owner_N = sorted_N // rows
    place_N = rank_N - first_S1[jnp.minimum(owner_N, shards)]
    fits_N = (place_N < capacity) & (owner_N < shards)
    slot_N = jnp.where(fits_N, owner_N * capacity + place_N, shards * capacity)
    requests_K = jnp.full((shards * capacity,), rows, jnp.int32).at[slot_N].set(sorted_N % rows, mode="drop")
    slot_N = jnp.zeros_like(slot_N).at[order_N].set(slot_N, unique_indices=True)
    sizes_S, need = jnp.minimum(sizes_S, capacity), jnp.max(sizes_S)
    return _Asked(ids_BTH, slot_N, order_N, requests_K, sizes_S, need, first_fault)


def _own(
    asked: _Asked, arrived_K: jax.Array, sizes: tuple, layout: TableLayout, capacity: Capacity, axes: Axes
) -> RowPlan:
    """The owner's list: the distinct rows among the requests that arrived."""
    rows, (sizes_S, arrived_S) = layout.rows_per_shard, sizes
    place_in_part_K = jnp.arange(len(arrived_K), dtype=jnp.int32) % capacity.pair
    filled_K = place_in_part_K < jnp.repeat(arrived_S, capacity.pair, total_repeat_length=len(arrived_K))
    damaged_K = filled_K & ((arrived_K < 0) | (arrived_K >= rows))
    sorted_K, order_K = stable_sort(jnp.where(filled_K & ~damaged_K, arrived_K, rows))
    rank_K = _ranks(sorted_K)
    is_row_K = sorted_K < rows
    need = jnp.max(jnp.where(is_row_K, rank_K + 1, 0))
    rank_K = jnp.where(is_row_K & (rank_K < capacity.owner), rank_K, capacity.owner)
    beyond_U = rows + jnp.arange(capacity.owner, dtype=jnp.int32)
    owned_U = beyond_U.at[rank_K].set(sorted_K, mode="drop", indices_are_sorted=True)
    place_K = jnp.zeros_like(rank_K).at[order_K].set(rank_K, unique_indices=True)
    needs = Capacity(jax.lax.pmax(asked.need, axes), jax.lax.pmax(need, axes))
    faults = jnp.stack([asked.first_fault, jax.lax.psum(jnp.sum(damaged_K, dtype=jnp.int32), axes)])
    routes = Routes(place_K, order_K, sizes_S, arrived_S)
    return RowPlan(asked.ids_BTH, asked.slot_N, asked.order_N, owned_U, routes, needs, faults)  # type: ignore[arg-type]


def _plan_alone(ids_BTH: jax.Array, layout: TableLayout, axes: Axes) -> RowPlan:
    """The plan of one device: each lookup's index among the distinct rows. It cannot overflow."""
    _, local_N, first_fault = _locate(ids_BTH, layout, axes)
    rows, count = layout.rows_per_shard, local_N.size
    sorted_N, order_N = stable_sort(local_N)
    rank_N = jnp.where(sorted_N < rows, _ranks(sorted_N), count)  # ids outside the table have no place
    beyond_U = rows + jnp.arange(count, dtype=jnp.int32)
    owned_U = beyond_U.at[rank_N].set(sorted_N, mode="drop", indices_are_sorted=True)
    slot_N = jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True)
    needs = Capacity(jnp.zeros((), jnp.int32), jnp.sum(owned_U < rows, dtype=jnp.int32))  # type: ignore[arg-type]
    faults = jnp.stack([first_fault, jnp.zeros((), jnp.int32)])
    return RowPlan(ids_BTH, slot_N, order_N, owned_U, None, needs, faults)


def _locate(ids_BTH: jax.Array, layout: TableLayout, axes: Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Owner and local row of each lookup [N], and the first lookup of the whole batch with an id outside its head."""
    first_H = jnp.asarray(layout.offsets, jnp.int32)[None, None]
    sizes_H = jnp.asarray(layout.head_rows, jnp.int32)[None, None]
    wrong_N = ((ids_BTH < first_H) | (ids_BTH >= first_H + sizes_H)).reshape(-1)
    owner, local = layout.locate(ids_BTH)
    owner_N = jnp.where(wrong_N, layout.shards, owner.reshape(-1))
    local_N = jnp.where(wrong_N, layout.rows_per_shard, local.reshape(-1))
    none = jnp.iinfo(jnp.int32).max
    first = jnp.where(jnp.any(wrong_N), jnp.argmax(wrong_N).astype(jnp.int32), none)
    if axes:
        first = jax.lax.pmin(jnp.where(first < none, _flat_index(first, ids_BTH.shape), none), axes)
    return owner_N, local_N, jnp.where(first < none, first, -1)


def _flat_index(here: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Index in the whole batch's ids of an index into this device's ids [B, T, H]."""
    (B, T, H), (batch_axes, seq_axes, _) = shape, lookups(3)
    sequence, rest = jax.lax.axis_index(batch_axes).astype(jnp.int32) * B + here // (T * H), here % (T * H)
    start = jax.lax.axis_index(seq_axes).astype(jnp.int32) * T if seq_axes else 0
    return sequence * (T * _size(seq_axes) * H) + start * H + rest


def stable_sort(ids_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids in ascending order, and the index that each id had: int32 [N] both. Ids must be 0 or positive.

    Sorts id and index as one 64-bit number: 2.3 ms for 65,536 ids on CPU, where `lax.sort` of the pair takes 11 ms.
    """
    with jax.enable_x64(True):
        keys_N = (ids_N.astype(jnp.int64) << 32) | jnp.arange(ids_N.size, dtype=jnp.int64)
        keys_N = jnp.sort(keys_N)
        return (keys_N >> 32).astype(jnp.int32), keys_N.astype(jnp.int32)


def _ranks(sorted_N: jax.Array) -> jax.Array:
    """Rank of each value among the distinct values of a sorted array: 0, 1, ..."""
    starts_N = jnp.concatenate([jnp.ones((1,), bool), sorted_N[1:] != sorted_N[:-1]])
    return jnp.cumsum(starts_N, dtype=jnp.int32) - 1


# --- moving ---


def send_rows(rows: Mapping[str, jax.Array], plan: Mapping[str, RowPlan], transport: str) -> dict[str, jax.Array]:
    """Owners' rows [S * U, D] sent to the lookups: [B, T, H, D] per table, zero for ids outside the table."""
    axes = mesh_axes()

    def local(rows: dict[str, jax.Array], plan: dict[str, RowPlan]) -> dict[str, jax.Array]:
        routes = {name: p.routes for name, p in plan.items() if p.routes is not None}
        if routes:
            blocks = {name: _take(rows[name], r.place_K) for name, r in routes.items()}
            rows = _exchange(blocks, {name: (r.arrived_S, r.asked_S) for name, r in routes.items()}, transport, axes)
        return {name: _take(rows[name], p.slot_N).reshape(*p.ids_BTH.shape, -1) for name, p in plan.items()}

    return _per_table(local, rows, plan, axes, to_askers=True)


def collect_grads(grads: Mapping[str, jax.Array], plan: Mapping[str, RowPlan], transport: str) -> dict[str, jax.Array]:
    """Gradients of lookups [B, T, H, D] sent to the owners and summed per row: [S * U, D], zero in unused places."""
    axes = mesh_axes()

    def local(grads: dict[str, jax.Array], plan: dict[str, RowPlan]) -> dict[str, jax.Array]:
        sums, routes = {}, {name: p.routes for name, p in plan.items() if p.routes is not None}
        for name, p in plan.items():
            places = len(routes[name].place_K) if name in routes else len(p.owned_U)
            sums[name] = _segment_sum(grads[name].reshape(p.slot_N.size, -1), p.order_N, p.slot_N, places)
        if not routes:
            return sums
        arrived = _exchange(sums, {name: (r.asked_S, r.arrived_S) for name, r in routes.items()}, transport, axes)
        return {
            name: _segment_sum(arrived[name], r.order_K, r.place_K, len(plan[name].owned_U))
            for name, r in routes.items()
        }

    return _per_table(local, grads, plan, axes, to_askers=False)


def _per_table(
    function: Callable, arrays: Mapping, plan: Mapping[str, RowPlan], axes: Axes, to_askers: bool
) -> dict[str, jax.Array]:
    """`function(arrays, plan)` applied by each device to its part."""
    owners, askers = {name: jax.P(axes) for name in plan}, {name: lookups(4) for name in plan}
    given, returned = (owners, askers) if to_askers else (askers, owners)
    specs = {name: _specs(axes, alone=p.routes is None) for name, p in plan.items()}
    moved = {name: arrays[name] if to_askers or not axes else jax.reshard(arrays[name], lookups(4)) for name in plan}
    return on_shards(function, (given, specs), returned)(moved, dict(plan))


def _take(rows_UD: jax.Array, place_N: jax.Array) -> jax.Array:
    return rows_UD.at[place_N].get(mode="fill", fill_value=0)


def _segment_sum(values_ND: jax.Array, order_N: jax.Array, place_N: jax.Array, places: int) -> jax.Array:
    """Sums of the values at each place, in the given order, without places beyond the end."""
    return jax.ops.segment_sum(values_ND[order_N], place_N[order_N], places, indices_are_sorted=True)


def _exchange(
    blocks: Mapping[str, jax.Array], sizes: Mapping[str, tuple], transport: str, axes: Axes
) -> dict[str, jax.Array]:
    """Exchanges one block per table; all_to_all carries tables of equal width together."""
    first = next(iter(blocks.values()))
    alike = all(b.shape[1:] == first.shape[1:] and b.dtype == first.dtype for b in blocks.values())
    if transport != "all_to_all" or len(blocks) == 1 or not alike:
        move = TRANSPORTS[transport]
        return {name: move(block, sizes[name][0], sizes[name][1], axes) for name, block in blocks.items()}
    shards = len(next(iter(sizes.values()))[0])
    parts = [block.reshape(shards, -1, *block.shape[1:]) for block in blocks.values()]
    moved = jax.lax.all_to_all(jnp.concatenate(parts, axis=1), axes, 0, 0, tiled=True)
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    arrived = jnp.split(moved, ends, axis=1)
    return {name: part.reshape(block.shape) for (name, block), part in zip(blocks.items(), arrived, strict=True)}
