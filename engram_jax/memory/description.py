"""The static description of a memory: its settings, how its tables are cut into shards, what each row consists of.

The store (store.py), whole tables in chunks (chunks.py) and tables outside compiled programs (numpy_tables.py) build
on this description.

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
"""Rows of one batch with their slots and uses, on the devices that own them: by layer, [S * U, ...]."""

ON_DEVICE = DevicePlacement()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryState:
    tables: dict[str, Table]
    """By Engram layer, keyed `str(layer_id)`. Empty without memory, and in programs that cannot reach the tables."""
    rows_used: dict[str, jax.Array]
    """By layer: int32 scalar, the number of rows that any update has touched so far."""


@dataclass(frozen=True, eq=False)
class MemoryDescription:
    """The static half of a memory. It holds no arrays and hashes by identity: jitted functions may close over it."""

    config: EngramConfig
    token_map: TokenMap
    constants: HashConstants
    optimizer: RowOptimizer
    placement: Placement = ON_DEVICE
    shards: int = 1
    """Devices of the mesh; rows are cut over all of them."""
    init_std: float = 0.02
    row_dtype: str = "float32"
    """Dtype of stored rows. bfloat16 rows are rounded stochastically when they are written."""
    transport: str = "all_to_all"
    """How rows cross the mesh (transports.py)."""
    seed: int = 0
    """Seed of the stochastic rounding."""

    def __post_init__(self):
        require(
            self.placement.on_device or not self.optimizer.whole_table,
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
        """By layer, which device owns which logical row."""
        return {str(i): TableLayout(self.constants.head_rows(i), self.shards) for i in self.config.engram_layer_ids}

    @property
    def layers(self) -> tuple[str, ...]:
        """Keys of the Engram layers, `str(layer_id)`."""
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
        """`out_shardings` of a jitted function that returns this layer's table; None: jit chooses."""
        return self.placement.at_rest(jax.sharding.get_mesh(), self._abstract_table(layer))

    def tables_at_rest(self) -> dict[str, Any]:
        """`at_rest` of all tables that a compiled program returns; empty if programs cannot reach them."""
        return {layer: self.at_rest(layer) for layer in self.layers} if self.placement.in_program else {}

    def _abstract_table(self, layer: str) -> Table:
        return jax.eval_shape(partial(self._allocate, layer))

    def _allocate(self, layer: str) -> Table:
        rows = self.layouts[layer].rows_per_shard
        return on_shards(lambda: self.placement.allocate(rows, self.row_shapes()), (), jax.P(routing.mesh_axes()))()

    def row_shapes(self) -> TableState:
        """Shapes and dtypes of one row, its slots and its uses: [1, ...]."""
        rows = jax.ShapeDtypeStruct((1, self.config.engram_head_dim), self.row_dtype)
        return jax.eval_shape(self.new_rows, rows)

    def new_rows(self, rows_UD: jax.Array) -> TableState:
        """Rows with the slots that the optimizer gives to new rows, and no uses."""
        return TableState(rows_UD, self.optimizer.init(rows_UD), jnp.zeros(rows_UD.shape[:1], jnp.int32))

    # --- shards ---

    def on_shards(self, function: Callable, *args: Any) -> Any:
        """`function` applied on each device to its part of the arguments; scalars are whole on every device."""
        axes = routing.mesh_axes()
        specs = tuple(jax.P() if isinstance(x, jax.Array) and x.ndim == 0 else jax.P(axes) for x in args)
        return on_shards(function, specs, jax.P(axes))(*args)

    def logical_rows(self, layer: str, local_U: jax.Array) -> jax.Array:
        """Logical ids of this device's local rows, within `on_shards`; `num_rows` and above for padding."""
        axes = routing.mesh_axes()
        shard = jax.lax.axis_index(axes) if axes else 0
        return self.layouts[layer].logical(shard, local_U)
