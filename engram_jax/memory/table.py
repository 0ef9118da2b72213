"""A layer's table: which device owns which logical row, the arrays of its state, and their first values.

A table is H heads of prime size, one after the other. A *logical* row id counts through them; hashing returns logical
ids, and checkpoints store rows in their order. Over S shards every head is cut into S contiguous pieces. So each shard
owns 1/S of every head, and the load is even although some orders are looked up more often. A shard holds its pieces one
after the other, padded to equal size. A *local* row id counts through a shard.

Legend: S shards, H heads, R local rows of one shard, U any set of rows, D row width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Slots = dict[str, jax.Array]
"""Arrays that a row optimizer keeps for each row: name -> [rows, ...]."""

ROW_MULTIPLE = 8
"""Local rows of a shard are padded to a multiple of this (TPU tiles have 8 sublanes)."""


class Run(NamedTuple):
    """Consecutive logical rows that are consecutive local rows of one shard."""

    local: int
    logical: int
    length: int


@dataclass(frozen=True)
class TableLayout:
    """The shard and local row of each logical row of one table. Hashable; holds no arrays."""

    head_rows: tuple[int, ...]
    shards: int = 1

    @property
    def num_rows(self) -> int:
        """Logical rows."""
        return sum(self.head_rows)

    @cached_property
    def pieces(self) -> tuple[int, ...]:
        """Rows of each head that one shard owns (the last shards may own fewer)."""
        return tuple(-(-rows // self.shards) for rows in self.head_rows)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First logical row of each head."""
        return tuple(itertools.accumulate(self.head_rows, initial=0))[:-1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First local row of each head's piece."""
        return tuple(itertools.accumulate(self.pieces, initial=0))[:-1]

    @cached_property
    def rows_per_shard(self) -> int:
        """R: local rows of a shard, padding included."""
        rows = sum(self.pieces)
        return rows if self.shards == 1 else -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE

    def locate(self, ids_BTH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shard and local row of logical ids whose last dim is the head: int32, both of the ids' shape."""
        shape = (1,) * (ids_BTH.ndim - 1) + (-1,)
        offsets, pieces, starts = (
            jnp.asarray(x, jnp.int32).reshape(shape) for x in (self.offsets, self.pieces, self.starts)
        )
        in_head = ids_BTH - offsets
        return in_head // pieces, starts + in_head % pieces

    def logical(self, shard: jax.Array | int, local_U: jax.Array) -> jax.Array:
        """Logical ids of a shard's local rows, int32 [U]; `num_rows` for padding and for ids outside the shard."""
        head_U = jnp.searchsorted(jnp.asarray(self.starts, jnp.int32), local_U, side="right") - 1
        pieces, offsets, starts, sizes = (
            jnp.asarray(x, jnp.int32)[head_U] for x in (self.pieces, self.offsets, self.starts, self.head_rows)
        )
        in_head_U = jnp.asarray(shard, jnp.int32) * pieces + local_U - starts
        exists_U = (local_U >= 0) & (local_U - starts < pieces) & (in_head_U < sizes)
        return jnp.where(exists_U, offsets + in_head_U, self.num_rows)

    def runs(self, shard: int) -> list[Run]:
        """The runs of logical rows of a shard, in local order, without padding."""
        runs = []
        for rows, piece, offset, start in zip(self.head_rows, self.pieces, self.offsets, self.starts, strict=True):
            first = shard * piece
            if first < rows:
                runs.append(Run(start, offset + first, min(piece, rows - first)))
        return runs

    def to_logical(self, array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """[S * R, ...] in the order of the shards -> [num_rows, ...] in logical order: a copy, for small tables."""
        return array[self.logical_order()]

    def logical_order(self) -> np.ndarray:
        """The index of each logical row in the sharded array: int64 [num_rows]."""
        order = np.empty(self.num_rows, np.int64)
        for shard in range(self.shards):
            for local, logical, length in self.runs(shard):
                order[logical : logical + length] = shard * self.rows_per_shard + local + np.arange(length)
        return order


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableState:
    """One layer's table, [S * R, ...], or some of its rows, [U, ...].

    rows: [S * R, head_dim], in the table's dtype.
    slots: the optimizer's arrays for each row, by name: [S * R, ...].
    uses: int32 [S * R], the number of updates that touched each row.
    """

    rows: jax.Array
    slots: Slots
    uses: jax.Array


@dataclass(frozen=True)
class RowInit:
    """First values of the rows: N(0, std), a function of (key, logical row) alone, on every mesh and placement."""

    head_dim: int
    std: float
    dtype: str = "float32"

    def __call__(self, key: jax.Array, logical_U: jax.Array) -> jax.Array:
        def one(row: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, row), (self.head_dim,), jnp.float32)

        return (self.std * jax.vmap(one)(logical_U)).astype(self.dtype)
