"""Tables in NumPy arrays of the Python process: in memory, or in memory-mapped files that may be larger than memory.

One array holds the rows of all shards that this process feeds (the addressable devices of the mesh, in the mesh's
order), one after the other: A shards of R rows are [A * R, ...], and shard j is the slice [j * R, (j + 1) * R). `take`
and `put` see one such slice. NumPy releases the interpreter lock in the functions that they call, and a page fault does
too, so several threads share the rows of a large batch.

The files are `<mmap_dir>/process-<index>/layer-<id>/rows.bin`, `slots.<name>.bin` and `uses.bin`. They are scratch: a
run makes them again, from its seed or its checkpoint. They start sparse. If other programs fill the disk after the
check at the start, the run ends with SIGBUS.

Legend: A shards of this process, R local rows of a shard, U rows of a batch.
"""

from __future__ import annotations

import functools
import gc
import math
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.config import ConfigError, MemoryConfig, require
from engram_jax.memory.placements.base import Placement
from engram_jax.memory.placements.host import available_host_bytes
from engram_jax.memory.table import TableState

PART_ROWS = 4096
"""Rows that one thread gathers or scatters at a time."""


@dataclass(frozen=True)
class NumpyPlacement(Placement):
    """Every shard in NumPy arrays of the process that feeds its device."""

    mmap_dir: str = ""
    """Folder for memory-mapped files. Empty: the arrays lie in memory."""
    in_program = False
    serving_placement = "host"

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> NumpyPlacement:
        return cls(config.mmap_dir)

    @property
    def folder(self) -> str:
        return self.mmap_dir

    def allocate(self, num_rows: int, like: TableState) -> TableState:
        return self.allocate_tables({"table": num_rows}, 1, like)["table"][0]

    def allocate_tables(
        self, num_rows: Mapping[str, int], shards: int, like: TableState
    ) -> dict[str, list[TableState]]:
        """Zeros for several tables; their shards are slices of common arrays. Refused as a whole if they do not fit.

        Raises:
          ConfigError: memory or disk is too small, or `mmap_dir` is used by another run or cannot be written to.
        """
        whole = self._allocate({name: shards * rows for name, rows in num_rows.items()}, like)
        return {name: _slices(whole[name], rows) for name, rows in num_rows.items()}

    def _allocate(self, num_rows: Mapping[str, int], like: TableState) -> dict[str, TableState]:
        row_bytes = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        needed = sum(num_rows.values()) * row_bytes
        if not self.mmap_dir:
            _check_memory(needed)
            return {name: jax.tree.map(lambda x, n=n: _zeros(n, x), like) for name, n in num_rows.items()}
        folder = Path(self.mmap_dir).expanduser() / f"process-{jax.process_index()}"
        try:
            lock = _FolderLock(folder)
            _check_disk(folder, needed)
            for old in folder.glob("*/*.bin"):
                old.unlink()  # not truncated: an array that is still in use must not lose its pages
            return {name: _mapped_zeros(folder / name, n, like, lock) for name, n in num_rows.items()}
        except OSError as error:
            raise ConfigError(f"memory.mmap_dir={self.mmap_dir}: {error}. Choose a folder on a local disk.") from error

    def take(self, table: TableState, ids_U: np.ndarray) -> TableState:
        """The rows in new arrays: a device may read what it is given at any later time."""
        count = int(np.searchsorted(ids_U, len(table.uses)))
        batch = jax.tree.map(lambda x: np.empty((len(ids_U), *x.shape[1:]), x.dtype), table)
        pairs = list(zip(jax.tree.leaves(table), jax.tree.leaves(batch), strict=True))

        def rows(part: slice) -> None:
            for array_R, out_U in pairs:
                np.take(array_R, ids_U[part], axis=0, out=out_U[part], mode="clip")  # other modes copy `out`

        _in_parts(rows, count)
        for _, out_U in pairs:
            out_U[count:] = 0
        return batch

    def put(self, table: TableState, ids_U: np.ndarray, batch: TableState) -> TableState:
        """The same table, written in place."""
        count = int(np.searchsorted(ids_U, len(table.uses)))
        pairs = [
            (_rows_as_items(array_R), _rows_as_items(np.asarray(new_U)))
            for array_R, new_U in zip(jax.tree.leaves(table), jax.tree.leaves(batch), strict=True)
        ]

        def rows(part: slice) -> None:
            for items_R, new_U in pairs:
                np.put(items_R, ids_U[part], new_U[part], mode="clip")

        _in_parts(rows, count)
        return table

    def put_range(self, table: TableState, start: int, batch: TableState) -> None:
        for array_R, new_U in zip(jax.tree.leaves(table), jax.tree.leaves(batch), strict=True):
            place = array_R[start : start + len(new_U)]
            new_U = np.asarray(new_U)[: len(place)]
            if np.any(new_U) or np.any(place):  # files stay sparse where zeros would replace zeros
                place[...] = new_U


