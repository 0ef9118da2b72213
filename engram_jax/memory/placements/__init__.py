"""Where tables lie, by the names that `memory.placement` knows."""

from engram_jax.memory.placements.device import DevicePlacement
from engram_jax.memory.placements.host import HostPlacement
from engram_jax.memory.placements.numpy_arrays import NumpyPlacement
from engram_jax.memory.placements.protocol import Placement, Table
from engram_jax.memory.placements.tiered import TieredPlacement

PLACEMENTS = {
    "device": DevicePlacement,
    "host": HostPlacement,
    "numpy": NumpyPlacement,
    "tiered": TieredPlacement,
}

__all__ = ["PLACEMENTS", "DevicePlacement", "HostPlacement", "NumpyPlacement", "Placement", "Table", "TieredPlacement"]
