"""The memory of somebody else's checkpoint: its tables, its readers' weights, and how it hashes.

    memory = deepseek_v41.open_memory(folder)              or qwen_ple.open_memory; reads headers and config.json only
    store  = MemoryStore.create(memory.engram, memory.token_map, optimizer, ...)
    state  = memory.load(store)                             streams the rows
    params = memory.reader("1")                             an EngramReader's parameters, float32

`model_settings` are the fields of ModelConfig with which the reader computes what the checkpoint's own code does.
Tensors are found by the end of their name, so that a prefix (`model.`, `language_model.`) does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import ConfigError, EngramConfig, require
from engram_jax.errors import RunError
from engram_jax.interop.shards import DTYPES, Folder, Tensor
from engram_jax.interop.table_sources import FP8, RowSource, load_tables
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.hashing import hash_constants
from engram_jax.memory.store import MemoryStore

BLOCKS = (32, 128, 64, 16, 256)
"""Sides of a scale's block in FP8 matrices, the usual ones first: V4.1's and V3's."""


@dataclass(frozen=True)
class ForeignMemory:
    """A checkpoint's memory, opened."""

    path: Path
    engram: EngramConfig
    model_settings: Mapping[str, Any]
    token_map: TokenMap
    sources: Mapping[str, RowSource]
    """By zero-based layer."""
    readers: Mapping[str, Mapping[str, np.ndarray]]

    def reader(self, layer: str) -> dict[str, np.ndarray]:
        """Parameters of layers/engram.py's EngramReader, by leaf name."""
        return dict(self.readers[layer])

    def load(self, store: MemoryStore) -> MemoryState:
        """The store's tables with the checkpoint's rows (`load_tables`).

        Raises:
          ConfigError: the store hashes otherwise than the checkpoint, or has tables of another size.
        """
        ours = hash_constants(self.engram, self.token_map)
        require(
            store.constants == ours,
            f"The store was made for other hash constants than those of {self.path}: create it from this memory's "
            "`engram` and `token_map`.",
        )
        return load_tables(store, self.sources)


# --- config.json ---


def text_settings(folder: Folder, needed: Sequence[str], kind: str) -> dict[str, Any]:
    """config.json's settings of the language model, which multimodal checkpoints keep in `text_config`.

    Raises:
      ConfigError: some that are needed are not there.
    """
    config = folder.config()
    settings = config | config.get("text_config", {})
    missing = [name for name in needed if settings.get(name) is None]
    require(
        not missing,
        f"{folder.path / 'config.json'} has no {', '.join(missing)} (model_type={config.get('model_type')!r}): it is "
        f"not the configuration of a {kind} checkpoint.",
    )
    return settings


# --- tensors ---


def find(folder: Folder, *names: str) -> Tensor:
    """The one tensor whose name ends with one of `names`, tried in order.

    Raises:
      RunError: there is none.
      ConfigError: there are several.
    """
    found = find_parts(folder, *names)
    require(
        len(found) == 1,
        f"{folder.path} has {found[0].name} in {len(found)} parts, and only tables may be cut in parts.",
    )
    return found[0]


def find_parts(folder: Folder, *names: str) -> tuple[Tensor, ...]:
    """The tensor of that name, or its parts `<name>.shard_0.weight`, `shard_1`, ... in order."""
    for name in names:
        stem, _, leaf = name.rpartition(".")
        wanted = re.compile(rf"(.*\.)?{re.escape(stem)}(\.shard_(\d+))?\.{re.escape(leaf)}")
        found = {m[0]: m for m in map(wanted.fullmatch, folder.tensors) if m}
        if not found:
            continue
        prefixes = {m[1] for m in found.values()}
        require(
            len(prefixes) == 1,
            f"{folder.path} has several tensors {name}: {', '.join(sorted(found)[:3])}. Give the full name.",
        )
        numbers = sorted((int(m[3]) if m[3] else -1, full) for full, m in found.items())
        if numbers[0][0] >= 0 and [n for n, _ in numbers] != list(range(len(numbers))):
            raise RunError(
                f"{folder.path} has parts {[n for n, _ in numbers][:8]}... of {name}: some are missing. "
                "Download or copy the folder again."
            )
        return tuple(folder.tensors[full] for _, full in numbers)
    raise RunError(f"{folder.path} has no tensor {' or '.join(names)}.")


def has(folder: Folder, *names: str) -> bool:
    try:
        find_parts(folder, *names)
    except RunError:
        return False
    return True


def shaped(tensor: Tensor, shape: Sequence[int], *also: Sequence[int]) -> np.ndarray:
    """A tensor's numbers, float32 of `shape`; it may have one of the shapes `also` in the file.

    Raises:
      ConfigError: it has another shape.
    """
    require(
        tensor.shape in (tuple(shape), *map(tuple, also)),
        f"{tensor.file}: {tensor.name} is {list(tensor.shape)}, and config.json makes it {list(shape)}.",
    )
    return tensor.read().astype(np.float32).reshape(shape)


def dequantized(tensor: Tensor, scales: Tensor | None, shape: Sequence[int]) -> np.ndarray:
    """A matrix in float32; of FP8 codes with a scale for each square block, whose size the scales' shape tells.

    Raises:
      ConfigError: it has another shape, or its scales are missing or do not divide it into blocks.
    """
    values = shaped(tensor, shape)
    if tensor.dtype != FP8:
        return values
    require(scales is not None, f"{tensor.file}: {tensor.name} is {FP8} and nothing holds its scales.")
    assert scales is not None
    raw = scales.read()
    factors = np.where(raw == 255, np.nan, np.exp2(raw.astype(np.float32) - 127)) if raw.dtype == np.uint8 else raw
    block = next((b for b in BLOCKS if factors.shape == tuple(-(-size // b) for size in shape)), None)
    if block is None:
        raise ConfigError(
            f"{scales.file}: {scales.name} is {list(scales.shape)}, which does not divide {tensor.name} "
            f"{list(shape)} into square blocks of {', '.join(map(str, BLOCKS))}."
        )
    spread = factors.astype(np.float32).repeat(block, 0).repeat(block, 1)
    return values * spread[: shape[0], : shape[1]]


def integers(tensor: Tensor) -> list[int]:
    require(
        np.issubdtype(DTYPES[tensor.dtype], np.integer),
        f"{tensor.file}: {tensor.name} is {tensor.dtype}; hash constants are integers.",
    )
    return [int(x) for x in tensor.read().ravel()]


def check_constant(where: str, theirs: Sequence[int], ours: Sequence[int]) -> None:
    """Raises ConfigError unless the checkpoint's constant is the one derived here. With a wrong one rows look valid."""
    theirs, ours = list(theirs), list(ours)
    if theirs != ours:
        both = min(len(theirs), len(ours))
        at = next((i for i in range(both) if theirs[i] != ours[i]), both)
        raise ConfigError(
            f"{where} differs from what the settings and the tokenizer give, from entry {at} on "
            f"({theirs[at : at + 2]} there, {ours[at : at + 2]} here), so every row would be wrong: the checkpoint has "
            "another tokenizer, or hashes in a way that is not known here."
        )
