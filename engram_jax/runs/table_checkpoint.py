"""Tables in checkpoints: every process writes and reads its own shards, a chunk of rows at a time.

    <step>/tables/<layer>/00003-of-00008.rows.bin ...       (memory/table_files.py)

Orbax makes the folder and renames the whole step when everything is written. It does not save the rows itself: it would
save them cut and padded for one number of devices. One chunk of every shard at a time comes to the host, so saving
needs the memory of one chunk per shard beside the table, with any placement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from engram_jax.memory.chunks import chunk_reader, filled
from engram_jax.memory.placements import Table
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableLayout, TableState
from engram_jax.memory.table_files import ShardWriter, TableReader, rows_per_chunk
from engram_jax.memory.table_index import Field


def fields_of(store: MemoryStore) -> dict[str, Field]:
    """The arrays of each row (the row, its slots, its uses) by their names in the files."""
    return {name: Field.of(leaf.shape[1:], leaf.dtype) for name, leaf in _named(store.row_shapes()).items()}


def save_tables(directory: Path, store: MemoryStore, mesh: Mesh, tables: dict[str, Table]) -> None:
    """Writes this process's shards of every table.

    Raises:
      OSError: the disk refuses a write; names the file.
    """
    fields = fields_of(store)
    with jax.set_mesh(mesh):
        for layer, layout in store.layouts.items():
            rows = layout.rows_per_shard
            count = min(rows_per_chunk(fields), rows)
            read = chunk_reader(store, count)
            writers: dict[int, ShardWriter] = {}
            try:
                following = read(tables[layer], 0)
                for start in range(0, rows, count):
                    chunk, after = following, start + count
                    if after < rows:  # read while the previous chunk is written
                        following = read(tables[layer], after)
                    for shard, arrays in _by_shard(chunk, count).items():
                        if shard not in writers:
                            writers[shard] = ShardWriter(directory / layer, layout, shard, fields)
                        writers[shard].write(start, {name: x[: rows - start] for name, x in arrays.items()})
                for writer in writers.values():
                    writer.close()
            except BaseException:
                for writer in writers.values():
                    writer.abort()
                raise


def restore_tables(
    directory: Path, store: MemoryStore, mesh: Mesh, saved_by: MemoryStore | None = None, step: int = 0
) -> dict[str, Table]:
    """The tables of a checkpoint with the shards and the placement of `store`, from files of any number of shards.

    Args:
      saved_by: the store of the run that saved the tables, if `store` belongs to another run. Rows then keep their
        values after `step` updates and their uses, and get new slots and the dtype of `store`.
      step: updates that the saved tables have had; only with `saved_by`.

    Raises:
      TableFileError: the files are incomplete, damaged, or hold another table.
    """
    fields = fields_of(saved_by or store)
    convert = _begin_anew(saved_by, store, step) if saved_by else lambda chunk: chunk
    readers = {layer: TableReader(directory / layer) for layer in store.layers}
    for layer, reader in readers.items():
        reader.check(store.layouts[layer], fields)
    with jax.set_mesh(mesh):
        tables = store.allocate()
        for layer, reader in readers.items():
            read = partial(_local_rows, reader, store.layouts[layer])
            tables[layer] = filled(store, layer, tables[layer], read, rows_per_chunk(fields), convert)
    return tables


def _local_rows(reader: TableReader, layout: TableLayout, shard: int, start: int, count: int) -> TableState:
    """Local rows start .. start + count of a shard, zero beyond its end."""
    there = min(count, layout.rows_per_shard - start)
    rows = reader.read(layout, shard, start, there)
    return _unnamed({name: np.pad(x, [(0, count - there)] + [(0, 0)] * (x.ndim - 1)) for name, x in rows.items()})


def _begin_anew(saved_by: MemoryStore, store: MemoryStore, step: int) -> Callable[[TableState], TableState]:
    """Converts chunks of one run's table to new rows of another run: values after `step` updates, with new slots."""

    def local(chunk: TableState) -> TableState:
        rows, _ = saved_by.optimizer.read(chunk.rows, chunk.slots, jnp.int32(step))
        return replace(store.new_rows(rows.astype(store.row_dtype)), uses=chunk.uses)

    return jax.jit(partial(store.on_shards, local))


def _by_shard(chunk: TableState, count: int) -> dict[int, dict[str, np.ndarray]]:
    """This process's parts of a chunk [S * count, ...]."""
    shards: dict[int, dict[str, np.ndarray]] = {}
    for name, array in _named(chunk).items():
        for part in array.addressable_shards:
            shard = (part.index[0].start or 0) // count
            shards.setdefault(shard, {})[name] = np.asarray(part.data)
    return shards


def _named(table: TableState) -> dict[str, Any]:
    return {"rows": table.rows, "uses": table.uses, **{f"slots.{name}": x for name, x in table.slots.items()}}


def _unnamed(fields: dict[str, Any]) -> TableState:
    slots = {name.removeprefix("slots."): x for name, x in fields.items() if name.startswith("slots.")}
    return TableState(fields["rows"], slots, fields["uses"])


class TablesHandler(ocp.CheckpointHandler):
    """Orbax's handler of the item `tables`: passes its folder to `save_tables` and `restore_tables`."""

    def save(self, directory: Any, args: SaveTables | WriteTables) -> None:
        args.write(Path(directory))

    def restore(self, directory: Any, args: RestoreTables) -> dict[str, Table]:
        return restore_tables(Path(directory), args.store, args.mesh)


@ocp.args.register_with_handler(TablesHandler, for_save=True)
@dataclass
class SaveTables(ocp.args.CheckpointArgs):
    store: MemoryStore
    mesh: Mesh
    tables: dict[str, Table]

    def write(self, directory: Path) -> None:
        save_tables(directory, self.store, self.mesh, self.tables)


@ocp.args.register_with_handler(TablesHandler, for_save=True)
@dataclass
class WriteTables(ocp.args.CheckpointArgs):
    """Tables without a store: `write` writes them into the folder (interop/runs.py)."""

    write: Callable[[Path], None]


@ocp.args.register_with_handler(TablesHandler, for_restore=True)
@dataclass
class RestoreTables(ocp.args.CheckpointArgs):
    store: MemoryStore
    mesh: Mesh
