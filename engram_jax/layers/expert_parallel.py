"""Routed experts on different devices: tokens travel to their experts' owners and back. No token is dropped.

    sort by expert -> one block of C places per owner =exchange=> grouped products =exchange=> weighted sum per token

Shapes are static: a block has room for `capacity_factor` times what evenly routed tokens would need. Pairs
that do not fit are carried in further rounds, which run only if they are needed; a round costs time, never a token. The
numbers do not depend on the capacity, nor on the transport (transports.py).

Legend: N tokens of one device, K experts per token, E experts in all, S owners along the mesh axis `expert`, C places
per pair of devices, Q = S * C places of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.transports import TRANSPORTS

AXES = ("expert",)
MULTIPLES = (512, 128, 8)
"""Places per pair are a multiple of one of these: tiles of the grouped matmul, where that costs an eighth at most."""


class Places(NamedTuple):
    """One round's block as its sender sees it."""

    pair_Q: jax.Array
    """The (token, choice) in each place, as n * K + k; N * K in an empty place."""
    expert_Q: jax.Array
    """Its expert, counted from the owner's first; E / S in an empty place."""
    place_NK: jax.Array
    """Where each (token, choice) stands; Q if not in this round."""
    sizes_S: jax.Array
    """Filled places per owner."""


def capacity(num_pairs: int, owners: int, factor: float) -> int:
    """C for `num_pairs` (token, choice) pairs of one device."""
    room = max(int(-(-num_pairs // owners) * factor), 1)
    multiple = next(m for m in MULTIPLES if m * 8 <= room or m == MULTIPLES[-1])
    return min(-(-room // multiple) * multiple, num_pairs)


def exchanged(
    x_ND: jax.Array,
    expert_ids_NK: jax.Array,
    weights_NK: jax.Array,
    experts: tuple[jax.Array, ...],
    form: Callable[..., jax.Array],
    capacity_factor: float,
    transport: str,
    all_axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """The routed experts' sum for this device's tokens, inside shard_map over `all_axes`.

    Args:
      experts: this device's weights, [E / S, ...] each.
      form: how the device computes them, one of moe.py's functions.

    Returns:
      (y_ND, how many of this device's pairs were carried in further rounds: int32 scalar).
    """
    owners, (N, K) = jax.lax.axis_size(AXES), expert_ids_NK.shape
    here = experts[0].shape[0]
    room = capacity(N * K, owners, capacity_factor)
    order = jnp.argsort(expert_ids_NK.reshape(-1), stable=True).astype(jnp.int32)
    rank_NK = jnp.zeros_like(order).at[order].set(jnp.arange(N * K, dtype=jnp.int32), unique_indices=True)
    rank_NK = rank_NK.reshape(N, K)
    owner_NK = expert_ids_NK // here
    counts_S = jnp.zeros(owners, jnp.int32).at[owner_NK].add(1)
    first_S = jnp.cumsum(counts_S) - counts_S

    def places(number: jax.Array | int) -> Places:
        """The block of round `number`."""
        sizes_S = jnp.clip(counts_S - number * room, 0, room)
        column = jnp.arange(room, dtype=jnp.int32)[None]
        filled_Q = (column < sizes_S[:, None]).reshape(-1)
        sorted_Q = jnp.minimum(first_S[:, None] + number * room + column, N * K - 1).reshape(-1)
        pair_Q = jnp.where(filled_Q, order[sorted_Q], N * K)
        expert_Q = expert_ids_NK.reshape(-1)[order[sorted_Q]] % here
        in_owner_NK = rank_NK - first_S[owner_NK] - number * room
        is_here_NK = (in_owner_NK >= 0) & (in_owner_NK < room)
        place_NK = jnp.where(is_here_NK, owner_NK * room + in_owner_NK, owners * room)
        return Places(pair_Q, jnp.where(filled_Q, expert_Q, here), place_NK, sizes_S)

    def one_round(x_ND, weights_NK, experts, number):
        there = places(number)
        arrived_S = jax.lax.all_to_all(there.sizes_S, AXES, 0, 0, tiled=True)
        expert_Q = jax.lax.all_to_all(there.expert_Q, AXES, 0, 0, tiled=True)
        x_QD: Any = move(spread(x_ND, there.pair_Q, there.place_NK), there.sizes_S, arrived_S, transport)
        is_filled_Q1 = (expert_Q < here)[:, None]
        x_QD = jnp.where(is_filled_Q1, x_QD, 0)  # places that did not travel hold anything
        y_QD = form(x_QD, expert_Q[:, None], is_filled_Q1.astype(weights_NK.dtype), *experts)
        back_QD = move(y_QD, arrived_S, there.sizes_S, transport)
        return combine(back_QD, weights_NK, there.pair_Q, there.place_NK)

    y_ND = one_round(x_ND, weights_NK, experts, 0)
    rounds = -(-N * K // room)
    if rounds == 1:
        return y_ND, jnp.zeros((), jnp.int32)
    # All devices take the same branches: they hold collectives.
    most = jax.lax.pmax(jnp.max(counts_S), all_axes)

    def further_rounds(x_ND, weights_NK, experts):
        def add(y_ND, number):
            more = jax.lax.cond(most > number * room, one_round, lambda *_: jnp.zeros_like(y_ND), *args, number)
            return y_ND + more, None

        args = (x_ND, weights_NK, experts)
        return jax.lax.scan(jax.checkpoint(add), jnp.zeros_like(x_ND), jnp.arange(1, rounds))[0]

    with jax.named_scope("further_rounds"):
        more_ND = jax.lax.cond(
            most > room, jax.checkpoint(further_rounds), lambda x, *_: jnp.zeros_like(x), x_ND, weights_NK, experts
        )
    return y_ND + more_ND, jnp.sum(jnp.maximum(counts_S - room, 0))


# Each gradient gathers, as its function does: nothing scatters.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def move(block_QD: jax.Array, sizes_S: jax.Array, arrived_S: jax.Array, transport: str) -> jax.Array:
    """Sends each part of the block to its owner; the gradient travels back."""
    return TRANSPORTS[transport](block_QD, sizes_S, arrived_S, AXES)


move.defvjp(
    lambda block, sizes, arrived, transport: (move(block, sizes, arrived, transport), (sizes, arrived)),
    lambda transport, sizes, d_block: (move(d_block, sizes[1], sizes[0], transport), None, None),
)


@jax.custom_vjp
def spread(x_ND: jax.Array, pair_Q: jax.Array, place_NK: jax.Array) -> jax.Array:
    """The token row of each place, zero in an empty place: x_QD."""
    return _row(x_ND, pair_Q // place_NK.shape[1])


def _spread_backward(places, d_QD):
    _, place_NK = places
    wide = jnp.promote_types(d_QD.dtype, jnp.float32)
    d_ND = sum(_row(d_QD, place_NK[:, k]).astype(wide) for k in range(place_NK.shape[1]))
    return d_ND.astype(d_QD.dtype), None, None  # type: ignore[union-attr]


spread.defvjp(lambda x, *places: (spread(x, *places), places), _spread_backward)


@jax.custom_vjp
def combine(y_QD: jax.Array, weights_NK: jax.Array, pair_Q: jax.Array, place_NK: jax.Array) -> jax.Array:
    """Each token's weighted sum over its places: y_ND in `y_QD.dtype`, summed in the weights' dtype."""
    terms = (weights_NK[:, k, None] * _row(y_QD, place_NK[:, k]) for k in range(place_NK.shape[1]))
    return sum(terms, start=jnp.zeros((), weights_NK.dtype)).astype(y_QD.dtype)


def _combine_backward(args, d_ND):
    y_QD, weights_NK, pair_Q, place_NK = args
    wide = d_ND.astype(weights_NK.dtype)
    d_weights = [jnp.sum(wide * _row(y_QD, place_NK[:, k]), axis=-1) for k in range(place_NK.shape[1])]
    weights_Q1 = _row(weights_NK.reshape(-1), pair_Q)[:, None]
    d_QD = weights_Q1 * _row(d_ND, pair_Q // place_NK.shape[1])
    return d_QD.astype(y_QD.dtype), jnp.stack(d_weights, axis=1), None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


def _row(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)
