"""Where every array lives: logical dimension names -> mesh axes. The one place that knows both.

The mesh is explicit (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type, a contraction whose
result would be ambiguous raises, and layers say `out_sharding=spec(...)` there. All five axes exist always, most of
them of size 1, so no code asks whether an axis exists. Outside any mesh (a notebook cell, a unit test) `spec` is None
and everything still runs.

    data      copies of the weights; slices of a pod, between which the network is slow, are outermost here
    fsdp      weights are cut to be stored, and gathered to be used
    expert    as fsdp, except that an expert stays whole with its owner and tokens travel to it
    context   one sequence is cut into pieces
    tensor    heads, feed-forward widths and the vocabulary are cut; every token is on all of these devices
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

BATCH = ("data", "fsdp", "expert")

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH,
    "seq": "context",
    "own_seq": ("context", "tensor"),  # positions cut over all that is left: each device's own tokens, for lookups
    "act": None,  # any feature dim of an activation
    # weights, and the activations that have their dims
    "layers": None,
    "embed": ("fsdp", "context", "expert"),  # the hidden_size dim of a matrix: cut to store, whole to use
    "expert_embed": ("fsdp", "context"),  # the same of an expert's matrix, if experts divide over their axis
    "vocab": "tensor",
    "heads": "tensor",
    "latent": None,
    "ffn": "tensor",
    "experts": "expert",
    "memory": None,
    "streams": None,
    "norm": None,  # gains, biases and other vectors
}
STORED = ("embed", "expert_embed")
"""Dims that are cut in storage only."""


def spec(*logical_dims: str | None) -> P | None:
    """PartitionSpec of an array whose dims carry these logical names (None: never sharded); None outside a mesh.

    None also on a mesh with other axes, that of a model with which a layer was built in (plugin.py).
    """
    if jax.sharding.get_abstract_mesh().axis_names != MESH_AXES:
        return None
    return P(*(LOGICAL_TO_MESH[dim] if dim is not None else None for dim in logical_dims))


def in_use(weight: jax.Array, *logical_dims: str | None, dtype: Any = None) -> jax.Array:
    """A stored weight as products need it: in `dtype`, whole along the dims that are cut in storage only.

    Cast first, so that half the bytes travel; the gradient goes back by the transpose, summed where the weight lies.
    """
    weight = weight.astype(dtype or weight.dtype)
    dims = spec(*(None if dim in STORED else dim for dim in logical_dims))
    return weight if dims is None else jax.reshard(weight, dims)


def placed(x: jax.Array, *logical_dims: str | None) -> jax.Array:
    """x with its dims cut as these names say; as it is outside a mesh."""
    dims = spec(*logical_dims)
    return x if dims is None else jax.reshard(x, dims)


def lookups(ndim: int) -> P:
    """Spec of arrays [batch, seq, ...] of which each device holds its own tokens; over one dim on a foreign mesh."""
    axes = jax.sharding.get_abstract_mesh().axis_names
    split = (P(BATCH, LOGICAL_TO_MESH["own_seq"]) if axes == MESH_AXES else P(axes, None)) if axes else P()
    return P(*split, *[None] * (ndim - len(split)))


def platform() -> str:
    """cpu, gpu or tpu: of the current mesh's devices (which need not be here), or of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def sharding_of(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """The sharding in an array's type, to give a result the same one; None outside a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
) -> Mesh:
    """An explicit mesh over all devices (or `devices`); `data=-1` takes what the others leave.

    Neighbours on the later axes are neighbours in the network. With several slices `data` counts over them first.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or `data` does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    rest = {"fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    product = int(np.prod(list(rest.values())))
    if data == -1:
        data = len(devices) // max(product, 1)
    sizes = {"data": data, **rest}
    if data * product != len(devices) or min(sizes.values()) < 1:
        given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1 or axis in ("data", "fsdp"))
        raise ValueError(
            f"mesh {given} does not use all {len(devices)} devices: set train.mesh_fsdp (and mesh_expert, "
            f"mesh_context, mesh_tensor) to factors of {len(devices)} and train.mesh_data to -1."
        )
    shape = tuple(sizes.values())
    return Mesh(_arranged(devices, shape), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _arranged(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the mesh's shape, neighbours in the network next to each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        if devices[0].platform != "tpu":
            return np.asarray(devices, object).reshape(shape)
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ValueError(f"mesh data={shape[0]} does not divide over {slices} slices: make it a multiple of {slices}.")
    within, across = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
