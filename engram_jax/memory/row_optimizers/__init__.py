"""Row optimizers: how the rows of the tables move. `engram_jax.registries.ROW_OPTIMIZERS` has them by name.

A new row optimizer needs no line here: these are the base class and the optimizers that scripts build by hand.
"""

from engram_jax.memory.row_optimizers.adam import CatchUpAdam, DenseAdam
from engram_jax.memory.row_optimizers.base import RowOptimizer, at_step, bytes_per_row
from engram_jax.memory.row_optimizers.frozen import FrozenRows
from engram_jax.memory.row_optimizers.lazy_adam import LazyAdam
from engram_jax.memory.row_optimizers.rowwise import RowwiseAdagrad, RowwiseRMSprop
from engram_jax.memory.row_optimizers.sinkhorn import SinkhornMomentum

__all__ = [
    "CatchUpAdam",
    "DenseAdam",
    "FrozenRows",
    "LazyAdam",
    "RowOptimizer",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "SinkhornMomentum",
    "at_step",
    "bytes_per_row",
]
