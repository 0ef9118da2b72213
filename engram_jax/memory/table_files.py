"""A table on disk: written in parts by the owners of its shards, read in parts by the owners of any other shards.

One folder holds one table. Shard 3 of 8 is one raw file per field (`00003-of-00008.rows.bin`: its local rows in order,
C-contiguous, little-endian) and one index `00003-of-00008.json`, written last and renamed into place, with the layout,
the fields and a CRC-32 of every chunk. A table is whole when the index of every shard is there. A reader translates
local rows of its own layout into logical rows and these into local rows of the files' layout, so the bytes are moved
and never computed with: what is read equals what was written, bit for bit. NumPy only.

Padding rows are in the files (a shard is written as it lies in memory) but nobody reads them.

Legend: S shards, R local rows of one shard (`TableLayout.rows_per_shard`), N rows of one call.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from io import FileIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike

from engram_jax.memory.table import TableLayout

FORMAT = "engram_jax table 1"
CHUNK_BYTES = 32 * 2**20
"""What one chunk should hold, all fields together: large enough to stream, small beside a host's memory."""
SCRATCH_BYTES = 2**20
INDEX_NAME = re.compile(r"(\d{5,})-of-(\d{5,})\.json")


class TableFileError(ValueError):
    """Files that are not the table asked for, not whole, or damaged; the message names the file and the remedy."""


@dataclass(frozen=True)
class Field:
    """What one file holds for each row: an array of `row_shape` (() for a number), dtype by name ("bfloat16")."""

    row_shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, row_shape: Iterable[int], dtype: DTypeLike) -> Field:
        """A field of any dtype NumPy knows by name, ml_dtypes' (bfloat16, float8_*) included."""
        return cls(tuple(row_shape), np.dtype(dtype).name)

    @property
    def np_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)  # knows ml_dtypes' names because jax is imported (by table.py)

    @property
    def row_bytes(self) -> int:
        return self.np_dtype.itemsize * math.prod(self.row_shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.row_shape))}]"


