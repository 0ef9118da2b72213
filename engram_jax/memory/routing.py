"""From the ids of a batch to its distinct rows, and from the gradients of lookups to one gradient per row.

Local routing: every device holds the table. N lookups of a batch are sorted once; equal ids share a slot, so a row is
read, caught up and updated once however often n-grams repeat (they are Zipfian), and the gradients of a row are summed
in one fixed order.

Legend: B batch, T seq, H rows per token, N = B*T*H lookups, U = N slots (unused ones at the end), D row width.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowPlan:
    """Which rows a batch reads in one Engram layer. A pure function of its tokens."""

    ids_BTH: jax.Array
    """int32 rows of the layer's table."""
    unique_U: jax.Array
    """The distinct ids, ascending; unused slots lie beyond the table: they read as zero and write nowhere."""
    slot_N: jax.Array
    """For each lookup the slot of its row."""
    order_N: jax.Array
    """The lookups in ascending order of their ids."""


def plan_rows(ids_BTH: jax.Array, num_rows: int) -> RowPlan:
    ids_N = replicate(ids_BTH).reshape(-1)
    sorted_N, order_N = stable_sort(ids_N)
    starts_N = jnp.concatenate([jnp.ones((1,), bool), sorted_N[1:] != sorted_N[:-1]])
    rank_N = jnp.cumsum(starts_N, dtype=jnp.int32) - 1
    beyond_U = num_rows + jnp.arange(ids_N.size, dtype=jnp.int32)
    unique_U = beyond_U.at[rank_N].set(sorted_N, indices_are_sorted=True)
    slot_N = jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True)
    return RowPlan(ids_BTH, unique_U, slot_N, order_N)


def stable_sort(ids_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids in ascending order, and where each one stood: int32 [N] both.

    Id and place are sorted as one 64-bit number: 2.3 ms for 65,536 on CPU, where `lax.sort` of the pair takes 11.
    """
    with jax.enable_x64(True):
        keys_N = (ids_N.astype(jnp.int64) << 32) | jnp.arange(ids_N.size, dtype=jnp.int64)
        keys_N = jnp.sort(keys_N)
        return (keys_N >> 32).astype(jnp.int32), keys_N.astype(jnp.int32)


def take(array_R: jax.Array, plan: RowPlan) -> jax.Array:
    """The plan's distinct rows of an array whose first dim is the table's: [U, ...]."""
    return array_R.at[plan.unique_U].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)


def put(array_R: jax.Array, plan: RowPlan, values_U: jax.Array) -> jax.Array:
    """The array with the plan's rows replaced; in place when it is donated."""
    return array_R.at[plan.unique_U].set(values_U, mode="drop", indices_are_sorted=True, unique_indices=True)


def spread(rows_UD: jax.Array, plan: RowPlan, batch_sharding: jax.P | None = None) -> jax.Array:
    """Distinct rows back to one row per lookup: [B, T, H, D]."""
    rows_ND = rows_UD[plan.slot_N]
    rows_BTHD = rows_ND.reshape(*plan.ids_BTH.shape, rows_UD.shape[-1])
    return rows_BTHD if batch_sharding is None else jax.reshard(rows_BTHD, batch_sharding)


def gather_gradients(grads_BTHD: jax.Array, plan: RowPlan) -> jax.Array:
    """Sum of the gradients of each distinct row, in the order of the sort: [U, D]."""
    grads_ND = replicate(grads_BTHD).reshape(-1, grads_BTHD.shape[-1])
    rank_N = plan.slot_N[plan.order_N]
    return jax.ops.segment_sum(grads_ND[plan.order_N], rank_N, len(rank_N), indices_are_sorted=True)


def replicate(x: jax.Array) -> jax.Array:
    """Every device gets the whole array (no-op outside a mesh)."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, jax.P())