# --- rows ---


def _slices(table: TableState, rows: int) -> list[TableState]:
    """Views of a table's shards, of `rows` rows each."""
    starts = range(0, len(table.uses), rows)
    return [jax.tree.map(lambda x, start=start: x[start : start + rows], table) for start in starts]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="memory-rows")


def _in_parts(function: Callable[[slice], None], count: int) -> None:
    """Calls `function` with slices that make up 0 .. count; several slices go to several threads."""
    parts = [slice(start, min(start + PART_ROWS, count)) for start in range(0, count, PART_ROWS)]
    list(_pool().map(function, parts) if len(parts) > 1 else map(function, parts))


def _rows_as_items(array_U: np.ndarray) -> np.ndarray:
    """A view [U] in which a row is one opaque item: `np.put` of items is twice as fast as assigning to `array[ids]`."""
    array_U = np.ascontiguousarray(array_U)
    row_bytes = array_U.itemsize * math.prod(array_U.shape[1:])
    return array_U.reshape(len(array_U), -1).view(f"V{row_bytes}")[:, 0]


# --- room ---


def _zeros(num_rows: int, like: Any) -> np.ndarray:
    return np.zeros((num_rows, *like.shape[1:]), like.dtype)


def _check_memory(needed: int) -> None:
    available = available_host_bytes()
    require(
        available is None or needed <= available,
        f"memory.placement=numpy needs {needed / 1e9:.2f} GB of memory for the tables and what the optimizer keeps "
        f"for their rows, and {(available or 0) / 1e9:.2f} GB are available: set memory.mmap_dir to a folder on a disk "
        "with that much room, lower engram_vocab_size, or choose another memory.placement.",
    )


def _check_disk(folder: Path, needed: int) -> None:
    freed = sum(old.stat().st_blocks * 512 for old in folder.glob("*/*.bin"))
    available = shutil.disk_usage(folder).free + freed
    require(
        needed <= available,
        f"memory.mmap_dir={folder.parent} has room for {available / 1e9:.2f} GB, and the tables with what the "
        f"optimizer keeps for their rows take {needed / 1e9:.2f} GB: name a folder on a larger disk, lower "
        "engram_vocab_size, or choose another memory.placement.",
    )


# --- files ---


class _FolderLock:
    """A lock on a folder. It is released with the last array that is mapped to the folder's files, or the process."""

    def __init__(self, folder: Path):
        import fcntl  # POSIX only; tables in memory need no lock

        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            gc.collect()  # a reference cycle may keep tables of an earlier run of this process
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(file, 32, 0).decode() or "unknown"
                raise ConfigError(
                    f"memory.mmap_dir={folder.parent} holds the tables of a run that is still going (process {owner}): "
                    "name another folder, or end that run."
                ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)


class _Mapping(mmap.mmap):
    lock: _FolderLock


def _mapped_zeros(folder: Path, num_rows: int, like: TableState, lock: _FolderLock) -> TableState:
    folder.mkdir(exist_ok=True)

    def zeros(path: tuple, leaf: Any) -> np.ndarray:
        shape = (num_rows, *leaf.shape[1:])
        size = math.prod(shape) * leaf.dtype.itemsize
        with open(folder / f"{jax.tree_util.keystr(path, simple=True, separator='.')}.bin", "w+b") as file:
            file.truncate(size)
            mapping = _Mapping(file.fileno(), size)
        mapping.lock = lock
        if hasattr(mmap, "MADV_RANDOM"):
            mapping.madvise(mmap.MADV_RANDOM)  # otherwise the kernel reads 30 further pages for each row
        return np.ndarray(shape, leaf.dtype, buffer=mapping)

    return jax.tree_util.tree_map_with_path(zeros, like)
