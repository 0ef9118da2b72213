"""A trained state as serving needs it: no optimizer, and weights in the dtype that products take them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from engram_jax.memory.description import MemoryState
from engram_jax.optimizers.roles import KEPT_WIDE, ROLES
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Served:
    params: dict[str, Any]
    buffers: dict[str, Any]
    memory: MemoryState
    step: jax.Array


def served(parts: Parts, state: TrainState) -> Served:
    """The same outputs bit for bit: layers cast these weights at every use, and decoding reads half the bytes so.

    Call under the mesh.
    """
    params = jax.jit(partial(_cast, dtype=parts.config.model.dtype))(state.params)
    return Served(params, state.buffers, state.memory, state.step)


def _cast(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    def one(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
        name = path[-1].key
        return weight if name in KEPT_WIDE or ROLES[name].kind == "vector" else weight.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)
