"""Everything a training step reads and replaces, as one pytree that is donated to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from engram_jax.memory.description import MemoryState

Batch = dict[str, jax.Array]  # int32 [B, T]: tokens, targets, segment_ids, positions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: jax.Array
    """int32: updates done."""
    params: dict[str, Any]
    """Trained by gradients; float32."""
    buffers: dict[str, Any]
    """Trained by rules: the experts' balancing biases."""
    opt_state: Any
    memory: MemoryState
