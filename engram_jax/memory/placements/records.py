"""A table as one array of records: a row, all that is kept for it, and nothing else, side by side in 32-bit words.

TPUs lay arrays out in tiles of 128 lanes. A table [R, D] with D < 128 is either padded to 128 or kept transposed, and
XLA transposes it back, whole, at every step; packed several rows to a line, XLA loops over the rows one by one (566,000
rounds a step of engram_27b on 64 v5p). A record fills whole tiles, so one gather reads a batch's rows with their
optimizer state and one scatter writes them: no loop, no temporaries, and no more memory than the packed arrays (row,
m and v of 80 numbers, step and uses: 242 words of 256).

Legend: R local rows of a shard, U rows of a batch, W words of a record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.memory.table import TableState

LANES = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Records:
    """words: uint32 [R, W]; like: shapes and dtypes of one row's parts, [1, ...], in the order of their words."""

    words: jax.Array
    like: tuple[tuple[tuple[int, ...], str], ...] = field(metadata={"static": True})
    structure: Any = field(metadata={"static": True})

    @classmethod
    def allocate(cls, num_rows: int, like: TableState) -> Records:
        leaves, structure = jax.tree.flatten(like)
        parts = tuple((tuple(leaf.shape[1:]), str(leaf.dtype)) for leaf in leaves)
        width = sum(_num_words(*part) for part in parts)
        return cls(jnp.zeros((num_rows, -(-width // LANES) * LANES), jnp.uint32), parts, structure)

    def take(self, ids_U: jax.Array) -> TableState:
        words_UW = self.words.at[ids_U].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)
        leaves, start = [], 0
        for part in self.like:
            leaves.append(_from_words(words_UW[:, start : start + _num_words(*part)], *part))
            start += _num_words(*part)
        return self.structure.unflatten(leaves)

    def put(self, ids_U: jax.Array, batch: TableState) -> Records:
        words = [_to_words(leaf) for leaf in jax.tree.leaves(batch)]
        unused = self.words.shape[1] - sum(x.shape[1] for x in words)
        words_UW = jnp.pad(jnp.concatenate(words, axis=1), [(0, 0), (0, unused)])
        words = self.words.at[ids_U].set(words_UW, mode="drop", indices_are_sorted=True, unique_indices=True)
        return Records(words, self.like, self.structure)

    @property
    def uses(self) -> jax.Array:
        """int32 [R]. They stand last, as in `TableState`."""
        end = sum(_num_words(*part) for part in self.like)
        return _from_words(self.words[:, end - 1 : end], *self.like[-1])


def _num_words(shape: tuple[int, ...], dtype: str) -> int:
    return -(-math.prod(shape) * jnp.dtype(dtype).itemsize // 4)


def _to_words(x_U: jax.Array) -> jax.Array:
    """uint32 [U, words]. Narrow numbers share words with those half (a quarter) of the row away, not with neighbours:
    no number changes its lane but by whole parts."""
    bits = x_U.dtype.itemsize * 8
    x_UN = x_U.reshape(len(x_U), -1)
    x_UN = jax.lax.bitcast_convert_type(x_UN, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    number = 32 // bits
    x_UN = jnp.pad(x_UN, [(0, 0), (0, -x_UN.shape[1] % number)])
    parts = jnp.split(x_UN, number, axis=1)
    return sum((part << (bits * i) for i, part in enumerate(parts[1:], 1)), start=parts[0])


def _from_words(words_UW: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    bits = jnp.dtype(dtype).itemsize * 8
    unsigned = jnp.dtype(f"uint{bits}")
    parts = [(words_UW >> (bits * i)).astype(unsigned) for i in range(32 // bits)]
    x_UN = jnp.concatenate(parts, axis=1)[:, : math.prod(shape)]
    return jax.lax.bitcast_convert_type(x_UN, jnp.dtype(dtype)).reshape(-1, *shape)
