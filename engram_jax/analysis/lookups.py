"""Lookups of a trained run's memory at each token of a text: gates, and the uses and the age of the rows.

Legend: B batch, T seq, H rows per token, O orders, K heads per order, M residual streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.analysis.gates import recorded_gates
from engram_jax.config import require
from engram_jax.evaluation.evaluated_run import EvaluatedRun, padded_length
from engram_jax.evaluation.knock_out import scale_memory
from engram_jax.memory import routing
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.sharding import placed


class Lookup(NamedTuple):
    """Lookups of a sequence of T + 1 ids, by Engram layer: an entry for each id but the last, which is not read."""

    gates: dict[str, np.ndarray]
    """float32 [T, M] in 0..1."""
    uses: dict[str, np.ndarray]
    """float32 [T, O]: updates of the n-gram's rows, mean over an order's heads."""
    ages: dict[str, np.ndarray]
    """float32 [T, O]: steps since the last update, mean over the order's heads that had one; NaN if none had. Empty if
    the rows' optimizer does not keep the step, or the tables were imported without their optimizer."""


def look_up(model: EvaluatedRun, sequences: Sequence[np.ndarray]) -> list[Lookup]:
    """The lookups of documents or pieces of them, as `EvaluatedRun.score` takes them, in their order.

    Raises:
      ConfigError: the model has no memory.
    """
    require(model.parts.config.model.engram.enabled, f"{model.name} has no memory to look into (engram_layer_ids=()).")
    found: dict[int, Lookup] = {}
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(padded_length(len(sequence) - 1), []).append(index)
    for length, indices in sorted(by_length.items()):
        shards = model.parts.mesh.size
        batch_size = max(1, model.batch_tokens // length // shards) * shards
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            tokens_BT, segment_ids_BT = np.zeros((2, batch_size, length), np.int32)
            for row, index in enumerate(chosen):
                read = sequences[index][:-1]
                tokens_BT[row, : len(read)], segment_ids_BT[row, : len(read)] = read, 1
            with jax.set_mesh(model.parts.mesh):
                arrays = (placed(jnp.asarray(x), "batch", "seq") for x in (tokens_BT, segment_ids_BT))
                numbers = jax.device_get(_lookups(model.parts, model.state, *arrays))
            for row, index in enumerate(chosen):
                count = len(sequences[index]) - 1
                found[index] = Lookup(*({la: x[row, :count] for la, x in kind.items()} for kind in numbers))
    return [found[index] for index in range(len(sequences))]


@partial(jax.jit, static_argnums=0)
def _lookups(parts: Parts, state: TrainState, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[dict, ...]:
    store = parts.store
    plan = store.plan(tokens_BT, segment_ids_BT)
    loaded = store.load(state.memory, plan)
    gates = recorded_gates(parts, state, store.rows(loaded, plan, state.step), tokens_BT, segment_ids_BT)

    def by_order(numbers: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """One number for each loaded row, by lookup: [B, T, O, K], whole on every device."""
        sent = routing.send_rows({layer: x[:, None] for layer, x in numbers.items()}, plan, store.transport)
        shape = (*tokens_BT.shape, -1, store.config.engram_n_heads)
        return {layer: placed(x, None, None, None, None)[..., 0].reshape(shape) for layer, x in sent.items()}

    uses = by_order({layer: rows.uses.astype(jnp.float32) for layer, rows in loaded.items()})
    last = {layer: store.optimizer.last_updates(rows.slots) for layer, rows in loaded.items()}
    waited = {la: (state.step - last_U).astype(jnp.float32) for la, last_U in last.items() if last_U is not None}
    ages = by_order(waited) if waited else {}
    ages = {la: jnp.nanmean(jnp.where(uses[la] > 0, age, jnp.nan), axis=-1) for la, age in ages.items()}
    return gates, {layer: jnp.mean(x, axis=-1) for layer, x in uses.items()}, ages


def with_memory(model: EvaluatedRun, scales: dict[int, float]) -> EvaluatedRun:
    """The run with its memory scaled (evaluation/knock_out.py), without loading it again."""
    with jax.set_mesh(model.parts.mesh):
        state = scale_memory(model.state, scales)
    scales = dict.fromkeys(model.parts.config.model.engram.engram_layer_ids, 1.0) | scales
    return replace(model, state=state, memory_scale=scales, _said=set(), _engines={})
