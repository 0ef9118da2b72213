"""What a rule for rows must say. A new rule is one file beside this one and one line in `ROW_OPTIMIZERS`.

Rows may be stored in float32 or bfloat16. A rule computes in float32: it returns float32 rows, which the caller rounds
to the table's dtype, and keeps float32 slots whatever the rows are.

Legend: U rows of a batch, R all local rows of a shard, D row width. `step` counts completed updates; the update that
follows has number k = step + 1 and learning rate `learning_rates[k - 1]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.table import Slots


class RowOptimizer(Protocol):
    """The rule for rows. `read` and `update` see any set of rows at once and treat each row by itself."""

    @property
    def whole_table(self) -> bool:
        """True: the rule needs every row at every step and is asked by `update_table`. False: the batch's rows do."""
        ...

    @classmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> RowOptimizer:
        """The rule as configured. `learning_rates`: float64 [steps], the tables' own (multiplier applied)."""
        ...

    def init(self, rows_RD: jax.Array) -> Slots:
        """Slots of new rows, each [R, ...]; a function of the shape of `rows_RD` alone."""
        ...

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """The rows as they stand after `step` updates, float32, which is what a forward pass must see."""
        ...

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        """One update of rows and slots that `read` returned: float32 rows, and the slots."""
        ...


class TableOptimizer(RowOptimizer, Protocol):
    """A rule with `whole_table`: its cost is in proportion to the table."""

    def update_table(
        self,
        rows_RD: jax.Array,
        slots: Slots,
        grads_RD: jax.Array,
        step: jax.Array,
        is_row_R: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, Slots]:
        """One update of a whole shard: rows as stored in, float32 rows and the slots out.

        `is_row_R` is False for padding, whose gradients are zero and whose values mean nothing; `total(x)` sums x over
        all shards of the table (the identity when there is one).
        """
        ...


def at_step(series: np.ndarray, index: jax.Array) -> jax.Array:
    """series[index] in float32, the last entry going on beyond the end."""
    return jnp.asarray(series, jnp.float32)[jnp.minimum(index, len(series) - 1)]


def bytes_per_row(optimizer: RowOptimizer, head_dim: int, dtype: Any = jnp.float32) -> tuple[int, int]:
    """Bytes of one stored row and of its slots. The table's own `uses` counter is not among them."""
    row_1D = jax.ShapeDtypeStruct((1, head_dim), dtype)
    slots = jax.eval_shape(optimizer.init, row_1D)
    return head_dim * row_1D.dtype.itemsize, sum(slot.size * slot.dtype.itemsize for slot in slots.values())
