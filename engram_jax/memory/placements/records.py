"""A table as one array of records: each record is a row with its slots and uses, side by side in 32-bit words.

TPUs store arrays in tiles of 128 lanes. XLA either pads a table [R, D] with D < 128 to 128 lanes, or stores it
transposed and transposes the whole table at every step. With several rows packed into a line, XLA loops over the rows
one by one (566,000 rounds in a step of engram_27b on 64 v5p). A record fills whole tiles: one gather reads a batch's
rows with their slots, and one scatter writes them, without a loop and without temporaries. Records take no more memory
than packed arrays (a row, m and v of 80 numbers, step and uses are 242 words of 256).

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
    """A shard's table as an array of records."""

    words: jax.Array
    """uint32 [R, W]"""
    like: tuple[tuple[tuple[int, ...], str], ...] = field(metadata={"static": True})
    """Shape and dtype of each field of one row, in the order of their words."""
    structure: Any = field(metadata={"static": True})
    """The pytree of the fields."""

    @classmethod
    def allocate(cls, num_rows: int, like: TableState) -> Records:
        """Zeros for `num_rows` rows. `like`: shapes and dtypes of one row, [1, ...]."""
        leaves, structure = jax.tree.flatten(like)
        parts = tuple((tuple(leaf.shape[1:]), str(leaf.dtype)) for leaf in leaves)
        width = sum(_num_words(*part) for part in parts)
        return cls(jnp.zeros((num_rows, -(-width // LANES) * LANES), jnp.uint32), parts, structure)

    def take(self, ids_U: jax.Array) -> TableState:
        """The rows `ids_U`, ascending and distinct; ids of R and above read as zero."""
        words_UW = self.words.at[ids_U].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)
        leaves, start = [], 0
        for part in self.like:
            leaves.append(_from_words(words_UW[:, start : start + _num_words(*part)], *part))
            start += _num_words(*part)
        return self.structure.unflatten(leaves)

    def put(self, ids_U: jax.Array, batch: TableState) -> Records:
        """The table with the rows `ids_U` replaced; ids of R and above are dropped."""
        words = [_to_words(leaf) for leaf in jax.tree.leaves(batch)]
        unused = self.words.shape[1] - sum(x.shape[1] for x in words)
        words_UW = jnp.pad(jnp.concatenate(words, axis=1), [(0, 0), (0, unused)])
        words = self.words.at[ids_U].set(words_UW, mode="drop", indices_are_sorted=True, unique_indices=True)
        return Records(words, self.like, self.structure)

    @property
    def uses(self) -> jax.Array:
        """int32 [R], updates that touched each row. They are the last field, as in `TableState`."""
        end = sum(_num_words(*part) for part in self.like)
        return _from_words(self.words[:, end - 1 : end], *self.like[-1])


def _num_words(shape: tuple[int, ...], dtype: str) -> int:
    return -(-math.prod(shape) * jnp.dtype(dtype).itemsize // 4)


def _to_words(x_U: jax.Array) -> jax.Array:
    """uint32 [U, words]. Two (four) numbers share a word: those half (a quarter) of the row apart, not neighbours.

    So packing moves whole halves (quarters) of a row and never a single lane.
    """
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
