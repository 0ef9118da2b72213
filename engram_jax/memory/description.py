"""What is fixed about a memory before any row exists: its settings, how its tables are cut, what a row consists of.

The verbs of the store (store.py), the chunks of whole tables (chunks.py) and tables outside the compiled program
(numpy_tables.py) all stand on this description.

Legend: S shards, R local rows of a shard, U rows of a batch, D row width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig, require
from engram_jax.memory import routing
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import HashConstants
from engram_jax.memory.placements import DevicePlacement, Placement, Table
from engram_jax.memory.plan import RowPlan
from engram_jax.memory.routing import on_shards
from engram_jax.memory.row_optimizers import RowOptimizer
from engram_jax.memory.table import TableLayout, TableState

MemoryPlan = dict[str, RowPlan]
MemoryRows = dict[str, jax.Array]
LoadedRows = dict[str, TableState]
"""Rows of one batch with all that is kept for them, at their owners: by layer, [S * U, ...]."""

ON_DEVICE = DevicePlacement()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryState:
    tables: dict[str, Table]
    """By Engram layer, keyed `str(layer_id)`. Empty without memory."""
    rows_used: dict[str, jax.Array]
    """By layer: int32, rows that any update has touched so far."""


@dataclass(frozen=True, eq=False)
class MemoryDescription:
    """The static half of a memory: hashable by identity, free of arrays, so that jitted functions may close over it."""

    config: EngramConfig
    token_map: TokenMap
    constants: HashConstants
    optimizer: RowOptimizer
    placement: Placement = ON_DEVICE
    shards: int = 1
    """Devices of the mesh; rows are cut over all of them."""
    init_std: float = 0.02
    row_dtype: str = "float32"
    """bfloat16: rows are stored so and rounded stochastically when written."""
    transport: str = "all_to_all"
    seed: int = 0
    """Of the stochastic rounding."""

    def __post_init__(self):
        require(
            isinstance(self.placement, DevicePlacement) or not self.optimizer.whole_table,
            f"{type(self.optimizer).__name__} passes over the whole table at every step, so the table must lie on the "
            "device: choose memory.placement=device, or another optimizer.table_optimizer.",
        )
        for layer, layout in self.layouts.items():
            require(
                layout.shards * layout.rows_per_shard < 2**31,
                f"The table of layer {layer} has {layout.shards * layout.rows_per_shard:,} rows over {self.shards} "
                "devices, and row ids are int32: lower engram_vocab_size.",
            )

    @cached_property
    def layouts(self) -> dict[str, TableLayout]:
        return {str(i): TableLayout(self.constants.head_rows(i), self.shards) for i in self.config.engram_layer_ids}

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.layouts)

    def num_rows(self, layer: str) -> int:
        """Logical rows of a layer's table."""
        return self.layouts[layer].num_rows

    @property
    def num_bytes(self) -> int:
        """Size of all tables: rows, optimizer rows and padding."""
        row_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.row_shapes()))
        return row_bytes * sum(layout.shards * layout.rows_per_shard for layout in self.layouts.values())

    def check_mesh(self) -> None:
        """Raises `ConfigError` unless the tables are cut for the current mesh (`jax.set_mesh`)."""
        for layer, layout in self.layouts.items():
            routing.check_mesh(layer, layout)

    def at_rest(self, layer: str) -> Any:
        """What jit must be told of a table among its results: its memory and layout; None if it need not be told."""
        return self.placement.at_rest(jax.sharding.get_mesh(), self._abstract_table(layer))

    def _abstract_table(self, layer: str) -> Table:
        return jax.eval_shape(partial(self._allocate, layer))

    def _allocate(self, layer: str) -> Table:
        rows = self.layouts[layer].rows_per_shard
        return on_shards(lambda: self.placement.allocate(rows, self.row_shapes()), (), jax.P(routing.mesh_axes()))()

    def row_shapes(self) -> TableState:
        """Shapes and dtypes of one row and what is kept for it: [1, ...]."""
        rows = jax.ShapeDtypeStruct((1, self.config.engram_head_dim), self.row_dtype)
        return jax.eval_shape(self.new_rows, rows)

    def new_rows(self, rows_UD: jax.Array) -> TableState:
        return TableState(rows_UD, self.optimizer.init(rows_UD), jnp.zeros(rows_UD.shape[:1], jnp.int32))

    # --- shards ---

    def on_shards(self, function: Callable, *args: Any) -> Any:
        """`function` of each shard's part of the arguments; scalars go to all."""
        axes = routing.mesh_axes()
        specs = tuple(jax.P() if isinstance(x, jax.Array) and x.ndim == 0 else jax.P(axes) for x in args)
        return on_shards(function, specs, jax.P(axes))(*args)

    def logical_rows(self, layer: str, local_U: jax.Array) -> jax.Array:
        axes = routing.mesh_axes()
        shard = jax.lax.axis_index(axes) if axes else 0
        return self.layouts[layer].logical(shard, local_U)
