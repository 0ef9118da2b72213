"""MemoryStore: the tables of all Engram layers, how they are addressed, and who updates them.

    state = store.init(key)                             tables at birth
    plan  = store.plan(token_ids, segment_ids)          row ids, a pure function of tokens
    rows  = store.fetch(state, plan, step)              what the readers see: [batch, seq, heads, head_dim] per layer
    grads = store.reduce(plan, row_grads)               one summed gradient per distinct row
    state = store.update(state, plan, grads, step)      the plan's rows only (donate the state)
    table = store.materialize(state, step)              the logical table, for export and tests

A row lives in `MemoryState.tables[layer].rows`; it is addressed by memory/hashing.py; memory/row_optimizers.py says how
it moves. The store holds no device arrays: it can be closed over by any jitted function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig
from engram_jax.memory import routing
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import HashConstants, canonicalize, hash_constants, ngram_row_ids
from engram_jax.memory.routing import RowPlan
from engram_jax.memory.row_optimizers import RowOptimizer, Slots
from engram_jax.sharding import spec

MemoryPlan = dict[str, RowPlan]
MemoryRows = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableState:
    """One layer's table. rows: float32 [num_rows, head_dim]; slots: what the optimizer keeps for each row."""

    rows: jax.Array
    slots: Slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryState:
    tables: dict[str, TableState]
    """By Engram layer, keyed `str(layer_id)`. Empty without memory."""


@dataclass(frozen=True, eq=False)
class MemoryStore:
    """Static description of the memory: what to hash and how to optimize. See the module's docstring for its use."""

    config: EngramConfig
    token_map: TokenMap
    constants: HashConstants
    optimizer: RowOptimizer
    init_std: float = 0.02

    @classmethod
    def create(
        cls, config: EngramConfig, token_map: TokenMap, optimizer: RowOptimizer, init_std: float = 0.02
    ) -> MemoryStore:
        return cls(config, token_map, hash_constants(config, token_map), optimizer, init_std)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(str(layer_id) for layer_id in self.config.engram_layer_ids)

    def num_rows(self, layer: str) -> int:
        return self.constants.num_rows(int(layer))

    def init(self, key: jax.Array) -> MemoryState:
        """Rows from N(0, init_std); the paper leaves their initialisation open. Jit this call."""
        return MemoryState({layer: self._init_table(layer, key) for layer in self.layers})

    def _init_table(self, layer: str, key: jax.Array) -> TableState:
        shape = (self.num_rows(layer), self.config.engram_head_dim)
        key = jax.random.fold_in(key, int(layer))
        rows = self.init_std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(None, None))
        return TableState(rows, self.optimizer.init(rows))

    def plan(self, token_ids_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> MemoryPlan:
        """Rows each position reads. `segment_ids` (0 = padding) end the n-gram windows at document boundaries."""
        if self.config.engram_cross_documents:
            segment_ids_BT = None
        canonical_BT = canonicalize(self.token_map, token_ids_BT)
        plan = {}
        for layer in self.layers:
            ids_BTH = ngram_row_ids(self.constants, int(layer), canonical_BT, segment_ids_BT)
            plan[layer] = routing.plan_rows(ids_BTH, self.num_rows(layer))
        return plan

    def fetch(self, state: MemoryState, plan: MemoryPlan, step: jax.Array) -> MemoryRows:
        """Rows as they stand after `step` updates: float32 [batch, seq, heads, head_dim] per Engram layer."""
        rows = {}
        for layer, row_plan in plan.items():
            rows_UD, _ = self._read(state.tables[layer], row_plan, step)
            rows[layer] = routing.spread(rows_UD, row_plan, spec("batch", "seq", None, None))
        return rows

    def reduce(self, plan: MemoryPlan, row_grads: MemoryRows) -> dict[str, jax.Array]:
        """Sums the gradients of repeated rows: [slots, head_dim] per layer, zero in unused slots."""
        return {layer: routing.gather_gradients(row_grads[layer], plan[layer]) for layer in plan}

    def update(
        self, state: MemoryState, plan: MemoryPlan, grads: Mapping[str, jax.Array], step: jax.Array
    ) -> MemoryState:
        """Update number `step + 1`, with gradients from `reduce`. Writes the plan's rows and nothing else."""
        tables = {layer: self._update_table(state.tables[layer], plan[layer], grads[layer], step) for layer in plan}
        return MemoryState(tables)

    def _update_table(self, table: TableState, plan: RowPlan, grads_UD: jax.Array, step: jax.Array) -> TableState:
        if self.optimizer.whole_table:
            grads_RD = jnp.zeros_like(table.rows).at[plan.unique_U].add(grads_UD, mode="drop")
            return TableState(*self.optimizer.update(table.rows, table.slots, grads_RD, step))
        rows_UD, slots = self._read(table, plan, step)
        rows_UD, slots = self.optimizer.update(rows_UD, slots, grads_UD, step)
        return jax.tree.map(lambda array_R, new_U: routing.put(array_R, plan, new_U), table, TableState(rows_UD, slots))

    def _read(self, table: TableState, plan: RowPlan, step: jax.Array) -> tuple[jax.Array, Slots]:
        batch = jax.tree.map(lambda array_R: routing.take(array_R, plan), table)
        return self.optimizer.read(batch.rows, batch.slots, step)

    def materialize(self, state: MemoryState, step: jax.Array) -> dict[str, jax.Array]:
        """Every row as it stands after `step` updates: [num_rows, head_dim] per layer."""
        return {layer: self.optimizer.read(t.rows, t.slots, step)[0] for layer, t in state.tables.items()}
