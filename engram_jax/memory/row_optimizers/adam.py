"""Adam for rows: dense Adam over the whole table, and catch-up Adam, which equals it and costs only the rows touched.

Legend: U rows of a batch (or R, all rows of a table), D row width. `step` counts completed updates; the update that
follows has number k = step + 1 and learning rate `learning_rates[k - 1]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.row_optimizers.base import RowOptimizer, at_step
from engram_jax.memory.table import Slots


def adam_step(rows, m, v, grads, k, learning_rate, b1, b2, eps):
    """Adam's update number k (1, 2, ...): rows, m and v after it."""
    m = b1 * m + (1 - b1) * grads
    v = b2 * v + (1 - b2) * jnp.square(grads)
    k = jnp.asarray(k, jnp.float32)
    m_hat, v_hat = m / (1 - b1**k), v / (1 - b2**k)
    return rows - learning_rate * m_hat / (jnp.sqrt(v_hat) + eps), m, v


@dataclass(frozen=True, eq=False)
class DenseAdam(RowOptimizer):
    """Adam over the whole table at every step. Its time grows with the table; tests use it as the reference."""

    learning_rates: np.ndarray  # float64 [steps]
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-20
    whole_table = True

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> DenseAdam:
        return cls(learning_rates, config.adam_b1, config.adam_b2, config.adam_eps)

    def init(self, rows_RD: jax.Array) -> Slots:
        return {"m": jnp.zeros_like(rows_RD, jnp.float32), "v": jnp.zeros_like(rows_RD, jnp.float32)}

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        rate = at_step(self.learning_rates, step)
        rows, m, v = adam_step(rows_UD, slots["m"], slots["v"], grads_UD, step + 1, rate, self.b1, self.b2, self.eps)
        return rows, {"m": m, "v": v}

    def update_table(
        self,
        rows_RD: jax.Array,
        slots: Slots,
        grads_RD: jax.Array,
        step: jax.Array,
        is_row_R: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, Slots]:
        return self.update(rows_RD.astype(jnp.float32), slots, grads_RD, step)


@dataclass(frozen=True, eq=False)
class CatchUpAdam(RowOptimizer):
    """Dense Adam's trajectory. A row that waited is brought up to date when it is next read.

    Under dense Adam, a row last updated at step s goes on moving by its decaying momentum. With r = b1 / sqrt(b2) the
    moves of steps s+1..t are

        -(m / sqrt(v)) * sum_{k=s+1}^{t} lr_k * sqrt(1 - b2^k) / (1 - b1^k) * r^(k-s),

    and the sum is F(s) - r^(t-s) F(t), with F(s) = sum_{i>=1} lr_{s+i} sqrt(1 - b2^{s+i}) / (1 - b1^{s+i}) r^i. F has
    one number per training step, computed from the schedule before training. The cost of a row does not depend on how
    long it waited.

    The catch-up is exact except for eps, which dense Adam adds to a decaying sqrt(v). To first order in eps / sqrt(v)
    it moves a row too far by at most lr * |m| / sqrt(v) * (eps / sqrt(v)) * b1 / (b2 - b1). At (0.9, 0.95) that is
    18 * eps / sqrt(v) of a step: nothing at the default 1e-20, 2e-3 of a step at eps = 1e-8 and sqrt(v) = 9e-5.
    """

    learning_rates: np.ndarray
    """The rate of each training step, float64 [steps]."""
    b1: float = 0.9
    """Decay of the first moment, below sqrt(b2)."""
    b2: float = 0.95
    """Decay of the second moment, below 1."""
    eps: float = 1e-20
    """Added to the root of the second moment."""
    _missed_moves: np.ndarray = field(init=False, repr=False)  # F, float64 [steps + 1]

    def __post_init__(self):
        object.__setattr__(self, "_missed_moves", _missed_moves(self.learning_rates, self.b1, self.b2))

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> CatchUpAdam:
        return cls(learning_rates, config.adam_b1, config.adam_b2, config.adam_eps)

    def init(self, rows_RD: jax.Array) -> Slots:
        return {
            "m": jnp.zeros_like(rows_RD, jnp.float32),
            "v": jnp.zeros_like(rows_RD, jnp.float32),
            "last_step": jnp.zeros_like(rows_RD[:, 0], jnp.int32),
        }

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        m, v, last_U = slots["m"], slots["v"], slots["last_step"]
        step = jnp.asarray(step, jnp.int32)
        waited_U1 = (step - last_U).astype(jnp.float32)[:, None]
        decay_U1 = (self.b1 / self.b2**0.5) ** waited_U1
        move_U1 = at_step(self._missed_moves, last_U)[:, None]
        move_U1 = move_U1 - decay_U1 * at_step(self._missed_moves, step)
        direction_UD = jnp.where(v > 0, m / (jnp.sqrt(jnp.where(v > 0, v, 1)) + self.eps), 0)
        rows = rows_UD.astype(jnp.float32) - move_U1 * direction_UD
        last = jnp.full_like(last_U, step)
        return rows, {"m": m * self.b1**waited_U1, "v": v * self.b2**waited_U1, "last_step": last}

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        rate = at_step(self.learning_rates, step)
        rows, m, v = adam_step(rows_UD, slots["m"], slots["v"], grads_UD, step + 1, rate, self.b1, self.b2, self.eps)
        return rows, {"m": m, "v": v, "last_step": slots["last_step"] + 1}

    def last_updates(self, slots: Slots) -> jax.Array:
        return slots["last_step"]


def _missed_moves(learning_rates: np.ndarray, b1: float, b2: float) -> np.ndarray:
    """F(s) for s = 0..steps by its recurrence F(s) = r (lr_{s+1} c_{s+1} + F(s+1)), the last rate going on for ever."""
    steps, r = len(learning_rates), b1 / b2**0.5
    k = np.arange(1, steps + 1, dtype=np.float64)
    moves = np.asarray(learning_rates, np.float64) * np.sqrt(1 - b2**k) / (1 - b1**k)
    total = np.empty(steps + 1)
    total[steps] = learning_rates[-1] * r / (1 - r)
    for s in range(steps - 1, -1, -1):
        total[s] = r * (moves[s] + total[s + 1])
    return total
