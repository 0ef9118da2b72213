"""The plan of row reads: which rows a batch needs, which devices ask for them and which own them. Integers only.

routing.py makes plans; this file holds their types and the checks of a finished plan.

Legend: B batch, T seq, H rows per token; S shards (devices); N lookups of one device; C places per owner in a request
block, K = S * C; U rows an owner's list holds (unused ones at the end).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Capacity(NamedTuple):
    """Sizes of the static shapes: C places per pair of devices, U places per owner."""

    pair: int
    owner: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowPlan:
    """The rows that a batch reads in one Engram layer: int32 arrays, a pure function of the batch's tokens.

    Globally, every array except `ids_BTH` and the counts is [S * size], one part per device.
    """

    ids_BTH: jax.Array
    """Logical rows of the layer's table."""
    slot_N: jax.Array
    """Each lookup's place among the requests (K); on one device, among the owner's rows."""
    order_N: jax.Array
    """The lookups in ascending order of their slots."""
    owned_U: jax.Array
    """The distinct local rows that this owner must read, ascending; ids in unused places are R and above."""
    routes: Routes | None
    """How requests and rows cross the mesh. None on one device."""
    need: Capacity
    """The largest block and the largest list that any device needs: two scalars."""
    faults: jax.Array
    """[2]: the first lookup whose id lies outside its head (flat index in B, T, H; -1: none), and the number of damaged
    requests."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routes:
    """Routes of a plan between the devices that ask and the devices that own."""

    place_K: jax.Array
    """At the owner: the index in `owned_U` of each arrived request; U where nothing arrived."""
    order_K: jax.Array
    """At the owner: the arrived requests in ascending order of their rows; within a row, in the order of the askers."""
    asked_S: jax.Array
    """Requests this device sends to each owner."""
    arrived_S: jax.Array
    """Requests that arrived here from each asker."""


def capacity(plan: RowPlan) -> Capacity:
    """The capacity that a plan was made with."""
    if plan.routes is None:
        return Capacity(0, len(plan.owned_U))
    shards = jax.typeof(plan.routes.place_K).sharding.mesh.size
    return Capacity(len(plan.routes.place_K) // shards**2, len(plan.owned_U) // shards)


def requests(plan: RowPlan) -> jax.Array:
    """Number of distinct rows that each device asks for, summed over devices: int32 scalar."""
    return plan.need.owner if plan.routes is None else jnp.sum(plan.routes.asked_S)  # type: ignore[return-value]


def overflow(plan: RowPlan) -> jax.Array:
    """Places by which the fullest block or list exceeds its capacity: int32 scalar, 0 for a usable plan."""
    if plan.routes is None:
        return jnp.zeros((), jnp.int32)
    given = capacity(plan)
    return jnp.maximum(jnp.maximum(plan.need.pair - given.pair, plan.need.owner - given.owner), 0)


def fits(plan: Mapping[str, RowPlan]) -> bool:
    """Whether every block and list fits its capacity. Waits for the plan."""
    needs = jax.device_get({layer: p.need for layer, p in plan.items()})
    return all(
        p.routes is None or all(n <= c for n, c in zip(needs[la], capacity(p), strict=True)) for la, p in plan.items()
    )


class RowIdError(ValueError):
    """A lookup with an id outside its head, or a request that was damaged on its way."""


def check(plan: Mapping[str, RowPlan]) -> None:
    """Checks all ids of a plan. Waits for the plan.

    Every process gets the same result: all of them raise, and none waits for another.

    Raises:
      RowIdError: an id lies outside its head (names layer, head and position), or a request was damaged.
    """
    for layer, p in plan.items():
        first, damaged = (int(x) for x in jax.device_get(p.faults))
        if first >= 0:
            b, t, h = np.unravel_index(first, p.ids_BTH.shape)
            raise RowIdError(
                f"Layer {layer}, head {h}, sequence {b}, position {t}: the row id lies outside its head. Ids must come "
                "from this store's own plan (its hash constants), or lie within the head's rows."
            )
        if damaged:
            raise RowIdError(
                f"Layer {layer}: {damaged} row requests arrived outside the owner's shard, so they were damaged on the "
                "way. Try memory.transport=all_to_all, and check the interconnect."
            )
