"""Rows of a checkpoint's table, read in runs, in its own precision, and streamed into a store.

Legend: N rows of one read, D row width, K = D / 32 scales of an FP8 row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.interop.shards import DTYPES, Tensor
from engram_jax.memory.chunks import filled
from engram_jax.memory.description import MemoryState
from engram_jax.memory.quantized import BLOCK, CODE, dequantize, num_blocks
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableLayout, TableState

FP8 = "F8_E4M3"


@dataclass(frozen=True)
class RowSource:
    """A table's logical rows, in one tensor or in several, one after the other. Holds no rows."""

    parts: tuple[Tensor, ...]
    """[rows, D] each; rows beyond the logical ones are padding."""
    num_rows: int
    """Logical rows."""
    block_scales: tuple[Tensor, ...] = ()
    """FP8 rows' scale bytes, [rows, K], for each part."""
    part_scales: tuple[float, ...] = ()
    """FP8 rows' one scale for each part."""

    def __post_init__(self):
        for part, scales in zip(self.parts, self.block_scales, strict=bool(self.block_scales)):
            expected = (part.num_rows, num_blocks(part.shape[1]))
            require(
                scales.shape == expected and DTYPES[scales.dtype] == np.uint8,
                f"{scales.file}: {scales.name} is {scales.dtype} {list(scales.shape)}; scales of 1 x {BLOCK} blocks of "
                f"{part.name} are F8_E8M0 {list(expected)}.",
            )
        for part in self.parts:
            scaled = self.block_scales or self.part_scales
            require(
                part.dtype != FP8 or bool(scaled), f"{part.file}: {part.name} is {FP8} and nothing holds its scales."
            )

    @property
    def head_dim(self) -> int:
        return self.parts[0].shape[1]

    @cached_property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *(part.num_rows for part in self.parts)]).tolist()

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Logical rows [start, start + count) as they lie, [N, D], and their block scales uint8 [N, K], if any."""
        rows: list[np.ndarray] = []
        scales: list[np.ndarray] = []
        end = start + count
        while start < end:
            i = bisect_right(self._starts, start) - 1
            length = min(end, self._starts[i + 1]) - start
            found = self.parts[i].rows(start - self._starts[i], length)
            if self.part_scales:
                found = found.astype(np.float32) * np.float32(self.part_scales[i])
            rows.append(found)
            if self.block_scales:
                scales.append(self.block_scales[i].rows(start - self._starts[i], length))
            start += length
        return np.concatenate(rows), np.concatenate(scales) if scales else None

    def values(self, start: int, count: int) -> np.ndarray:
        """The same rows as numbers, float32 [N, D]."""
        rows, scales = self.read(start, count)
        return (
            rows.astype(np.float32)
            if scales is None
            else np.asarray(dequantize(jnp.asarray(rows), jnp.asarray(scales)))
        )


def load_tables(store: MemoryStore, sources: Mapping[str, RowSource]) -> MemoryState:
    """New tables with the sources' rows, by layer; no step has been taken. Made in chunks: do not jit this call.

    A store of frozen FP8 rows (`FrozenFP8`, memory/quantized.py) takes an FP8 source's bytes as they are; any other one
    takes the numbers, rounded to its `row_dtype`. A table is in memory once, in the store, wherever that keeps it. Call
    under the store's mesh, if it has one.

    Raises:
      ConfigError: a source of other size than the store's table, or not in FP8 where the store is.
    """
    frozen = store.row_dtype == CODE.dtype.name
    for layer in store.layers:
        source, wanted = sources[layer], (store.num_rows(layer), store.config.engram_head_dim)
        require(
            (source.num_rows, source.head_dim) == wanted,
            f"{source.parts[0].file}: the table of layer {layer} is {source.num_rows:,} x {source.head_dim}, and "
            f"engram_vocab_size, engram_n_heads, engram_max_ngram_size and engram_head_dim make it {wanted[0]:,} x "
            f"{wanted[1]}: rows are addressed modulo the heads' sizes, so a table of another size means nothing.",
        )
        require(
            not frozen or bool(source.block_scales),
            f"{source.parts[0].file}: the rows of layer {layer} are not FP8 with a scale for 1 x {BLOCK} values, which "
            "a frozen FP8 store takes as they are: load them into a store of float32 or bfloat16 rows.",
        )
    tables = dict(store.allocate())
    for layer in store.layers:
        read = partial(_frozen_chunk if frozen else _chunk, store, store.layouts[layer], sources[layer])
        tables[layer] = filled(store, layer, tables[layer], read)
    return MemoryState(tables, store.none_used())


def _frozen_chunk(
    store: MemoryStore, layout: TableLayout, source: RowSource, shard: int, start: int, count: int
) -> TableState:
    codes = np.zeros((count, source.head_dim), DTYPES[FP8])
    scales = np.zeros((count, num_blocks(source.head_dim)), np.uint8)
    for to, logical, length in _runs(layout, shard, start, count):
        codes[to : to + length], scales[to : to + length] = source.read(logical, length)  # type: ignore[assignment]
    return TableState(codes, {"scale": scales}, np.zeros(count, np.int32))  # type: ignore[arg-type]


def _chunk(
    store: MemoryStore, layout: TableLayout, source: RowSource, shard: int, start: int, count: int
) -> TableState:
    rows = np.zeros((count, source.head_dim), np.dtype(store.row_dtype))
    for to, logical, length in _runs(layout, shard, start, count):
        rows[to : to + length] = source.values(logical, length)
    # As they are made for any new rows; a rule's slots are a function of the rows' shape alone.
    return jax.device_get(_new_rows(store, rows))


@partial(jax.jit, static_argnums=0)
def _new_rows(store: MemoryStore, rows_UD: jax.Array) -> TableState:
    return store.new_rows(rows_UD)


def _runs(layout: TableLayout, shard: int, start: int, count: int) -> Sequence[tuple[int, int, int]]:
    """(place in the chunk, logical row, length) of what a chunk of local rows holds."""
    found = []
    for local, logical, length in layout.runs(shard):
        first, last = max(local, start), min(local + length, start + count)
        if first < last:
            found.append((first - start, logical + first - local, last - first))
    return found
