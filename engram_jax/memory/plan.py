"""A plan of row reads: which rows a batch needs, who asks for them and who owns them. Integers only.

Made by routing.py; everything here is what a plan says of itself.

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
    """Places of the static shapes: C per pair of devices, U per owner."""

    pair: int
    owner: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowPlan:
    """Which rows a batch reads in one Engram layer. A pure function of its tokens; int32 throughout.

    In global view every array but `ids_BTH` and the counts is device-major: [S * size], each device its own part.
    """

    ids_BTH: jax.Array
    """Logical rows of the layer's table."""
    slot_N: jax.Array
    """For each lookup its place among the requests (K), or among the owner's rows where nothing is exchanged."""
    order_N: jax.Array
    """The lookups in ascending order of their slots."""
    owned_U: jax.Array
    """The distinct local rows this owner must read, ascending; unused places lie beyond the shard."""
    routes: Routes | None
    """None on one device."""
    need: Capacity
    """The largest block and list that any device has use for: two scalars."""
    faults: jax.Array
    """[2]: the first lookup whose id is no row of its head (flat index in B, T, H; -1: none), and how many requests
    arrived damaged."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routes:
    place_K: jax.Array
    """At the owner: for each arrived request its row in `owned_U`; U where nothing arrived."""
    order_K: jax.Array
    """The arrived requests in ascending order of their rows, askers in their order within a row."""
    asked_S: jax.Array
    """Requests this device sends to each owner."""
    arrived_S: jax.Array
    """Requests that arrived here from each asker."""


def capacity(plan: RowPlan) -> Capacity:
    """The places a plan was made with."""
    if plan.routes is None:
        return Capacity(0, len(plan.owned_U))
    shards = jax.typeof(plan.routes.place_K).sharding.mesh.size
    return Capacity(len(plan.routes.place_K) // shards**2, len(plan.owned_U) // shards)


def requests(plan: RowPlan) -> jax.Array:
    """Distinct rows that the devices ask for, all askers together: int32 scalar."""
    return plan.need.owner if plan.routes is None else jnp.sum(plan.routes.asked_S)  # type: ignore[return-value]


def overflow(plan: RowPlan) -> jax.Array:
    """Places by which the fullest block or list exceeds its capacity: int32 scalar, 0 for a plan that may be used."""
    if plan.routes is None:
        return jnp.zeros((), jnp.int32)
    given = capacity(plan)
    return jnp.maximum(jnp.maximum(plan.need.pair - given.pair, plan.need.owner - given.owner), 0)


def fits(plan: Mapping[str, RowPlan]) -> bool:
    """Whether nothing overflowed. Waits for the plan."""
    needs = jax.device_get({layer: p.need for layer, p in plan.items()})
    return all(
        p.routes is None or all(n <= c for n, c in zip(needs[la], capacity(p), strict=True)) for la, p in plan.items()
    )


class RowIdError(ValueError):
    """A lookup that names no row, or a request that was damaged on its way."""


def check(plan: Mapping[str, RowPlan]) -> None:
    """Raises `RowIdError` naming layer, head and position of the first id that is no row. Waits for the plan.

    Every process sees the same verdict, so all of them raise and none waits for another.
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
