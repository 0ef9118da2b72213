"""MemoryStore: the tables of all Engram layers, and the operations that read and update their rows.

    state = store.init(key)                             new tables, sharded
    plan  = store.plan(token_ids, segment_ids)          who reads which rows, a pure function of tokens
    rows  = store.fetch(state, plan, step)              rows for the readers: [batch, seq, heads, head_dim] per layer
    grads = store.reduce(plan, row_grads)               one summed gradient per distinct row, at its owner
    state = store.update(state, plan, grads, step)      the plan's rows only (donate the state)
    table = store.materialize(state, step)              the logical tables, for export and tests

A training step calls the parts of `fetch` and `update` one by one, so that it reads each row once and can read the next
batch's rows early:

    loaded = store.load(state, plan)                    rows with their slots and uses, at their owners
    rows   = store.rows(loaded, plan, step)             rows for the readers
    loaded = store.advance(loaded, plan, grads, step)   rows and slots after the update
    state  = store.save(state, plan, loaded)            written back
    early  = store.patch(early, next_plan, loaded, plan)    rows read before `save`, as if read after it

Related files: hashing.py (which rows a token reads), table.py (which device owns a row), routing.py (how rows cross the
mesh), placements/ (which memory holds them), row_optimizers/ (how they move).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig
from engram_jax.memory import chunks, numpy_tables, routing
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import LoadedRows, MemoryDescription, MemoryPlan, MemoryRows, MemoryState
from engram_jax.memory.hashing import canonicalize, hash_constants, ngram_row_ids
from engram_jax.memory.placements import Table
from engram_jax.memory.plan import Capacity
from engram_jax.memory.rounding import row_noise, stochastic_round
from engram_jax.memory.routing import on_shards
from engram_jax.memory.row_optimizers import RowOptimizer
from engram_jax.memory.table import TableState
from engram_jax.sharding import MESH_AXES, spec


@dataclass(frozen=True, eq=False)
class MemoryStore(MemoryDescription):
    """The tables of a model and the operations on them; the module's docstring shows its use.

    It holds no device arrays: any jitted function may close over it.
    """

    @classmethod
    def create(cls, config: EngramConfig, token_map: TokenMap, optimizer: RowOptimizer, **settings: Any) -> MemoryStore:
        """The store of a config. `settings`: fields of `MemoryDescription` from `placement` on."""
        return cls(config, token_map, hash_constants(config, token_map), optimizer, **settings)

    # --- tables ---

    def init(self, key: jax.Array) -> MemoryState:
        """New tables with rows from N(0, init_std). Works in chunks: do not jit this call.

        The paper does not say how rows are initialised. A row's first value is a function of the key, its layer and
        its logical id: the same on every mesh.
        """
        return MemoryState(chunks.new_tables(self, key, self.allocate()), self.none_used())

    def materialize(self, state: MemoryState, step: jax.Array | int) -> Mapping[str, jax.Array | np.ndarray]:
        """Every row after `step` updates, in logical order: float32 [num_rows, head_dim] per layer."""
        self.check_mesh()
        return chunks.logical_tables(self, state, step)

    def allocate(self) -> dict[str, Table]:
        """Tables of zeros.

        Raises:
          ConfigError: the store is built for another number of devices, or the tables do not fit.
        """
        self.check_mesh()
        if not self.placement.in_program:
            return numpy_tables.allocate(self)
        shards_here = self.shards // jax.process_count()
        self.placement.check_room(self.num_bytes // self.shards, shards_here)
        return {
            layer: jax.jit(partial(self._allocate, layer), out_shardings=self.at_rest(layer))() for layer in self.layers
        }

    def abstract_state(self) -> MemoryState:
        """Shapes, dtypes and shardings of the state in a compiled program."""
        tables = {la: self._abstract_table(la) for la in self.layers} if self.placement.in_program else {}
        return MemoryState(tables, jax.eval_shape(self.none_used))

    def none_used(self) -> dict[str, jax.Array]:
        """`rows_used` of new tables: zero for each layer."""
        return {layer: jnp.zeros((), jnp.int32) for layer in self.layers}

    # --- addressing ---

    def plan(
        self,
        token_ids_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        capacities: Mapping[str, Capacity] | None = None,
    ) -> MemoryPlan:
        """The rows that each position reads.

        Args:
          token_ids_BT: int32 [B, T], raw token ids.
          segment_ids_BT: int32 [B, T], the document of each token, 0 for padding: n-gram windows end at documents'
            boundaries. None: every row is one document.
          capacities: sizes of the blocks that cross the mesh, by layer. A plan whose `need` exceeds them must be made
            again (see `fits`). None: blocks as large as the batch, which no batch can overflow.
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
        """The plan of given logical row ids, int32 [B, T, H] per layer. `plan.check` finds ids outside the tables."""
        return routing.plan_rows(ids, self.layouts, capacities, self.transport)

    # --- one step ---

    def fetch(self, state: MemoryState, plan: MemoryPlan, step: jax.Array | int) -> MemoryRows:
        """The plan's rows after `step` updates: float32 [batch, seq, heads, head_dim] per Engram layer."""
        return self.rows(self.load(state, plan), plan, step)

    def load(self, state: MemoryState, plan: MemoryPlan) -> LoadedRows:
        """The plan's rows with their slots and uses as the tables hold them, on the devices of their owners."""
        if not self.placement.in_program:
            return numpy_tables.load(self, state.tables, plan)
        return {
            layer: self.on_shards(self.placement.take, state.tables[layer], row_plan.owned_U)
            for layer, row_plan in plan.items()
        }

    def rows(self, loaded: LoadedRows, plan: MemoryPlan, step: jax.Array | int) -> MemoryRows:
        """Loaded rows after `step` updates, sent to the positions that read them: shapes of `fetch`."""

        def read(loaded: TableState, step: jax.Array) -> jax.Array:
            return self.optimizer.read(loaded.rows, loaded.slots, step)[0]

        owned = {layer: self.on_shards(read, loaded[layer], _int(step)) for layer in plan}
        return routing.send_rows(owned, plan, self.transport)

    def reduce(self, plan: MemoryPlan, row_grads: MemoryRows) -> dict[str, jax.Array]:
        """The summed gradient of each distinct row, at its owner: [S * U, head_dim] per layer, zero in unused places.

        `row_grads`: gradients of what `fetch` returned.
        """
        return routing.collect_grads(row_grads, plan, self.transport)

    def update(
        self,
        state: MemoryState,
        plan: MemoryPlan,
        grads: Mapping[str, jax.Array],
        step: jax.Array | int,
        loaded: LoadedRows | None = None,
    ) -> MemoryState:
        """The state after update number `step + 1`, with gradients from `reduce`. Writes the plan's rows only.

        `loaded`: the plan's rows, if they are loaded already. A row optimizer with `whole_table` writes every row.
        """
        if self.optimizer.whole_table:
            return self._update_tables(state, plan, grads, step)
        return self.save(state, plan, self.advance(loaded or self.load(state, plan), plan, grads, step))

    def advance(
        self, loaded: LoadedRows, plan: MemoryPlan, grads: Mapping[str, jax.Array], step: jax.Array | int
    ) -> LoadedRows:
        """Loaded rows, slots and uses after update number `step + 1`, with gradients from `reduce`."""

        def one_table(layer: str) -> Callable:
            def local(loaded: TableState, owned_U: jax.Array, grads_UD: jax.Array, step: jax.Array) -> TableState:
                rows_UD, slots = self.optimizer.read(loaded.rows, loaded.slots, step)
                rows_UD, slots = self.optimizer.update(rows_UD, slots, grads_UD, step)
                moved = TableState(self._stored(layer, rows_UD, owned_U, step), slots, loaded.uses + 1)
                # Unused places stay as they were loaded. This also makes every array that is written depend on the
                # array that was read: otherwise (last_step) XLA does not know that the reading comes first, and
                # copies the whole table.
                is_row_U = owned_U < self.layouts[layer].rows_per_shard
                return jax.tree.map(lambda new, old: _where(is_row_U, new, old), moved, loaded)

            return local

        return {
            layer: self.on_shards(one_table(layer), loaded[layer], p.owned_U, grads[layer], _int(step))
            for layer, p in plan.items()
        }

    def save(self, state: MemoryState, plan: MemoryPlan, loaded: LoadedRows) -> MemoryState:
        """The state with these rows written back, and the rows that this update was the first to touch counted."""
        if self.placement.in_program:
            tables = {
                layer: self.on_shards(self.placement.put, state.tables[layer], p.owned_U, loaded[layer])
                for layer, p in plan.items()
            }
        else:
            tables = numpy_tables.save(self, state.tables, plan, loaded)
        return MemoryState(tables, self._count_new(state, plan, {layer: h.uses for layer, h in loaded.items()}))

    def patch(self, early: LoadedRows, early_plan: MemoryPlan, loaded: LoadedRows, plan: MemoryPlan) -> LoadedRows:
        """`early`, which was loaded before `loaded` was saved, with the rows that `loaded` changed: the same bits as if
        it were loaded now."""

        def local(early: TableState, early_U: jax.Array, loaded: TableState, owned_U: jax.Array) -> TableState:
            place_U = jnp.minimum(jnp.searchsorted(owned_U, early_U), len(owned_U) - 1)
            newer_U = owned_U[place_U] == early_U
            return jax.tree.map(lambda old_U, new_U: _where(newer_U, new_U[place_U], old_U), early, loaded)

        return {
            layer: self.on_shards(local, early[layer], p.owned_U, loaded[layer], plan[layer].owned_U)
            for layer, p in early_plan.items()
        }

    def promote(self, state: MemoryState, plan: MemoryPlan) -> MemoryState:
        """The state with rows that the plan reads moved to the fast tier (`Placement.promote`): the same values.

        For placements with `has_tiers`. Donate the state, and give jit `tables_at_rest` as `out_shardings`.
        """
        tables = {
            layer: self.on_shards(self.placement.promote, state.tables[layer], p.owned_U) for layer, p in plan.items()
        }
        return MemoryState(tables, state.rows_used)

    def hit_rate(self, state: MemoryState, plan: MemoryPlan) -> dict[str, jax.Array]:
        """By layer, the share of the plan's distinct rows that lie in the fast tier: float32 scalars.

        NaN if the plan reads no row. For placements with `has_tiers`.
        """
        axes = routing.mesh_axes()

        def one_table(layer: str) -> Callable:
            def local(table: Table, owned_U: jax.Array) -> jax.Array:
                asked = jnp.sum(owned_U < self.layouts[layer].rows_per_shard, dtype=jnp.float32)
                hits = jnp.where(asked > 0, self.placement.hit_rate(table, owned_U) * asked, 0.0)
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
                rows_RD, slots = self.optimizer.update_table(table.rows, table.slots, grads_RD, step, is_row_R, total)
                uses_R = table.uses.at[owned_U].add(1, mode="drop")
                table = TableState(self._stored(layer, rows_RD, local_R, step), slots, uses_R)
                return self.placement.put(packed, local_R, table)

            return local

        tables = {
            layer: self.on_shards(one_table(layer), state.tables[layer], p.owned_U, grads[layer], _int(step))
            for layer, p in plan.items()
        }
        uses = {layer: loaded.uses for layer, loaded in self.load(MemoryState(tables, {}), plan).items()}
        return MemoryState(tables, self._count_new(state, plan, uses))

    def _stored(self, layer: str, rows_UD: jax.Array, local_U: jax.Array, step: jax.Array) -> jax.Array:
        """Rows in the dtype of the table. The noise of the rounding depends on step, layer and logical row alone."""
        if self.row_dtype == "float32":
            return rows_UD
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), int(layer)), step)
        return stochastic_round(rows_UD, row_noise(key, self.logical_rows(layer, local_U), rows_UD.shape[-1]))

    def _count_new(self, state: MemoryState, plan: MemoryPlan, uses: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        owned = {layer: p.owned_U for layer, p in plan.items()}
        return self._counter({layer: state.rows_used[layer] for layer in plan}, owned, dict(uses))

    @cached_property
    def _counter(self) -> Callable[..., dict[str, jax.Array]]:
        """Counts the rows used after an update. Compiled once, for use outside jit."""

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


def _where(mask_U: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(mask_U.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _int(step: jax.Array | int) -> jax.Array:
    return jnp.asarray(step, jnp.int32)