def rows_per_chunk(fields: Mapping[str, Field]) -> int:
    """Local rows to give to one `ShardWriter.write`: CHUNK_BYTES of all fields together, one row at least."""
    return max(1, CHUNK_BYTES // sum(field.row_bytes for field in fields.values()))


class ShardWriter:
    """Writes one shard of a table into `directory`, in chunks of local rows; a chunk is the unit of the checksums.

    A context manager: leaving it closes the shard, leaving it by an exception aborts it. Without `close` the shard does
    not exist for a reader, whatever is on the disk. A shard already there is not overwritten (TableFileError): a folder
    holds one table, so parts of an older one can't be taken for its own.
    """

    def __init__(self, directory: str | Path, layout: TableLayout, shard: int, fields: Mapping[str, Field]) -> None:
        if not 0 <= shard < layout.shards:
            raise ValueError(f"Shard {shard} is not one of {layout.shards}.")
        self.directory, self.layout, self.shard, self.fields = Path(directory), layout, shard, dict(fields)
        self._chunk_rows: list[int] = []
        self._crc32: dict[str, list[int]] = {name: [] for name in fields}
        self.directory.mkdir(parents=True, exist_ok=True)
        if old := sorted(self.directory.glob(_file_name(layout, shard, "*"))):
            raise TableFileError(f"{old[0]} is already there: save into a new folder, or delete this one first.")
        self._open = {name: FileIO(self.directory / _file_name(layout, shard, f"{name}.bin"), "xb") for name in fields}

    @property
    def rows_written(self) -> int:
        """Where the next chunk must start."""
        return sum(self._chunk_rows)

    def write(self, local_start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The next chunk: rows [local_start, local_start + N) of every field, each [N, *row_shape] of its own dtype.

        ValueError for what is not the next chunk of this shard; OSError, with the file's name, if the disk refuses
        (the shard is then aborted).
        """
        wanted = {name: (field.row_shape, field.np_dtype) for name, field in self.fields.items()}
        given = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        counts = {len(array) for array in arrays.values()}
        if given != wanted or len(counts) != 1:
            raise ValueError(f"A chunk is equally many rows of {wanted}, not {counts} of {given}.")
        (count,) = counts
        if local_start != self.rows_written or not 0 < count <= self.layout.rows_per_shard - local_start:
            raise ValueError(
                f"Rows [{local_start}, {local_start + count}) of shard {self.shard} are not the next ones: chunks are "
                f"written in order, this one from {self.rows_written} to {self.layout.rows_per_shard} at the most."
            )
        with self._or_abort():
            for name, file in self._open.items():
                data = _bytes(np.ascontiguousarray(arrays[name]))
                self._crc32[name].append(zlib.crc32(data))
                with _naming(file.name):
                    _write_all(file, data)
        self._chunk_rows.append(count)

    def close(self) -> None:
        """Flushes the files to the disk, then puts the index beside them. ValueError if rows are missing."""
        with self._or_abort():
            if self.rows_written != self.layout.rows_per_shard:
                raise ValueError(
                    f"Shard {self.shard} has {self.rows_written} of its {self.layout.rows_per_shard} rows, padding "
                    "included: it can't be closed as a whole one."
                )
            for file in self._open.values():
                with _naming(file.name):
                    os.fsync(file.fileno())
                    file.close()
            index = _Index(self.layout, self.shard, self.fields, tuple(self._chunk_rows), self._crc32)
            _write_durably(self.directory / _file_name(self.layout, self.shard, "json"), index.to_json().encode())
        self._open = {}

    def abort(self) -> None:
        """Gives the shard up and deletes its files (a full disk gets its space back)."""
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
    """Reads a whole table, in the parts of any layout of the same heads. Opening it reads the indexes only.

    TableFileError if the folder holds no table, a part of one, parts of several, or files of the wrong size.
    Holds no open files and no rows; a call needs the memory of its result and SCRATCH_BYTES.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._indexes = _load_indexes(self.directory)
        self.layout, self.fields = self._indexes[0].layout, self._indexes[0].fields
        self._verified: set[tuple[int, str, int]] = set()
        for shard in range(self.layout.shards):
            for name, field in self.fields.items():
                path, size = self._path(shard, name), self.layout.rows_per_shard * field.row_bytes
                if not path.is_file():
                    raise TableFileError(f"{path} is missing. {_REMEDY}")
                if (found := path.stat().st_size) != size:
                    raise TableFileError(f"{path} has {found:,} bytes where {size:,} were written. {_REMEDY}")

    def _path(self, shard: int, name: str) -> Path:
        return self.directory / _file_name(self.layout, shard, f"{name}.bin")

    def check(self, layout: TableLayout, fields: Mapping[str, Field]) -> None:
        """TableFileError unless the files hold these fields for a table of these heads, on whatever shards."""
        self._check_heads(layout)
        problems = [f"no field {name!r}" for name in fields if name not in self.fields]
        problems += [f"a field {name!r} nobody asked for" for name in self.fields if name not in fields]
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
        """Local rows [local_start, local_start + count) of a shard of `layout`, whose heads are this table's.

        Each field (all, or those in `names`) as [count, *row_shape] of its own dtype; padding rows are zero. A chunk's
        checksum is verified when a reader first touches it. Ascending calls read every file from start to end.
        TableFileError for damage, with the file, the chunk and its logical rows; OSError with the file's name.
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
        """Copies the piece's bytes of one field into `out`, verifying the chunks that are touched first."""
        index, width = self._indexes[piece.shard], self.fields[name].row_bytes
        path, row, end = self._path(piece.shard, name), piece.local, piece.local + piece.length
        with _naming(path), FileIO(path, "rb") as file:
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
                        f"{_logical_rows(index.layout, piece.shard, first, last)}): its checksum differs. {_REMEDY}"
                    )
                self._verified.add((piece.shard, name, chunk))
                row = min(end, last)


_REMEDY = "Restore an earlier checkpoint, or copy this one again from where it is sound."


@dataclass(frozen=True)
class _Index:
    """One shard's index: chunk i is [chunk_starts[i], chunk_starts[i + 1]), checksums are per field and chunk."""

    layout: TableLayout
    shard: int
    fields: dict[str, Field]
    chunk_rows: tuple[int, ...]
    crc32: dict[str, list[int]]

    @cached_property
    def chunk_starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.chunk_rows, initial=0))

    def to_json(self) -> str:
        table = {"format": FORMAT} | asdict(self)
        return json.dumps({"table": table, "crc32": _json_crc32(table)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> _Index:
        """ValueError, KeyError or TypeError if the text is not what `to_json` wrote."""
        whole = json.loads(text)
        table = whole["table"]
        if whole["crc32"] != _json_crc32(table) or table["format"] != FORMAT:
            raise ValueError(f"it is damaged, or not of format {FORMAT!r}")
        layout = TableLayout(tuple(table["layout"]["head_rows"]), table["layout"]["shards"])
        fields = {name: Field(tuple(f["row_shape"]), f["dtype"]) for name, f in table["fields"].items()}
        return cls(layout, table["shard"], fields, tuple(table["chunk_rows"]), table["crc32"])


class _Piece(NamedTuple):
    """Consecutive rows of one head in one shard's file."""

    shard: int
    local: int
    length: int


def _pieces(layout: TableLayout, logical: int, length: int) -> Iterator[_Piece]:
    """Where `length` logical rows of one head lie, in order."""
    head = bisect_right(layout.offsets, logical) - 1
    piece, start = layout.pieces[head], layout.starts[head]
    in_head, end = logical - layout.offsets[head], logical - layout.offsets[head] + length
    while in_head < end:
        shard, local = divmod(in_head, piece)
        count = min(piece - local, end - in_head)
        yield _Piece(shard, start + local, count)
        in_head += count


def _logical_rows(layout: TableLayout, shard: int, first: int, last: int) -> str:
    """The logical rows of a shard's local rows [first, last), for a message: the first few runs of them."""
    runs = [
        f"{logical + max(first - local, 0)}..{logical + min(last - local, length) - 1}"
        for local, logical, length in layout.runs(shard)
        if local < last and first < local + length
    ]
    return f"logical rows {', '.join(runs[:3])}{', ...' if len(runs) > 3 else ''}" if runs else "padding only"


def _file_name(layout: TableLayout, shard: int, name: str) -> str:
    return f"{shard:05d}-of-{layout.shards:05d}.{name}"


def _load_indexes(directory: Path) -> list[_Index]:
    """The indexes of all shards, in order; TableFileError unless they are all there and of one table."""
    found = [match for path in directory.glob("*.json") if (match := INDEX_NAME.fullmatch(path.name))]
    if not found:
        raise TableFileError(f"{directory} holds no table: no shard in it was ever finished. {_REMEDY}")
    counts = {int(match[2]) for match in found}
    if len(counts) > 1:
        raise TableFileError(f"{directory} holds parts of several tables, of {sorted(counts)} shards. {_REMEDY}")
    shards = counts.pop()
    if missing := sorted(set(range(shards)) - {int(match[1]) for match in found}):
        raise TableFileError(
            f"{directory} is half a table: {len(missing)} of its {shards} shards, the first of them {missing[0]}, were "
            f"not finished (no index). {_REMEDY}"
        )
    indexes = []
    for shard in range(shards):
        path = directory / _file_name(TableLayout((), shards), shard, "json")
        try:
            index = _Index.from_json(path.read_text())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableFileError(f"{path} can't be read as a shard's index: {error}. {_REMEDY}") from error
        first = indexes[0] if indexes else index
        if (index.shard, index.layout.shards) != (shard, shards) or index.layout != first.layout:
            raise TableFileError(
                f"{path} is of shard {index.shard} of {index.layout}: not the one its name says, or not of the table "
                f"beside it. {_REMEDY}"
            )
        if index.fields != first.fields:
            raise TableFileError(f"{path} has other fields than the shards beside it. {_REMEDY}")
        indexes.append(index)
    return indexes


def _json_crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _bytes(array: np.ndarray) -> memoryview:
    """A contiguous array's own bytes (ml_dtypes' arrays have no buffer of their own)."""
    return array.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the file into an OSError that does not say which it was, as those of write, read and fsync don't."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _write_all(file: FileIO, data: memoryview | bytes) -> None:
    data = memoryview(data)
    while data:  # one write moves 2 GiB at the most
        data = data[file.write(data) :]


def _write_durably(path: Path, data: bytes) -> None:
    """A file that is on the disk whole or not there at all."""
    part = path.with_name(path.name + ".part")
    with _naming(part), FileIO(part, "wb") as file:
        _write_all(file, data)
        os.fsync(file.fileno())
    os.replace(part, path)
    with _naming(path.parent):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_into(file: FileIO, out: memoryview) -> bool:
    """Fills `out` from where the file stands; False if it ends before."""
    while out:
        if not (count := file.readinto(out)):
            return False
        out = out[count:]
    return True


def _skip(file: FileIO, size: int, crc: int) -> int:
    """The checksum continued over the next `size` bytes; over fewer, and so another, if the file ends before."""
    scratch = memoryview(bytearray(min(size, SCRATCH_BYTES)))
    while size:
        part = scratch[: min(size, len(scratch))]
        if not _read_into(file, part):
            break
        crc, size = zlib.crc32(part, crc), size - len(part)
    return crc
