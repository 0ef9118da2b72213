"""Where every array lives: logical dimension names -> mesh axes. The one place that knows both.

The mesh is explicit (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type, a contraction whose
result would be ambiguous raises, and layers say `out_sharding=spec(...)` there. Axes of size 1 are kept, so no code
asks whether an axis exists. Outside any mesh (a notebook cell, a unit test) `spec` is None and everything still runs.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp")

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "seq": None,
    "act": None,  # any feature dim of an activation
    # weights
    "layers": None,
    "embed": "fsdp",  # the hidden_size dim of a matrix: sharded to store, gathered to use
    "vocab": None,
    "heads": None,
    "latent": None,
    "ffn": None,
    "experts": None,
    "memory": None,
    "streams": None,
    "norm": None,  # gains, biases and other vectors
}


def spec(*logical_dims: str | None) -> P | None:
    """PartitionSpec of an array whose dims carry these logical names (None: never sharded); None outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return P(*(LOGICAL_TO_MESH[dim] if dim is not None else None for dim in logical_dims))


def sharding_of(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """The sharding in an array's type, to give a result the same one; None outside a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding


def make_mesh(data: int = -1, fsdp: int = 1, devices: Any = None) -> Mesh:
    """An explicit mesh over all devices (or `devices`); `data=-1` takes what `fsdp` leaves.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // fsdp
    if data * fsdp != len(devices) or data < 1:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} does not use all {len(devices)} devices: "
            f"set train.mesh_fsdp to a divisor of {len(devices)} and train.mesh_data to -1."
        )
    return jax.make_mesh((data, fsdp), MESH_AXES, axis_types=(AxisType.Explicit,) * 2, devices=devices)
