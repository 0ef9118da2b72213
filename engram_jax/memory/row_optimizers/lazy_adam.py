"""Lazy Adam for rows: what sparse embedding optimizers usually do, kept for comparison.

Legend: U rows of a batch, R all rows of a table, D row width. Update number k = step + 1 has learning rate
`learning_rates[k - 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.row_optimizers.adam import adam_step
from engram_jax.memory.row_optimizers.protocol import at_step
from engram_jax.memory.table import Slots


@dataclass(frozen=True, eq=False)
class LazyAdam:
    """Adam in which a row and its moments move only at the steps that look it up, bias-corrected by the global step:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        row = row - lr_k (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    with m and v as the last look-up left them, however long ago. It is here to be compared with and is not dense Adam:
    that goes on moving a row on its momentum while nobody reads it, and lets the moments decay. (At (0.9, 0.95) a row
    seen once goes a thirteenth of the way here.) `CatchUpAdam` does both at the same cost.
    """

    learning_rates: np.ndarray  # float64 [steps]
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-20
    whole_table: bool = field(default=False, init=False)

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> LazyAdam:
        return cls(learning_rates, config.adam_b1, config.adam_b2, config.adam_eps)

    def init(self, rows_RD: jax.Array) -> Slots:
        return {"m": jnp.zeros_like(rows_RD, jnp.float32), "v": jnp.zeros_like(rows_RD, jnp.float32)}

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        return rows_UD.astype(jnp.float32), slots

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        rate = at_step(self.learning_rates, step)
        rows, m, v = adam_step(rows_UD, slots["m"], slots["v"], grads_UD, step + 1, rate, self.b1, self.b2, self.eps)
        return rows, {"m": m, "v": v}
