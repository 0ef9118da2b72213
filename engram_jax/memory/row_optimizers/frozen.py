"""Rows that do not move: the memory is read and nothing is kept for it, in a later stage that trains the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.table import Slots


@dataclass(frozen=True)
class FrozenRows:
    """A training step takes no gradient of the rows and writes none (training/step.py); asked all the same, `update`
    changes nothing."""

    whole_table: bool = field(default=False, init=False)

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> FrozenRows:
        return cls()

    def init(self, rows_RD: jax.Array) -> Slots:
        return {}

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        return rows_UD.astype(jnp.float32), slots

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        return rows_UD, slots
