"""Tables in two tiers: the rows used most in device memory, every row in host memory.

The rows in device memory are hot, the others cold. The host's copy of a hot row is stale while the row is hot. The hot
rows of a batch stay on the device. Its cold rows cross in rounds of M places, in as many rounds as they need.

Rows are moved and never computed with: they equal those of a table on the device bit for bit, whichever rows are hot.
Between steps, `promote` exchanges hot rows for rows of a batch that were used more.

Legend: R local rows of a shard, K of them hot, U rows of a batch, M places of a round, L places of whole rounds, E rows
that an exchange may move, in whole rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from engram_jax.config import ConfigError, MemoryConfig
from engram_jax.memory.placements.base import Placement
from engram_jax.memory.placements.device import DevicePlacement
from engram_jax.memory.placements.host import HostPlacement, HostTable
from engram_jax.memory.placements.records import Records
from engram_jax.memory.routing import stable_sort
from engram_jax.memory.table import ROW_MULTIPLE, TableState

ROUNDS = 8
"""Rounds in which a batch crosses if all of its rows are cold."""
ROUND_ROWS = 512
"""Smallest number of places in a round."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TieredTable:
    """One shard in two tiers.

    hot: [K, ...] in device memory, a table of `DevicePlacement`, in no order.
    hot_ids: int32 [K], the local rows that are hot, ascending.
    hot_places: int32 [K], the place in `hot` of each of these rows.
    tail: all R rows, in host memory.
    """

    hot: TableState | Records
    hot_ids: jax.Array
    hot_places: jax.Array
    tail: HostTable


