"""States of tokens after every block: the mean of the residual streams, which the final norm and the head read.

Legend: B batch, T tokens, D hidden size, M residual streams, L states of a token: the embedding's and every block's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.evaluation.evaluated_run import EvaluatedRun, padded_length
from engram_jax.model import Model, segments
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.sharding import placed


def layer_states(
    model: Model,
    tokens_BT: jax.Array,
    rows: Mapping[str, jax.Array] | None = None,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """The streams' mean before the first block (0) and after block i (i + 1): [blocks + 1, B, T, D] in `config.dtype`.

    The arguments are those of `Model.hidden`, whose result is the final norm of the last entry. An Engram layer stands
    before its block, so its addition first shows in that block's state.
    """
    config = model.config
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    attend_ids_BT = None if config.attend_across_documents else segment_ids_BT
    x_BTMD = model.embed(tokens_BT)
    states = [jnp.mean(x_BTMD, axis=2)[None]]
    for segment in segments(config):
        if segment.reads_memory and rows is not None:
            layer = str(segment.start)
            own = placed(rows[layer], "batch", "seq", None, None)
            x_BTMD = x_BTMD + model.engram[layer](x_BTMD, own, segment_ids_BT)

        def run_block(x_BTMD: jax.Array, block: Any):
            x_BTMD, _ = block(x_BTMD, positions_BT, attend_ids_BT)
            return x_BTMD, jnp.mean(x_BTMD, axis=2)

        x_BTMD, states_of_segment = jax.lax.scan(run_block, x_BTMD, model.blocks[segment.name])
        states.append(states_of_segment)
    return jnp.concatenate(states)


class StateBatch(NamedTuple):
    first: int
    """Index of the sequence in row 0; the others follow. Rows after the last sequence are padding."""
    is_token_BT: np.ndarray
    states_LBTD: jax.Array


def state_batches(model: EvaluatedRun, sequences: Sequence[np.ndarray]) -> Iterator[StateBatch]:
    """`layer_states` of sequences of ids from one document each, in batches of the size that scoring uses.

    All sequences are padded to one length, so one program is compiled.

    Raises:
      ConfigError: a sequence is empty.
    """
    require(all(map(len, sequences)), "a sequence has no ids: begin it with the tokenizer's bos.")
    length = padded_length(max(map(len, sequences), default=1))
    devices = model.parts.mesh.size
    batch_size = max(1, model.batch_tokens // length // devices) * devices
    for first in range(0, len(sequences), batch_size):
        ids_BT = np.zeros((batch_size, length), np.int32)
        is_token_BT = np.zeros((batch_size, length), bool)
        for row, sequence in enumerate(sequences[first : first + batch_size]):
            ids_BT[row, : len(sequence)] = sequence
            is_token_BT[row, : len(sequence)] = True
        with jax.set_mesh(model.parts.mesh):
            arrays = (placed(jnp.asarray(x), "batch", "seq") for x in (ids_BT, is_token_BT.astype(np.int32)))
            yield StateBatch(first, is_token_BT, _states(model.parts, model.state, *arrays))


@partial(jax.jit, static_argnums=0)
def _states(parts: Parts, state: TrainState, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    rows = parts.store.fetch(state.memory, parts.store.plan(tokens_BT, segment_ids_BT), state.step)
    states_LBTD = layer_states(parts.model(state.params, state.buffers), tokens_BT, rows, segment_ids_BT)
    return placed(states_LBTD, None, "batch", None, None)


def states_at(model: EvaluatedRun, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> np.ndarray:
    """The states of chosen tokens, `positions[i]` of sequence i, one after the other: float32 [L, N, D]."""
    found = []
    for first, _, states_LBTD in state_batches(model, sequences):
        host_LBTD = np.asarray(states_LBTD).astype(np.float32)
        chosen = positions[first : first + host_LBTD.shape[1]]
        found += [host_LBTD[:, row, at] for row, at in enumerate(chosen)]
    return np.concatenate(found, axis=1)
