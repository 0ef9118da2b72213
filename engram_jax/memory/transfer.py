"""Arrays of this process to and from its devices: one part per device, for arrays that are cut over all devices.

Legend: S shards (devices of the mesh), U rows of one shard's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from engram_jax.memory import routing
from engram_jax.memory.table import TableState


def sharding_over_devices() -> jax.sharding.Sharding:
    """The sharding of arrays that are cut over all devices of the current mesh; outside a mesh, the first device."""
    axes = routing.mesh_axes()
    if not axes:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(axes))  # type: ignore[arg-type]


def shards_here(sharding: jax.sharding.Sharding, shards: int) -> list[int]:
    """Numbers of the shards that this process's devices own, ascending."""
    return sorted(index[0].start or 0 for index in sharding.addressable_devices_indices_map((shards,)).values())  # type: ignore[index]


def parts_here(array_U: jax.Array) -> list[np.ndarray]:
    """The parts of an array [S * U, ...] on this process's devices, in the mesh's order. Waits for the array."""
    shards = sorted(array_U.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data) for shard in shards]


def tree_parts_here(tree: Any) -> list[Any]:
    """`parts_here` of every leaf: one tree of NumPy arrays per device."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(part) for part in zip(*map(parts_here, leaves), strict=True)]


def to_devices(parts: Sequence[TableState], sharding: jax.sharding.Sharding, shards: int) -> TableState:
    """The inverse of `tree_parts_here`: [S * U, ...], each part on its device."""
    places = sharding.addressable_devices_indices_map((shards,))
    devices = sorted(places, key=lambda device: places[device][0].start or 0)  # type: ignore[index]

    def join(*blocks: np.ndarray) -> jax.Array:
        shape = (shards * len(blocks[0]), *blocks[0].shape[1:])
        arrays = [jax.device_put(block, device) for block, device in zip(blocks, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, _of_rank(sharding, len(shape)), arrays)

    return jax.tree.map(join, *parts)


def _of_rank(sharding: jax.sharding.Sharding, rank: int) -> jax.sharding.Sharding:
    """The sharding with every dim spelt out, as programs return it: jit would compile again for the short form."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    dims = tuple(sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, jax.P(*dims, *[None] * (rank - len(dims))))  # type: ignore[arg-type]
