"""The base class of row optimizers. A new one is one file beside this one and one line in registries.py.

docs/extending.md shows a complete one. Rows may be stored in float32 or bfloat16. A row optimizer computes in float32:
it returns float32 rows, which the store rounds to the table's dtype, and its slots are float32 or int32.

Legend: U rows of a batch, R all local rows of a shard, D row width. `step` counts completed updates, an int32 scalar;
the update that follows has number k = step + 1 and learning rate `learning_rates[k - 1]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig
from engram_jax.memory.table import Slots


class RowOptimizer(ABC):
    """The rule by which the rows of the tables move. `read` and `update` treat each row by itself.

    A subclass implements `create`, `init` and either `update` or, with `whole_table`, `update_table`. It implements
    `read` too if rows must be brought up to date before they are seen, or decoded.
    """

    moves_rows: ClassVar[bool] = True
    """False: rows are read only. A training step takes no gradient of them and writes none."""
    whole_table: ClassVar[bool] = False
    """True: the rule needs every row at every step. The step calls `update_table` instead of `update`, its cost is in
    proportion to the table, and the placement must keep all rows on the devices (`Placement.on_device`)."""

    @classmethod
    @abstractmethod
    def create(cls, config: OptimizerConfig, learning_rates: np.ndarray) -> Self:
        """The rule as configured.

        Args:
          config: the settings `optimizer.*` of the run.
          learning_rates: float64 [steps], the tables' own (`table_lr_multiplier` applied).
        """

    @abstractmethod
    def init(self, rows_RD: jax.Array) -> Slots:
        """Slots of new rows, each [R, ...]; a function of the shape of `rows_RD` alone."""

    def read(self, rows_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """Rows [U, D] and slots as they stand after `step` updates: float32, what the forward pass reads."""
        return rows_UD.astype(jnp.float32), slots

    def update(self, rows_UD: jax.Array, slots: Slots, grads_UD: jax.Array, step: jax.Array) -> tuple[jax.Array, Slots]:
        """One update of rows and slots that `read` returned: float32 rows [U, D], and the slots.

        `grads_UD`: float32, one summed gradient per row.
        """
        raise TypeError(f"{type(self).__name__} updates whole tables: use update_table.")

    def update_table(
        self,
        rows_RD: jax.Array,
        slots: Slots,
        grads_RD: jax.Array,
        step: jax.Array,
        is_row_R: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, Slots]:
        """One update of a whole shard: rows in the dtype of the table in, float32 rows and the slots out.

        `is_row_R` is False for padding, whose gradients are zero and whose values mean nothing. `total(x)` sums x over
        all shards of the table (one shard: x itself).
        """
        raise TypeError(f"{type(self).__name__} updates single rows: use update.")

    def last_updates(self, slots: Slots) -> jax.Array | None:
        """Number of updates that were complete when each row was last updated: int32 [U]. None: not known."""
        return None


def at_step(series: np.ndarray, index: jax.Array) -> jax.Array:
    """series[index] in float32; beyond its end, the last entry."""
    return jnp.asarray(series, jnp.float32)[jnp.minimum(index, len(series) - 1)]


def bytes_per_row(optimizer: RowOptimizer, head_dim: int, dtype: Any = jnp.float32) -> tuple[int, int]:
    """Bytes of one stored row and of its slots. The table's own `uses` counter is not among them."""
    row_1D = jax.ShapeDtypeStruct((1, head_dim), dtype)
    slots = jax.eval_shape(optimizer.init, row_1D)
    return head_dim * row_1D.dtype.itemsize, sum(slot.size * slot.dtype.itemsize for slot in slots.values())
