"""Hugging Face's folder of safetensors files: written without holding a tensor, read in runs of rows.

    model-00001-of-00003.safetensors ...       8 bytes with the header's size, the header (JSON), the tensors' bytes
    model.safetensors.index.json               which file holds which tensor

The safetensors library checks what is opened. The bytes are moved here, because it writes whole tensors from memory
only, and NumPy knows no 8-bit floats by the names it uses (0.8).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from engram_jax.config import ConfigError, require
from engram_jax.errors import RunError
from engram_jax.memory.table_index import naming, write_all

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Files hold about this much, one tensor at least: what Hugging Face's own writer takes."""
AGAIN = "Download or copy the folder again."

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(np.uint8),  # the scale's byte: memory/quantized.py
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder. Holds no bytes."""

    name: str
    file: Path
    dtype: str
    """The file's name for it: a key of DTYPES."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    def read(self) -> np.ndarray:
        """The whole tensor, in its own dtype."""
        return self._part(0, math.prod(self.shape)).reshape(self.shape)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows [start, start + count) along the first dim."""
        width = math.prod(self.shape[1:])
        return self._part(start * width, count * width).reshape(count, *self.shape[1:])

    def _part(self, start: int, count: int) -> np.ndarray:
        dtype = DTYPES[self.dtype]
        data = np.fromfile(self.file, np.uint8, count * dtype.itemsize, offset=self.offset + start * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise RunError(f"{self.file} ends within {self.name}: it changed while it was read. {AGAIN}")
        return data.view(dtype)


class Folder:
    """A folder's tensors, by name. Opening it reads the headers and checks that every file is whole.

    Raises:
      ConfigError: no folder, or no safetensors files in it.
      RunError: a file is missing, cut short or damaged; the message names the file and the first tensor it lacks.
    """

    def __init__(self, path: Path):
        self.path = path
        require(path.is_dir(), f"{path} is not a folder: give the one that holds the .safetensors files.")
        self.tensors: dict[str, Tensor] = {}
        files: dict[str, list[str]] = {}
        if (path / INDEX).exists():
            for name, file in _json(path / INDEX)["weight_map"].items():
                files.setdefault(file, []).append(name)
        else:
            files = {file.name: [] for file in sorted(path.glob("*.safetensors"))}
            if pieces := [name for name in files if "-of-" in name]:
                raise RunError(f"{path} has {pieces[0]} but no {INDEX}, which says what belongs together. {AGAIN}")
        require(bool(files), f"{path} holds no .safetensors file.")
        for file, expected in files.items():
            found = _tensors(path / file, expected)
            if missing := [name for name in expected if name not in found]:
                raise RunError(
                    f"{path / file} has no tensor {missing[0]}, which {INDEX} says it holds ({len(missing)} such "
                    f"tensors): the files are not of one checkpoint. {AGAIN}"
                )
            self.tensors |= found

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """The tensor of that name. Raises RunError, by file and name, if it is missing or has another shape."""
        if name not in self.tensors:
            raise RunError(f"{self.path} has no tensor {name}, which the model needs. {AGAIN}")
        tensor = self.tensors[name]
        if shape is not None and tensor.shape != tuple(shape):
            raise RunError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)} where config.json makes it {list(shape)}: the "
                "files and config.json are not of one checkpoint."
            )
        return tensor

    def config(self) -> dict[str, Any]:
        """The folder's config.json."""
        require((self.path / "config.json").exists(), f"{self.path} has no config.json. {AGAIN}")
        return _json(self.path / "config.json")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}): it may be cut short. {AGAIN}") from None


def _tensors(path: Path, expected: Sequence[str]) -> dict[str, Tensor]:
    first = f" ({expected[0]} and {len(expected) - 1} others)" if expected else ""
    if not path.exists():
        raise RunError(f"{path} is missing, with the tensors that {INDEX} puts into it{first}. {AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise RunError(f"{path} is a Git LFS pointer, not the tensors{first}: fetch them with git lfs pull.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(length) if length <= size - 8 else b""
    if not header:
        raise RunError(f"{path} has {size:,} bytes and ends within its header, before any tensor{first}. {AGAIN}")
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        base = 8 + length
        ends = {name: base + entry["data_offsets"][1] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} has no readable header. {AGAIN}") from None
    if cut := sorted((end, name) for name, end in ends.items() if end > size):
        raise RunError(
            f"{path} has {size:,} bytes where {max(ends.values()):,} belong: {cut[0][1]} is cut short"
            f"{f', and {len(cut) - 1} tensors after it are missing' if len(cut) > 1 else ''}. {AGAIN}"
        )
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise RunError(f"{path} is damaged: {error}. {AGAIN}") from None
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: {name} has dtype {entry['dtype']}; {', '.join(DTYPES)} can be read.")
    return {
        name: Tensor(name, path, entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


# --- writing ---


@dataclass(frozen=True)
class Source:
    """A tensor to be written: its bytes come in chunks, in order, when they are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name."""
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[NAMES[self.dtype]]).itemsize


def write(
    folder: Path, sources: Sequence[Source], texts: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes a new folder with the tensors, their index and `texts` (other files by name); it appears when it is whole.

    A tensor is never cut: one larger than `shard_bytes` has a file of its own.

    Raises:
      ConfigError: the folder is there already.
      RunError: the disk has no room.
    """
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} is there already: give a new folder, or delete that one.",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    total, free = sum(source.num_bytes for source in sources), shutil.disk_usage(folder.parent).free
    if total > free:
        raise RunError(f"{folder.parent} has {free / 1e9:.2f} GB free and the tensors take {total / 1e9:.2f} GB.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        shards = list(_shards(sources, shard_bytes))
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= {source.name: name for source in shard}
            _write_shard(part / name, shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        for name, text in {**texts, INDEX: json.dumps(index, indent=2) + "\n"}.items():
            (part / name).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [folder / name for name in sorted(set(weight_map.values()))]


def _shards(sources: Sequence[Source], shard_bytes: int) -> Iterator[list[Source]]:
    shard: list[Source] = []
    for source in sources:
        if shard and sum(s.num_bytes for s in shard) + source.num_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(source)
    if shard:
        yield shard


def _write_shard(path: Path, sources: Sequence[Source]) -> None:
    # Wide dtypes first: every tensor then starts at a multiple of its own width.
    sources = sorted(sources, key=lambda source: -DTYPES[NAMES[source.dtype]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for source in sources:
        start, end = end, end + source.num_bytes
        header[source.name] = {
            "dtype": NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), FileIO(path, "xb") as file:
        write_all(file, struct.pack("<Q", len(text)) + text)
        for source in sources:
            written, dtype = 0, DTYPES[NAMES[source.dtype]]
            for chunk in source.chunks():
                data = np.ascontiguousarray(chunk, dtype).reshape(-1).view(np.uint8)
                write_all(file, data.data)
                written += data.size
            if written != source.num_bytes:
                raise ValueError(f"{source.name}: {written} bytes came where {source.num_bytes} were announced.")
        os.fsync(file.fileno())
