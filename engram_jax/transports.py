"""How blocks of rows cross the mesh, for lookups and for routed experts: two transports, one signature.

    arrived = transport(block, sizes, arrived_sizes, axes)

Runs inside shard_map; S shards stand along `axes`. `block` [S * C, ...] holds S parts of C places, part s for shard s,
of which the first sizes[s] are filled; in `arrived` [S * C, ...] part s is what shard s sent here, its first
arrived_sizes[s] places filled and the rest zero or unspecified: nobody reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Axes = tuple[str, ...]
Transport = Callable[[jax.Array, jax.Array, jax.Array, Axes], jax.Array]


def all_to_all(block: jax.Array, sizes_S: jax.Array, arrived_S: jax.Array, axes: Axes) -> jax.Array:
    """Every place travels, filled or not. Runs on every backend."""
    return jax.lax.all_to_all(block, axes, split_axis=0, concat_axis=0, tiled=True)


def ragged_all_to_all(block: jax.Array, sizes_S: jax.Array, arrived_S: jax.Array, axes: Axes) -> jax.Array:
    """Only filled places travel. TPU and GPU; XLA:CPU has no such collective."""
    shards = len(sizes_S)
    capacity = len(block) // shards
    mine = jax.lax.axis_index(axes).astype(jnp.int32)
    starts_S = capacity * jnp.arange(shards, dtype=jnp.int32)
    here_S = jnp.full((shards,), capacity, jnp.int32) * mine  # my part in everybody's arrivals
    # Zeros of this exchange's own: XLA would make them once for all exchanges, and keep them from first to last.
    zero, block = jax.lax.optimization_barrier((jnp.zeros((), block.dtype), block))
    return jax.lax.ragged_all_to_all(
        block,
        jnp.broadcast_to(zero, block.shape),
        input_offsets=starts_S,
        send_sizes=sizes_S,
        output_offsets=here_S,
        recv_sizes=arrived_S,
        axis_name=axes,
    )


TRANSPORTS: dict[str, Transport] = {"all_to_all": all_to_all, "ragged_all_to_all": ragged_all_to_all}


def default_transport(device_kind: str, devices: int) -> str:
    """What `auto` means on that many devices of this kind (`jax.Device.device_kind`)."""
    # The network of v5e slices beyond 4x4 does not route it: libtpu 0.0.42 and 0.0.50 refuse 8x8 and 16x16.
    can_be_ragged = "TPU" in device_kind and not (device_kind == "TPU v5 lite" and devices > 16)
    return "ragged_all_to_all" if can_be_ragged else "all_to_all"
