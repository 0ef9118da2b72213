"""The gates of a memory for each token of a text: they are open where the model uses its memory.

Legend: B batch, T tokens, H rows per token, D hidden size, M residual streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from engram_jax.config import require
from engram_jax.data.tokenizer import Tokenizer
from engram_jax.layers.reader import RecordingReader
from engram_jax.memory.description import MemoryRows
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.sharding import spec

COLOR_MAP = "cividis"  # read alike with and without colour vision, and dark to light
LENGTH_MULTIPLE = 64  # texts of similar length share a compilation


def token_gates(
    parts: Parts, state: TrainState, tokenizer: Tokenizer, text: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens of `text` as strings, and each Engram layer's gates for them: float [T, M] in 0..1.

    Raises:
      ConfigError: the model has no memory, or the text has no tokens.
    """
    require(parts.config.model.engram.enabled, "engram_layer_ids=(): this model has no memory, and so no gates.")
    ids = tokenizer.encode(text)
    require(bool(ids), "the text has no tokens.")
    # A document begins with bos in training; its own gate is not part of the text.
    length = 1 + len(ids)
    buffer_T = np.zeros(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, np.int32)
    buffer_T[:length] = [tokenizer.bos_id, *ids]
    with jax.set_mesh(parts.mesh):
        gates = _gates(parts, state, buffer_T, length)
    return [tokenizer.decode([i]) for i in ids], {layer: np.asarray(g)[1:length] for layer, g in gates.items()}


@partial(jax.jit, static_argnums=0)
def _gates(parts: Parts, state: TrainState, buffer_T: jax.Array, length: jax.Array) -> dict[str, jax.Array]:
    tokens_BT, segment_ids_BT = one_document(parts, buffer_T, length)
    plan = parts.store.plan(tokens_BT, segment_ids_BT)
    rows = parts.store.fetch(state.memory, plan, state.step)
    gates = recorded_gates(parts, state, rows, tokens_BT, segment_ids_BT)
    return {layer: gate_BTM[0] for layer, gate_BTM in gates.items()}


def recorded_gates(
    parts: Parts, state: TrainState, rows: MemoryRows, tokens_BT: jax.Array, segment_ids_BT: jax.Array
) -> dict[str, jax.Array]:
    """Each Engram layer's gates [B, T, M] in one forward pass, whole on every device. Call under jit."""
    model = parts.model(state.params, state.buffers)
    recorders = {layer: RecordingReader(reader) for layer, reader in model.engram.items()}
    model.engram = nnx.Dict(recorders)  # type: ignore[assignment]  # called as a reader is
    model.hidden(tokens_BT, rows, segment_ids_BT)
    return {layer: jax.reshard(recorder.gate_btm[...], spec(None, None, None)) for layer, recorder in recorders.items()}


def one_document(parts: Parts, buffer_T: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`buffer_T` as a batch, and its segment ids: 1 for the first `length` tokens, 0 for padding. int32 [B, T] both.

    B is the number of devices: the mesh shards the batch, so each device computes the one sequence.
    """
    shape = (parts.mesh.size, *jnp.shape(buffer_T))
    is_token_T = jnp.arange(shape[1], dtype=jnp.int32) < length
    batch = spec("batch", "seq")
    tokens_BT = jnp.broadcast_to(jnp.asarray(buffer_T, jnp.int32)[None], shape, out_sharding=batch)
    return tokens_BT, jnp.broadcast_to(is_token_T.astype(jnp.int32)[None], shape, out_sharding=batch)


def plot_gates(tokens: Sequence[str], gates: Mapping[str, np.ndarray]) -> Figure:
    """A heat map: tokens along x, a row for each stream of each layer. Save it with `figure.savefig`."""
    streams = sum(gate_TM.shape[1] for gate_TM in gates.values())
    figure = Figure(figsize=(2.5 + 0.32 * len(tokens), 1.6 + 0.3 * streams), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = draw_gates(axes, tokens, gates)
    rows_RT = image.get_array()
    assert rows_RT is not None
    axes.set_title(
        f"How far the gates open: mean {rows_RT.mean():.2f}, from {rows_RT.min():.2f} to {rows_RT.max():.2f}"
    )
    figure.colorbar(image, label="gate", fraction=0.03, pad=0.01)
    return figure


def draw_gates(axes: Axes, tokens: Sequence[str], gates: Mapping[str, np.ndarray]) -> AxesImage:
    """Draws the heat map. Colours go from 0 to 1 in every map, so that maps can be compared."""
    rows_RT = np.concatenate([gate_TM.T for gate_TM in gates.values()])
    labels = [f"layer {layer}, stream {m}" for layer, gate_TM in gates.items() for m in range(gate_TM.shape[1])]
    image = axes.imshow(rows_RT, cmap=COLOR_MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    # Code is full of $, which would start a formula.
    axes.set_xticks(range(len(tokens)), [readable(t) for t in tokens], rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(labels)), labels)
    offset = 0
    for gate_TM in list(gates.values())[:-1]:
        offset += gate_TM.shape[1]
        axes.axhline(offset - 0.5, color="white", linewidth=2)
    return image


def readable(token: str) -> str:
    """The token with visible white space."""
    return token.replace(" ", "·").replace("\n", "\\n").replace("\t", "\\t")
