"""A trained state for serving: without the optimizer's state, and with weights in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from engram_jax.memory.description import MemoryState
from engram_jax.optimizers.roles import Role, roles
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
    """The state for serving; its outputs equal the trained state's bit for bit. Call under the mesh.

    Layers cast these weights at every use, so casting them once changes no output and halves the bytes that are read.
    """
    model = parts.config.model
    params = jax.jit(partial(_cast, dtype=model.dtype, roles=roles(model)))(state.params)
    return Served(params, state.buffers, state.memory, state.step)


def _cast(params: dict[str, Any], dtype: str, roles: Mapping[str, Role]) -> dict[str, Any]:
    def one(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
        role = roles[path[-1].key]
        return weight if role.stays_float32 or role.kind == "vector" else weight.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)
