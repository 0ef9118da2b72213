"""Placements: which memory holds the tables. `engram_jax.registries.PLACEMENTS` has them by name.

A new placement needs no line here: these are the base class and the placements that scripts build by hand.
"""

from engram_jax.memory.placements.base import Placement, Table, in_program_placements
from engram_jax.memory.placements.device import DevicePlacement
from engram_jax.memory.placements.host import HostPlacement
from engram_jax.memory.placements.numpy_arrays import NumpyPlacement
from engram_jax.memory.placements.tiered import TieredPlacement

__all__ = [
    "DevicePlacement",
    "HostPlacement",
    "NumpyPlacement",
    "Placement",
    "Table",
    "TieredPlacement",
    "in_program_placements",
]
