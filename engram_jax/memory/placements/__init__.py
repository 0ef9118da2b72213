"""Where tables lie, by the names that `memory.placement` knows."""

from engram_jax.memory.placements.device import DevicePlacement
from engram_jax.memory.placements.host import HostPlacement
from engram_jax.memory.placements.numpy_arrays import NumpyPlacement
from engram_jax.memory.placements.protocol import Placement, Table

PLACEMENTS = {
    "device": DevicePlacement,
    "host": HostPlacement,
    "numpy": NumpyPlacement,
}

__all__ = ["PLACEMENTS", "DevicePlacement", "HostPlacement", "NumpyPlacement", "Placement", "Table"]
