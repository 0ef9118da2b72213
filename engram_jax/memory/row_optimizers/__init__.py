"""The rules by which rows move, by the names that `optimizer.table_optimizer` knows."""

from engram_jax.memory.row_optimizers.adam import CatchUpAdam, DenseAdam
from engram_jax.memory.row_optimizers.frozen import FrozenRows
from engram_jax.memory.row_optimizers.lazy_adam import LazyAdam
from engram_jax.memory.row_optimizers.protocol import RowOptimizer, Slots, TableOptimizer, bytes_per_row
from engram_jax.memory.row_optimizers.rowwise import RowwiseAdagrad, RowwiseRMSprop
from engram_jax.memory.row_optimizers.sinkhorn import SinkhornMomentum

ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "catch_up_adam": CatchUpAdam,
    "dense_adam": DenseAdam,
    "lazy_adam": LazyAdam,
    "rowwise_adagrad": RowwiseAdagrad,
    "rowwise_rmsprop": RowwiseRMSprop,
    "sinkhorn": SinkhornMomentum,
    "frozen": FrozenRows,
}

__all__ = [
    "ROW_OPTIMIZERS",
    "CatchUpAdam",
    "DenseAdam",
    "FrozenRows",
    "LazyAdam",
    "RowOptimizer",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "SinkhornMomentum",
    "Slots",
    "TableOptimizer",
    "bytes_per_row",
]
