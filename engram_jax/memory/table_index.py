"""The index of a shard's files: its content, how it is written, and which indexes are refused.

The index is written last, renamed into place, and has a checksum over itself. A shard without a valid index does not
exist for readers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from engram_jax.memory.table import TableLayout

FORMAT = "engram_jax table 1"
INDEX_NAME = re.compile(r"(\d{5,})-of-(\d{5,})\.json")
REMEDY = "Restore an earlier checkpoint, or copy this one again from an undamaged source."


class TableFileError(ValueError):
    """Files that hold another table, are incomplete, or are damaged; the message names the file and the remedy."""


@dataclass(frozen=True)
class Field:
    """The array that one file holds for each row: its `row_shape` (() for a number) and dtype by name ("bfloat16")."""

    row_shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, row_shape: Iterable[int], dtype: DTypeLike) -> Field:
        """A field of any dtype that NumPy knows by name, also those of ml_dtypes (bfloat16, float8_*)."""
        return cls(tuple(row_shape), np.dtype(dtype).name)

    @property
    def np_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)  # importing jax (in table.py) registers ml_dtypes' names

    @property
    def row_bytes(self) -> int:
        return self.np_dtype.itemsize * math.prod(self.row_shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.row_shape))}]"


@dataclass(frozen=True)
class Index:
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
        return json.dumps({"table": table, "crc32": json_crc32(table)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Rebuilds `to_json`'s output; raises ValueError, KeyError or TypeError for any other text."""
        whole = json.loads(text)
        table = whole["table"]
        if whole["crc32"] != json_crc32(table) or table["format"] != FORMAT:
            raise ValueError(f"it is damaged, or not of format {FORMAT!r}")
        layout = TableLayout(tuple(table["layout"]["head_rows"]), table["layout"]["shards"])
        fields = {name: Field(tuple(f["row_shape"]), f["dtype"]) for name, f in table["fields"].items()}
        return cls(layout, table["shard"], fields, tuple(table["chunk_rows"]), table["crc32"])


def file_name(layout: TableLayout, shard: int, name: str) -> str:
    return f"{shard:05d}-of-{layout.shards:05d}.{name}"


def load_indexes(directory: Path) -> list[Index]:
    """The indexes of all shards, in order. Raises TableFileError if one is missing or belongs to another table."""
    found = [match for path in directory.glob("*.json") if (match := INDEX_NAME.fullmatch(path.name))]
    if not found:
        raise TableFileError(f"{directory} holds no table: it has no index of a finished shard. {REMEDY}")
    counts = {int(match[2]) for match in found}
    if len(counts) > 1:
        raise TableFileError(f"{directory} holds parts of several tables, with {sorted(counts)} shards. {REMEDY}")
    shards = counts.pop()
    if missing := sorted(set(range(shards)) - {int(match[1]) for match in found}):
        raise TableFileError(
            f"{directory} is incomplete: {len(missing)} of its {shards} shards have no index, the first is shard "
            f"{missing[0]}. {REMEDY}"
        )
    indexes = []
    for shard in range(shards):
        path = directory / file_name(TableLayout((), shards), shard, "json")
        try:
            index = Index.from_json(path.read_text())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableFileError(f"{path} can't be read as a shard's index: {error}. {REMEDY}") from error
        first = indexes[0] if indexes else index
        if (index.shard, index.layout.shards) != (shard, shards) or index.layout != first.layout:
            raise TableFileError(
                f"{path} describes shard {index.shard} of {index.layout}, which differs from its name or from "
                f"the other shards. {REMEDY}"
            )
        if index.fields != first.fields:
            raise TableFileError(f"{path} has other fields than the other shards. {REMEDY}")
        indexes.append(index)
    return indexes


def json_crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, as write, read and fsync raise it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_all(file: FileIO, data: memoryview | bytes) -> None:
    data = memoryview(data)
    while data:  # one call writes at most 2 GiB
        data = data[file.write(data) :]


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file atomically: after a crash it is complete or absent."""
    part = path.with_name(path.name + ".part")
    with naming(part), FileIO(part, "wb") as file:
        write_all(file, data)
        os.fsync(file.fileno())
    os.replace(part, path)
    with naming(path.parent):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
