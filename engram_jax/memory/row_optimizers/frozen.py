"""Rows that do not move: the memory is read and nothing is kept for it, in a later stage that trains the rest."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.row_optimizers.base import RowOptimizer
from engram_jax.memory.table import Slots


@dataclass(frozen=True)
class FrozenRows(RowOptimizer):
    """A training step takes no gradient of the rows and writes none (training/step.py); asked all the same, `update`
    changes nothing."""

    moves_rows = False

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> FrozenRows:
        return cls()

    def init(self, rows_RD: jax.Array) -> Slots:
        return {}

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        return rows_UD, slots
