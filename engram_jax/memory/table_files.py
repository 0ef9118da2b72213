"""A table on disk: each process writes its shards, and any other number of shards can read them. NumPy only.

One folder holds one table. Shard 3 of 8 is one raw file per field (`00003-of-00008.rows.bin`: its local rows in order,
C-contiguous, little-endian) and one index, `00003-of-00008.json`, with the layout, the fields and a CRC-32 of every
chunk. The index is written last and renamed into place: a table is whole when every shard has its index. A reader
converts local rows of its own layout to logical rows, and those to local rows of the files. Bytes are copied and never
computed with: a reader gets what was written, bit for bit.

The files contain padding rows, as shards do in memory; no reader uses them.

Legend: S shards, R local rows of one shard (`TableLayout.rows_per_shard`), N rows of one call.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from engram_jax.memory.table import TableLayout
from engram_jax.memory.table_index import (
    REMEDY,
    Field,
    Index,
    TableFileError,
    file_name,
    load_indexes,
    naming,
    write_all,
    write_durably,
)

CHUNK_BYTES = 32 * 2**20
"""Size of a chunk, all fields together: large enough to stream, small beside a host's memory."""
SCRATCH_BYTES = 2**20
"""Memory for computing the checksum of bytes that are not read into a result."""


def rows_per_chunk(fields: Mapping[str, Field]) -> int:
    """Local rows for one `ShardWriter.write`: CHUNK_BYTES of all fields together, at least one row."""
    return max(1, CHUNK_BYTES // sum(field.row_bytes for field in fields.values()))


class ShardWriter:
    """Writes one shard of a table into `directory`, in chunks of local rows; every chunk has its own checksum.

    A context manager: leaving it closes the shard, and leaving it by an exception aborts the shard. Readers see a shard
    only after `close`. Existing shards are not overwritten (TableFileError), so that a folder never mixes two tables.
    """

    def __init__(self, directory: str | Path, layout: TableLayout, shard: int, fields: Mapping[str, Field]) -> None:
        if not 0 <= shard < layout.shards:
            raise ValueError(f"Shard {shard} is not one of {layout.shards}.")
        self.directory, self.layout, self.shard, self.fields = Path(directory), layout, shard, dict(fields)
        self._chunk_rows: list[int] = []
        self._crc32: dict[str, list[int]] = {name: [] for name in fields}
        self.directory.mkdir(parents=True, exist_ok=True)
        if old := sorted(self.directory.glob(file_name(layout, shard, "*"))):
            raise TableFileError(f"{old[0]} is already there: save into a new folder, or delete this one first.")
        self._open = {name: FileIO(self.directory / file_name(layout, shard, f"{name}.bin"), "xb") for name in fields}

    @property
    def rows_written(self) -> int:
        """Local rows written so far: the next chunk starts here."""
        return sum(self._chunk_rows)

    def write(self, local_start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the next chunk: rows [local_start, local_start + N) of every field, [N, *row_shape] in its dtype.

        Raises:
          ValueError: the arrays are not the next chunk of this shard.
          OSError: the disk refuses the write; names the file. The shard is then aborted.
        """
        wanted = {name: (field.row_shape, field.np_dtype) for name, field in self.fields.items()}
        given = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        counts = {len(array) for array in arrays.values()}
        if given != wanted or len(counts) != 1:
            raise ValueError(
                f"A chunk must have equally many rows of each field {wanted}; it has {counts} rows of {given}."
            )
        (count,) = counts
        if local_start != self.rows_written or not 0 < count <= self.layout.rows_per_shard - local_start:
            raise ValueError(
                f"Rows [{local_start}, {local_start + count}) of shard {self.shard} are not the next rows: the next "
                f"chunk must start at {self.rows_written} and end by {self.layout.rows_per_shard}."
            )
        with self._or_abort():
            for name, file in self._open.items():
                data = _bytes(np.ascontiguousarray(arrays[name]))
                self._crc32[name].append(zlib.crc32(data))
                with naming(file.name):
                    write_all(file, data)
        self._chunk_rows.append(count)

    def close(self) -> None:
        """Flushes the files to the disk, then writes the index. Raises ValueError if rows are missing."""
        with self._or_abort():
            if self.rows_written != self.layout.rows_per_shard:
                raise ValueError(
                    f"Shard {self.shard} has {self.rows_written} of its {self.layout.rows_per_shard} rows, padding "
                    "included: it can't be closed as a whole one."
                )
            for file in self._open.values():
                with naming(file.name):
                    os.fsync(file.fileno())
                    file.close()
            index = Index(self.layout, self.shard, self.fields, tuple(self._chunk_rows), self._crc32)
            write_durably(self.directory / file_name(self.layout, self.shard, "json"), index.to_json().encode())
        self._open = {}

    def abort(self) -> None:
        """Deletes the files of the unfinished shard, which gives a full disk its space back."""
        for file in self._open.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)
        self._open = {}

    @contextlib.contextmanager
    def _or_abort(self) -> Iterator[None]:
        if not self._open:
            raise ValueError(f"Shard {self.shard} is closed or was aborted.")
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class TableReader:
    """Reads a whole table, for any layout of the same heads. Opening it reads only the indexes.

    It holds no open files and no rows; a call needs the memory of its result and SCRATCH_BYTES.

    Raises:
      TableFileError: the folder holds no table, an incomplete table, parts of several tables, or files of wrong sizes.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._indexes = load_indexes(self.directory)
        self.layout, self.fields = self._indexes[0].layout, self._indexes[0].fields
        self._verified: set[tuple[int, str, int]] = set()
        for shard in range(self.layout.shards):
            for name, field in self.fields.items():
                path, size = self._path(shard, name), self.layout.rows_per_shard * field.row_bytes
                if not path.is_file():
                    raise TableFileError(f"{path} is missing. {REMEDY}")
                if (found := path.stat().st_size) != size:
                    raise TableFileError(f"{path} has {found:,} bytes where {size:,} were written. {REMEDY}")

    def _path(self, shard: int, name: str) -> Path:
        return self.directory / file_name(self.layout, shard, f"{name}.bin")

    def check(self, layout: TableLayout, fields: Mapping[str, Field]) -> None:
        """Raises TableFileError unless the files hold these fields for a table of these heads, on any shards."""
        self._check_heads(layout)
        problems = [f"no field {name!r}" for name in fields if name not in self.fields]
        problems += [f"an unexpected field {name!r}" for name in self.fields if name not in fields]
        problems += [
            f"{name!r} as {self.fields[name]} instead of {field}"
            for name, field in fields.items()
            if self.fields.get(name, field) != field
        ]
        if problems:
            raise TableFileError(
                f"{self.directory} holds {', '.join(problems)}. Restore with the head dim, the table dtypes and "
                "the row optimizer that the run was saved with."
            )

    def _check_heads(self, layout: TableLayout) -> None:
        ours, theirs = layout.head_rows, self.layout.head_rows
        if ours == theirs:
            return
        if len(ours) != len(theirs):
            difference = f"{len(theirs)} heads instead of {len(ours)}"
        else:
            head = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            difference = f"{theirs[head]:,} rows in head {head} instead of {ours[head]:,}"
        raise TableFileError(
            f"{self.directory} holds a table with {difference}. Rows are addressed modulo the head sizes, so in a "
            "table of other sizes every row would be wrong: restore with the engram_vocab_size, engram_n_heads, "
            "engram_max_ngram_size, engram_layer_ids and engram_seed that the run was saved with; a table can't grow."
        )

    def read(
        self, layout: TableLayout, shard: int, local_start: int, count: int, names: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Local rows [local_start, local_start + count) of a shard of `layout`, which has the heads of this table.

        Returns each field (all, or those in `names`) as [count, *row_shape] in its dtype; padding rows are zero. The
        checksum of a chunk is verified when this reader first reads from it. Ascending calls read every file from
        start to end.

        Raises:
          TableFileError: a chunk is damaged; names the file, the chunk and its logical rows.
          OSError: a file cannot be read; names the file.
        """
        self._check_heads(layout)
        if not (0 <= shard < layout.shards and 0 <= local_start <= local_start + count <= layout.rows_per_shard):
            rows = f"[{local_start}, {local_start + count}) of shard {shard}"
            raise ValueError(f"There are no rows {rows}: {layout.shards} shards have {layout.rows_per_shard} each.")
        names = self.fields if names is None else names
        arrays = {n: np.zeros((count, *self.fields[n].row_shape), self.fields[n].np_dtype) for n in names}
        for local, logical, length in layout.runs(shard):
            first, last = max(local, local_start), min(local + length, local_start + count)
            if first >= last:
                continue
            to = first - local_start
            for piece in _pieces(self.layout, logical + first - local, last - first):
                for name, array in arrays.items():
                    self._fill(piece, name, _bytes(array[to : to + piece.length]))
                to += piece.length
        return arrays

    def _fill(self, piece: _Piece, name: str, out: memoryview) -> None:
        """Copies the piece's bytes of one field into `out`, and verifies chunks that are read for the first time."""
        index, width = self._indexes[piece.shard], self.fields[name].row_bytes
        path, row, end = self._path(piece.shard, name), piece.local, piece.local + piece.length
        with naming(path), FileIO(path, "rb") as file:
            while row < end:
                chunk = bisect_right(index.chunk_starts, row) - 1
                first, last = index.chunk_starts[chunk : chunk + 2]
                wanted, out = out[: (min(end, last) - row) * width], out[(min(end, last) - row) * width :]
                if (piece.shard, name, chunk) in self._verified:
                    file.seek(row * width)
                    whole = _read_into(file, wanted)
                else:
                    file.seek(first * width)
                    crc = _skip(file, (row - first) * width, 0)
                    here = _read_into(file, wanted)
                    crc = _skip(file, (last - min(end, last)) * width, zlib.crc32(wanted, crc))
                    whole = here and crc == index.crc32[name][chunk]
                if not whole:
                    raise TableFileError(
                        f"{path} is damaged in chunk {chunk} (local rows {first}..{last - 1}, "
                        f"{_logical_rows(index.layout, piece.shard, first, last)}): its checksum differs. {REMEDY}"
                    )
                self._verified.add((piece.shard, name, chunk))
                row = min(end, last)


class _Piece(NamedTuple):
    """Consecutive rows of one head in one shard's file."""

    shard: int
    local: int
    length: int


def _pieces(layout: TableLayout, logical: int, length: int) -> Iterator[_Piece]:
    """The pieces that hold `length` logical rows of one head, in order."""
    head = bisect_right(layout.offsets, logical) - 1
    piece, start = layout.pieces[head], layout.starts[head]
    in_head, end = logical - layout.offsets[head], logical - layout.offsets[head] + length
    while in_head < end:
        shard, local = divmod(in_head, piece)
        count = min(piece - local, end - in_head)
        yield _Piece(shard, start + local, count)
        in_head += count


def _logical_rows(layout: TableLayout, shard: int, first: int, last: int) -> str:
    """The logical rows of a shard's local rows [first, last) as text: the first few runs."""
    runs = [
        f"{logical + max(first - local, 0)}..{logical + min(last - local, length) - 1}"
        for local, logical, length in layout.runs(shard)
        if local < last and first < local + length
    ]
    return f"logical rows {', '.join(runs[:3])}{', ...' if len(runs) > 3 else ''}" if runs else "padding only"


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy (ml_dtypes' arrays do not export their buffer)."""
    return array.reshape(-1).view(np.uint8).data


def _read_into(file: FileIO, out: memoryview) -> bool:
    """Fills `out` from the file's current position; False if the file is too short."""
    while out:
        if not (count := file.readinto(out)):
            return False
        out = out[count:]
    return True


def _skip(file: FileIO, size: int, crc: int) -> int:
    """The checksum continued over the next `size` bytes; wrong if the file is too short."""
    scratch = memoryview(bytearray(min(size, SCRATCH_BYTES)))
    while size:
        part = scratch[: min(size, len(scratch))]
        if not _read_into(file, part):
            break
        crc, size = zlib.crc32(part, crc), size - len(part)
    return crc
