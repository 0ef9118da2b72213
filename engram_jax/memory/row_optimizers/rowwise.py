"""Row-wise Adagrad and RMSprop: one second moment per row instead of one per number, 4 and 8 bytes of slots a row.

The numbers of a row share the scale sqrt(v), where v sums or averages the mean square of the row's gradient (the exact
row-wise Adagrad of recommender tables). Neither rule has momentum: a row that is not looked up does not move.

Legend: U rows of a batch, R all rows of a table, D row width. Update number k = step + 1 has learning rate
`learning_rates[k - 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.row_optimizers.base import RowOptimizer, at_step
from engram_jax.memory.table import Slots


def _mean_square(grads_UD: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(grads_UD), axis=-1)


@dataclass(frozen=True, eq=False)
class RowwiseAdagrad(RowOptimizer):
    """v_k = v_{k-1} + mean(g_k^2), row_k = row_{k-1} - lr_k g_k / (sqrt(v_k) + eps).

    A step without a gradient changes nothing, so a row that waited has nothing to catch up with.
    """

    learning_rates: np.ndarray  # float64 [steps]
    eps: float = 1e-20

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> RowwiseAdagrad:
        return cls(learning_rates, config.adam_eps)

    def init(self, rows_RD: jax.Array) -> Slots:
        return {"v": jnp.zeros_like(rows_RD[:, 0], jnp.float32)}

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        v_U = slots["v"] + _mean_square(grads_UD)
        rate_U = at_step(self.learning_rates, step) / (jnp.sqrt(v_U) + self.eps)
        return rows_UD - rate_U[:, None] * grads_UD, {"v": v_U}


@dataclass(frozen=True, eq=False)
class RowwiseRMSprop(RowOptimizer):
    """Adagrad with a decaying second moment, bias-corrected by the number of the step:

        v_k = b2 v_{k-1} + (1 - b2) mean(g_k^2),   row_k = row_{k-1} - lr_k g_k / (sqrt(v_k / (1 - b2^k)) + eps).

    A row last updated at step s is read at step t with v_t = b2^(t-s) v_s, the value after t - s updates with zero
    gradients. So the rule equals the same rule run over the whole table at every step. As under dense Adam, a row
    first seen late in training moves by lr / sqrt(1 - b2) (RMS), which is 4.5 lr at b2 = 0.95.
    """

    learning_rates: np.ndarray  # float64 [steps]
    b2: float = 0.95
    eps: float = 1e-20

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> RowwiseRMSprop:
        return cls(learning_rates, config.adam_b2, config.adam_eps)

    def init(self, rows_RD: jax.Array) -> Slots:
        return {
            "v": jnp.zeros_like(rows_RD[:, 0], jnp.float32),
            "last_step": jnp.zeros_like(rows_RD[:, 0], jnp.int32),
        }

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        last_U = slots["last_step"]
        step = jnp.asarray(step, jnp.int32)
        # exp(t log b2), not b2**t: float32 rounds a b2 near 1 enough to show after thousands of steps
        v_U = slots["v"] * jnp.exp((step - last_U).astype(jnp.float32) * np.log(self.b2))
        return rows_UD.astype(jnp.float32), {"v": v_U, "last_step": jnp.full_like(last_U, step)}

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        v_U = self.b2 * slots["v"] + (1 - self.b2) * _mean_square(grads_UD)
        correction = -jnp.expm1(jnp.asarray(step + 1, jnp.float32) * np.log(self.b2))  # 1 - b2^k
        rate_U = at_step(self.learning_rates, step) / (jnp.sqrt(v_U / correction) + self.eps)
        return rows_UD - rate_U[:, None] * grads_UD, {"v": v_U, "last_step": slots["last_step"] + 1}

    def last_updates(self, slots: Slots) -> jax.Array:
        return slots["last_step"]
