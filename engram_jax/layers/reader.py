"""The base of readers, the choice of a model's reader, and a stand-in that records gates.

Legend: B batch, T seq, H rows per token, d row width, M residual streams, D hidden size, W kept positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import EngramConfig, ModelConfig, require
from engram_jax.registries import READERS
from engram_jax.variants.readers import ReaderLayer


class Reader(nnx.Module):
    """A reader that has no gates and looks at one position at a time; variants/readers.py documents the methods.

    A subclass has `__init__` and `__call__`. A reader with gates adds `has_gates` and `read`. A reader that looks back
    adds `new_cache` and `extend`.
    """

    has_gates: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        raise NotImplementedError

    def read(
        self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError(f"{type(self).__name__} has no gates.")

    @staticmethod
    def new_cache(config: ModelConfig, batch: int, spare: int) -> Any:
        return None

    def extend(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, count_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return self(x_BTMD, rows_BTHd), None


def reader_class(engram: EngramConfig) -> type[ReaderLayer]:
    """The layer that `engram.engram_variant` and `engram.engram_without` name."""
    return READERS[engram.engram_variant].layer(engram)


class RecordingReader(nnx.Module):
    """A reader that keeps the gates [B, T, M] of its last call in `gate_btm`; it takes a reader's place in a model.

    Raises:
      ConfigError: the reader has no gates.
    """

    def __init__(self, reader: ReaderLayer):
        require(
            reader.has_gates,
            f"{type(reader).__name__} has no gates to record. Take a run whose reader has gates, such as "
            "engram_variant=paper without engram_without=gate.",
        )
        self.reader = reader

    def __call__(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        update_BTMD, gate_BTM = self.reader.read(x_BTMD, rows_BTHd, segment_ids_BT)
        self.gate_btm = nnx.Intermediate(gate_BTM)
        return update_BTMD


def newest(kept_BW: jax.Array, new_BT: jax.Array, count_B: jax.Array) -> jax.Array:
    """The W kept positions after the first `count_B` of T new ones were accepted: [B, W, ...]."""
    joined = jnp.concatenate([kept_BW, new_BT.astype(kept_BW.dtype)], axis=1)
    return windows(joined, count_B, kept_BW.shape[1])


def windows(x_BT: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """x[b, start_B[b] : start_B[b] + width] of each sequence: [B, width, ...]."""
    place_BW = start_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.take_along_axis(x_BT, place_BW.reshape(*place_BW.shape, *[1] * (x_BT.ndim - 2)), axis=1)