@dataclass(frozen=True)
class TieredPlacement(Placement):
    """The rows used most in device memory, every row in host memory."""

    hot_share: float
    """Share of a shard's rows that are hot, in (0, 1]."""
    device: DevicePlacement
    host: HostPlacement
    has_tiers = True
    serving_placement = "host"

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> TieredPlacement:
        return cls(config.hot_rows, DevicePlacement.create(config, platform), HostPlacement.create(config, platform))

    @property
    def device_share(self) -> float:
        return self.hot_share

    def at_rest(self, mesh: Mesh, table: TieredTable) -> TieredTable:
        return TieredTable(None, None, None, self.host.at_rest(mesh, table.tail))  # type: ignore[arg-type]

    def check_room(self, shard_bytes: int, shards_here: int) -> None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        needed = self.hot_share * shard_bytes
        if limit is not None and needed > limit:
            raise ConfigError(
                f"memory.hot_rows={self.hot_share} of the tables need {needed / 1e9:.1f} GB on each device, which has "
                f"{limit / 1e9:.1f} GB: lower it, choose memory.placement=host, or use more devices."
            )
        self.host.check_room(shard_bytes, shards_here)

    def allocate(self, num_rows: int, like: TableState) -> TieredTable:
        """Zeros. The first rows are hot, since no row has been used yet."""
        first_K = jnp.arange(self.num_hot(num_rows), dtype=jnp.int32)
        hot = self.device.allocate(len(first_K), like)
        return TieredTable(hot, first_K, first_K, self.host.allocate(num_rows, like))

    def num_hot(self, num_rows: int) -> int:
        """K: hot rows among `num_rows` local ones, a multiple of `ROW_MULTIPLE` if not all of them."""
        return min(math.ceil(self.hot_share * num_rows / ROW_MULTIPLE) * ROW_MULTIPLE, num_rows)

    def take(self, table: TieredTable, ids_U: jax.Array) -> TableState:
        found = _find(table, ids_U)
        batch = jax.tree.map(lambda x: x[found.rank_U], self.device.take(table.hot, found.place_U))

        def one_round(i: jax.Array, batch: TableState) -> TableState:
            ids_M, at_M = _part(found, i)
            cold = self.host.take(table.tail, ids_M)
            return jax.tree.map(lambda x, new: x.at[at_M].set(new, mode="drop", **_SORTED), batch, cold)

        return _in_rounds(one_round, batch, found)

    def put(self, table: TieredTable, ids_U: jax.Array, batch: TableState) -> TieredTable:
        found = _find(table, ids_U)
        hot = self.device.put(table.hot, found.place_U, jax.tree.map(lambda x: x[found.order_U], batch))

        def one_round(i: jax.Array, tail: HostTable) -> HostTable:
            ids_M, at_M = _part(found, i)
            cold = jax.tree.map(lambda x: x.at[at_M].get(mode="clip", indices_are_sorted=True), batch)
            return self.host.put(tail, ids_M, cold)

        # All rounds are in the loop: with one round before it, XLA for TPUs copies the whole table to the device.
        return TieredTable(hot, table.hot_ids, table.hot_places, _in_rounds(one_round, table.tail, found))

    def promote(self, table: TieredTable, ids_U: jax.Array) -> TieredTable:
        """The table with the batch's cold rows in place of hot rows that were used less; the same rows by value.

        The cold rows used most are paired with the hot rows used least, and a pair is exchanged if the cold one was
        used more. Call it when the batch's update is saved, so that its uses count, and with the table donated.
        """
        num_rows, num_hot = len(table.tail.bits.uses), len(table.hot_ids)
        count = min(len(ids_U), num_hot)
        size, rounds = _rounds(count)
        most_E, cold_E = lax.top_k(self._cold_uses(table, ids_U), count)
        least_E, place_E = lax.top_k(-table.hot.uses, count)
        pairs = (most_E > -least_E, cold_E, place_E)
        better_E, cold_E, place_E = (jnp.pad(x, (0, size * rounds - count)) for x in pairs)
        beyond_E = jnp.arange(size * rounds, dtype=jnp.int32)
        # It does not matter which cold row takes which hot row's place, so both lists can be sorted.
        up_E = jnp.sort(jnp.where(better_E, ids_U[cold_E], num_rows + beyond_E))
        place_E = jnp.sort(jnp.where(better_E, place_E, num_hot + beyond_E))
        id_of_place_K = jnp.zeros_like(table.hot_ids).at[table.hot_places].set(table.hot_ids, unique_indices=True)
        down_E = jnp.where(place_E < num_hot, id_of_place_K.at[place_E].get(mode="clip"), num_rows + beyond_E)

        def one_round(i: jax.Array, tiers: tuple[Any, HostTable]) -> tuple[Any, HostTable]:
            hot, tail = tiers
            up_M, place_M, down_M = (lax.dynamic_slice_in_dim(x, i * size, size) for x in (up_E, place_E, down_E))
            down_M, order_M = stable_sort(down_M)
            demoted = jax.tree.map(lambda x: x[order_M], self.device.take(hot, place_M))
            promoted = self.host.take(tail, up_M)
            # Unused places get the other tier's rows. They are dropped, but they make each tier's writing depend on
            # both tiers' reading. Otherwise both tiers would be copied in every round: XLA:CPU drops barriers early.
            unused_M = up_M >= num_rows
            promoted, demoted = _where(unused_M, demoted, promoted), _where(unused_M, promoted, demoted)
            return self.device.put(hot, place_M, promoted), self.host.put(tail, down_M, demoted)

        exchanges = jnp.sum(better_E, dtype=jnp.int32)
        hot, tail = lax.fori_loop(0, -(-exchanges // size), one_round, (table.hot, table.tail))
        id_of_place_K = id_of_place_K.at[place_E].set(up_E, mode="drop", **_SORTED)
        return TieredTable(hot, *stable_sort(id_of_place_K), tail)

    def hit_rate(self, table: TieredTable, ids_U: jax.Array) -> jax.Array:
        """Share of the rows that are hot: float32 scalar, NaN where no id is a row."""
        is_row_U = ids_U < len(table.tail.bits.uses)
        return jnp.sum(_is_hot(table, ids_U)[0], dtype=jnp.float32) / jnp.sum(is_row_U, dtype=jnp.float32)

    def _cold_uses(self, table: TieredTable, ids_U: jax.Array) -> jax.Array:
        """Updates that touched each row: int32 [U], -1 for hot rows and unused places."""
        uses_R = table.tail.bits.uses
        counts = HostTable(TableState(uses_R, {}, uses_R), (str(uses_R.dtype),) * 2)  # the rows are not read
        uses_U = self.host.take(counts, ids_U).uses
        return jnp.where(_is_hot(table, ids_U)[0] | (ids_U >= len(uses_R)), -1, uses_U)


_SORTED: Any = {"indices_are_sorted": True, "unique_indices": True}


class _Found(NamedTuple):
    """Where the rows of a batch lie: int32 arrays. Lists of places ascend; unused places lie beyond the array."""

    place_U: jax.Array
    """Places in `hot` of the hot rows."""
    order_U: jax.Array
    """Index in the batch of the row at each of these places."""
    rank_U: jax.Array
    """The inverse of `order_U`."""
    cold_L: jax.Array
    """Ids of the cold rows."""
    at_L: jax.Array
    """Index in the batch of each cold row."""
    cold: jax.Array
    """Number of cold rows: a scalar."""


def _is_hot(table: TieredTable, ids_U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether each row is hot, and its place in `hot` if so."""
    at_U = jnp.minimum(jnp.searchsorted(table.hot_ids, ids_U), len(table.hot_ids) - 1)
    return table.hot_ids[at_U] == ids_U, table.hot_places[at_U]


def _find(table: TieredTable, ids_U: jax.Array) -> _Found:
    num_rows, num_hot, count = len(table.tail.bits.uses), len(table.hot_ids), len(ids_U)
    batch_U = jnp.arange(count, dtype=jnp.int32)
    is_hot_U, place_U = _is_hot(table, ids_U)
    place_U, order_U = stable_sort(jnp.where(is_hot_U, place_U, num_hot + batch_U))
    rank_U = jnp.zeros_like(order_U).at[order_U].set(batch_U, unique_indices=True)
    is_cold_U = ~is_hot_U & (ids_U < num_rows)
    size, rounds = _rounds(count)
    unused_L = jnp.arange(size * rounds, dtype=jnp.int32)
    to_U = jnp.where(is_cold_U, jnp.cumsum(is_cold_U, dtype=jnp.int32) - 1, len(unused_L))
    cold_L = (num_rows + unused_L).at[to_U].set(ids_U, mode="drop")
    at_L = (count + unused_L).at[to_U].set(batch_U, mode="drop")
    return _Found(place_U, order_U, rank_U, cold_L, at_L, jnp.sum(is_cold_U, dtype=jnp.int32))


def _where(mask_U: jax.Array, batch: TableState, other: TableState) -> TableState:
    return jax.tree.map(lambda x, y: jnp.where(lax.expand_dims(mask_U, range(1, x.ndim)), x, y), batch, other)


def _rounds(count: int) -> tuple[int, int]:
    """M, and the number of rounds for `count` rows."""
    size = min(count, max(ROUND_ROWS, -(-count // ROUNDS)))
    return size, -(-count // size)


def _in_rounds(one_round: Callable[..., Any], carry: Any, found: _Found) -> Any:
    """Repeats `carry = one_round(i, carry)` for as many rounds as the cold rows need."""
    return lax.fori_loop(0, -(-found.cold // _rounds(len(found.rank_U))[0]), one_round, carry)


def _part(found: _Found, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round i of the cold rows: their ids and their indices in the batch, [M] both."""
    size, _ = _rounds(len(found.rank_U))
    return tuple(lax.dynamic_slice_in_dim(x, i * size, size) for x in (found.cold_L, found.at_L))  # type: ignore[return-value]
