"""MemoryStore: the tables of all Engram layers, how they are addressed, where they lie, and who updates them.

    state = store.init(key)                             tables at birth, sharded
    plan  = store.plan(token_ids, segment_ids)          who reads which rows, a pure function of tokens
    rows  = store.fetch(state, plan, step)              what the readers see: [batch, seq, heads, head_dim] per layer
    grads = store.reduce(plan, row_grads)               one summed gradient per distinct row, at its owner
    state = store.update(state, plan, grads, step)      the plan's rows only (donate the state)
    table = store.materialize(state, step)              the logical tables, for export and tests

`fetch` and `update` are made of steps that a training step takes one by one, so that rows are read once and the next
batch's can be read early: `held = load(state, plan)`, `rows(held, plan, step)`, `held = advance(held, plan, grads,
step)`, `state = save(state, plan, held)`, and `patch` for rows that were read before the update of the batch before.

Beside it: hashing.py says which rows a token reads, table.py where they are, routing.py how they travel,
placements/ which memory holds them, row_optimizers/ how they move. The store holds no device arrays: it can be closed
over by any jitted function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.memory import chunks, outside, routing
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import HashConstants, canonicalize, hash_constants, ngram_row_ids
from engram_jax.memory.placements import DevicePlacement, Placement, Table
from engram_jax.memory.plan import Capacity, RowPlan
from engram_jax.memory.rounding import row_noise, stochastic_round
from engram_jax.memory.routing import on_shards
from engram_jax.memory.row_optimizers import RowOptimizer
from engram_jax.memory.table import TableLayout, TableState
from engram_jax.sharding import MESH_AXES, spec

MemoryPlan = dict[str, RowPlan]
MemoryRows = dict[str, jax.Array]
Held = dict[str, TableState]
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
class MemoryStore:
    """Static description of the memory. See the module's docstring for its use."""

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

    @classmethod
    def create(cls, config: EngramConfig, token_map: TokenMap, optimizer: RowOptimizer, **settings: Any) -> MemoryStore:
        """The store of a config; `settings` are the fields from `placement` on."""
        return cls(config, token_map, hash_constants(config, token_map), optimizer, **settings)

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

    # --- tables ---

    def init(self, key: jax.Array) -> MemoryState:
        """Rows from N(0, init_std); the paper leaves their initialisation open. Made in chunks: do not jit this call.

        A row's first value is a function of the key, its layer and its logical id: the same on every mesh.
        """
        return MemoryState(chunks.new_tables(self, key), self.none_used())

    def materialize(self, state: MemoryState, step: jax.Array | int) -> Mapping[str, jax.Array | np.ndarray]:
        """Every row as it stands after `step` updates, in logical order: float32 [num_rows, head_dim] per layer."""
        self.check_mesh()
        return chunks.logical_tables(self, state, step)

    def allocate(self) -> dict[str, Table]:
        """Tables of zeros. Raises `ConfigError` if they are cut for another mesh, or a device has no room for them."""
        self.check_mesh()
        if not self.placement.in_program:
            return outside.allocate(self)
        shards_here = self.shards // jax.process_count()
        self.placement.check_room(self.num_bytes // self.shards, shards_here)
        return {
            layer: jax.jit(partial(self._allocate, layer), out_shardings=self.at_rest(layer))() for layer in self.layers
        }

    def check_mesh(self) -> None:
        """Raises `ConfigError` unless the tables are cut for the current mesh (`jax.set_mesh`)."""
        for layer, layout in self.layouts.items():
            routing.check_mesh(layer, layout)

    def at_rest(self, layer: str) -> Any:
        """What jit must be told of a table among its results: its memory and layout; None if it need not be told."""
        return self.placement.at_rest(jax.sharding.get_mesh(), self._abstract_table(layer))

    def abstract_state(self) -> MemoryState:
        """Shapes, dtypes and shardings of the state."""
        if not self.placement.in_program:
            return MemoryState(outside.abstract_tables(self), jax.eval_shape(self.none_used))
        return MemoryState({la: self._abstract_table(la) for la in self.layers}, jax.eval_shape(self.none_used))

    def _abstract_table(self, layer: str) -> Table:
        return jax.eval_shape(partial(self._allocate, layer))

    def _allocate(self, layer: str) -> Table:
        rows = self.layouts[layer].rows_per_shard
        return on_shards(lambda: self.placement.allocate(rows, self.row_shapes()), (), jax.P(routing.mesh_axes()))()

    def none_used(self) -> dict[str, jax.Array]:
        """`rows_used` of new tables."""
        return {layer: jnp.zeros((), jnp.int32) for layer in self.layers}

    def row_shapes(self) -> TableState:
        """Shapes and dtypes of one row and what is kept for it: [1, ...]."""
        rows = jax.ShapeDtypeStruct((1, self.config.engram_head_dim), self.row_dtype)
        return jax.eval_shape(self.new_rows, rows)

    def new_rows(self, rows_UD: jax.Array) -> TableState:
        return TableState(rows_UD, self.optimizer.init(rows_UD), jnp.zeros(rows_UD.shape[:1], jnp.int32))

    # --- addressing ---

    def plan(
        self,
        token_ids_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        capacities: Mapping[str, Capacity] | None = None,
    ) -> MemoryPlan:
        """Rows each position reads. `segment_ids` (0 = padding) end the n-gram windows at document boundaries.

        Without `capacities` no batch can overflow them, but the blocks that travel are as large as the batch; with
        them, a plan whose `need` exceeds them must be made again (see `fits`).
        """
        if self.config.engram_cross_documents:
            segment_ids_BT = None
        if routing.mesh_axes() == MESH_AXES:  # windows reach back, so a device needs whole sequences: 4 bytes a token
            token_ids_BT = jax.reshard(token_ids_BT, spec("batch", None))
            if segment_ids_BT is not None:
                segment_ids_BT = jax.reshard(segment_ids_BT, spec("batch", None))
        canonical_BT = canonicalize(self.token_map, token_ids_BT)
        ids = {la: ngram_row_ids(self.constants, int(la), canonical_BT, segment_ids_BT) for la in self.layers}
        return self.plan_ids(ids, capacities)

    def plan_ids(self, ids: Mapping[str, jax.Array], capacities: Mapping[str, Capacity] | None = None) -> MemoryPlan:
        """The plan of given logical row ids, int32 [B, T, H] per layer. See `check` for ids that are no rows."""
        return routing.plan_rows(ids, self.layouts, capacities, self.transport)

    # --- one step ---

    def fetch(self, state: MemoryState, plan: MemoryPlan, step: jax.Array | int) -> MemoryRows:
        """Rows as they stand after `step` updates: float32 [batch, seq, heads, head_dim] per Engram layer."""
        return self.rows(self.load(state, plan), plan, step)

    def load(self, state: MemoryState, plan: MemoryPlan) -> Held:
        """The plan's rows and their optimizer rows as they lie in the tables, on the devices of their owners."""
        if not self.placement.in_program:
            return outside.load(self, state.tables, plan)
        return {
            layer: self.on_shards(self.placement.take, state.tables[layer], row_plan.owned_U)
            for layer, row_plan in plan.items()
        }

    def rows(self, held: Held, plan: MemoryPlan, step: jax.Array | int) -> MemoryRows:
        """What the readers see of loaded rows."""

        def read(held: TableState, step: jax.Array) -> jax.Array:
            return self.optimizer.read(held.rows, held.slots, step)[0]

        owned = {layer: self.on_shards(read, held[layer], _int(step)) for layer in plan}
        return routing.send_rows(owned, plan, self.transport)

    def reduce(self, plan: MemoryPlan, row_grads: MemoryRows) -> dict[str, jax.Array]:
        """Sums the gradients of repeated rows: [S * U, head_dim] per layer, zero in unused places."""
        return routing.collect_grads(row_grads, plan, self.transport)

    def update(
        self,
        state: MemoryState,
        plan: MemoryPlan,
        grads: Mapping[str, jax.Array],
        step: jax.Array | int,
        held: Held | None = None,
    ) -> MemoryState:
        """Update number `step + 1`, with gradients from `reduce`. Writes the plan's rows and nothing else.

        `held` saves reading the rows again. A rule that needs the whole table (Sinkhorn) writes all of it.
        """
        if self.optimizer.whole_table:
            return self._update_tables(state, plan, grads, step)
        return self.save(state, plan, self.advance(held or self.load(state, plan), plan, grads, step))

    def advance(self, held: Held, plan: MemoryPlan, grads: Mapping[str, jax.Array], step: jax.Array | int) -> Held:
        """Loaded rows after update number `step + 1`."""

        def one_table(layer: str) -> Callable:
            def local(held: TableState, owned_U: jax.Array, grads_UD: jax.Array, step: jax.Array) -> TableState:
                rows_UD, slots = self.optimizer.read(held.rows, held.slots, step)
                rows_UD, slots = self.optimizer.update(rows_UD, slots, grads_UD, step)
                moved = TableState(self._stored(layer, rows_UD, owned_U, step), slots, held.uses + 1)
                # Unused places stay as they were loaded. And all that is written now depends on what was read there:
                # where it does not (last_step), nothing says which comes first, and XLA copies the whole table.
                is_row_U = owned_U < self.layouts[layer].rows_per_shard
                return jax.tree.map(lambda new, old: _where(is_row_U, new, old), moved, held)

            return local

        return {
            layer: self.on_shards(one_table(layer), held[layer], p.owned_U, grads[layer], _int(step))
            for layer, p in plan.items()
        }

    def save(self, state: MemoryState, plan: MemoryPlan, held: Held) -> MemoryState:
        """The state with these rows written back."""
        if self.placement.in_program:
            tables = {
                layer: self.on_shards(self.placement.put, state.tables[layer], p.owned_U, held[layer])
                for layer, p in plan.items()
            }
        else:
            tables = outside.save(self, state.tables, plan, held)
        return MemoryState(tables, self._count_new(state, plan, {layer: h.uses for layer, h in held.items()}))

    def patch(self, early: Held, early_plan: MemoryPlan, held: Held, plan: MemoryPlan) -> Held:
        """`early`, loaded before `held` was saved, as it would be if loaded after: the same bits."""

        def local(early: TableState, early_U: jax.Array, held: TableState, owned_U: jax.Array) -> TableState:
            place_U = jnp.minimum(jnp.searchsorted(owned_U, early_U), len(owned_U) - 1)
            newer_U = owned_U[place_U] == early_U
            return jax.tree.map(lambda old_U, new_U: _where(newer_U, new_U[place_U], old_U), early, held)

        return {
            layer: self.on_shards(local, early[layer], p.owned_U, held[layer], plan[layer].owned_U)
            for layer, p in early_plan.items()
        }

    def promote(self, state: MemoryState, plan: MemoryPlan) -> MemoryState:
        """The state with rows that the plan reads moved to the fast tier, as the placement sees fit: the same values.

        Only a placement that has tiers can. Donate the state, and tell jit where the tables lie (`at_rest`).
        """
        tables = {
            layer: self.on_shards(self.placement.promote, state.tables[layer], p.owned_U)  # type: ignore[attr-defined]
            for layer, p in plan.items()
        }
        return MemoryState(tables, state.rows_used)

    def hit_rate(self, state: MemoryState, plan: MemoryPlan) -> dict[str, jax.Array]:
        """By layer, the share of the distinct rows owners must read that lie in the fast tier: float32 scalars.

        NaN if no lookup is a row. Only a placement that has tiers can say.
        """
        axes = routing.mesh_axes()

        def one_table(layer: str) -> Callable:
            def local(table: Table, owned_U: jax.Array) -> jax.Array:
                asked = jnp.sum(owned_U < self.layouts[layer].rows_per_shard, dtype=jnp.float32)
                hits = jnp.where(asked > 0, self.placement.hit_rate(table, owned_U) * asked, 0.0)  # type: ignore[attr-defined]
                if axes:
                    hits, asked = jax.lax.psum((hits, asked), axes)
                return hits / asked

            return on_shards(local, jax.P(axes), jax.P())

        return {layer: one_table(layer)(state.tables[layer], p.owned_U) for layer, p in plan.items()}

    def _update_tables(
        self, state: MemoryState, plan: MemoryPlan, grads: Mapping[str, jax.Array], step: jax.Array | int
    ) -> MemoryState:
        axes = routing.mesh_axes()

        def total(x: jax.Array) -> jax.Array:
            return jax.lax.psum(x, axes) if axes else x

        def one_table(layer: str) -> Callable:
            def local(packed: Table, owned_U: jax.Array, grads_UD: jax.Array, step: jax.Array) -> Table:
                local_R = jnp.arange(self.layouts[layer].rows_per_shard, dtype=jnp.int32)
                table = self.placement.take(packed, local_R)
                is_row_R = self.logical_rows(layer, local_R) < self.num_rows(layer)
                zeros_RD = jnp.zeros(table.rows.shape, jnp.float32)
                grads_RD = zeros_RD.at[owned_U].add(grads_UD, mode="drop")
                rows_RD, slots = self.optimizer.update_table(table.rows, table.slots, grads_RD, step, is_row_R, total)  # type: ignore[attr-defined]
                uses_R = table.uses.at[owned_U].add(1, mode="drop")
                table = TableState(self._stored(layer, rows_RD, local_R, step), slots, uses_R)
                return self.placement.put(packed, local_R, table)

            return local

        tables = {
            layer: self.on_shards(one_table(layer), state.tables[layer], p.owned_U, grads[layer], _int(step))
            for layer, p in plan.items()
        }
        uses = {layer: held.uses for layer, held in self.load(MemoryState(tables, {}), plan).items()}
        return MemoryState(tables, self._count_new(state, plan, uses))

    def _stored(self, layer: str, rows_UD: jax.Array, local_U: jax.Array, step: jax.Array) -> jax.Array:
        """Rows as the table keeps them. The noise of the rounding depends on step, layer and logical row alone."""
        if self.row_dtype == "float32":
            return rows_UD
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), int(layer)), step)
        return stochastic_round(rows_UD, row_noise(key, self.logical_rows(layer, local_U), rows_UD.shape[-1]))

    def _count_new(self, state: MemoryState, plan: MemoryPlan, uses: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        owned = {layer: p.owned_U for layer, p in plan.items()}
        return self._counter({layer: state.rows_used[layer] for layer in plan}, owned, dict(uses))

    @cached_property
    def _counter(self) -> Callable[..., dict[str, jax.Array]]:
        """Rows used so far and those that this update was the first to touch. Compiled once, for use outside jit."""

        def count(rows_used: dict[str, jax.Array], owned: dict[str, jax.Array], uses: dict[str, jax.Array]) -> dict:
            axes = routing.mesh_axes()

            def new_rows(uses_U: jax.Array, owned_U: jax.Array, layer: str) -> jax.Array:
                is_new_U = (uses_U == 1) & (owned_U < self.layouts[layer].rows_per_shard)
                number = jnp.sum(is_new_U, dtype=jnp.int32)
                return jax.lax.psum(number, axes) if axes else number

            return {
                layer: rows_used[layer]
                + on_shards(partial(new_rows, layer=layer), jax.P(axes), jax.P())(uses[layer], owned[layer])
                for layer in owned
            }

        return jax.jit(count)

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


def _where(mask_U: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(mask_U.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _int(step: jax.Array | int) -> jax.Array:
    return jnp.asarray(step, jnp.int32)
