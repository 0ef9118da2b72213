"""Frozen rows: training reads the memory and leaves it unchanged, without slots, as in a later stage of training."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.row_optimizers.base import RowOptimizer
from engram_jax.memory.table import Slots


@dataclass(frozen=True)
class FrozenRows(RowOptimizer):
    """The rule that moves no row. A training step takes no gradient of frozen rows and writes none."""

    moves_rows = False

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> FrozenRows:
        return cls()

    def init(self, rows_RD: jax.Array) -> Slots:
        return {}

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        return rows_UD, slots
