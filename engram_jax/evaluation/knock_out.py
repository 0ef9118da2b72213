"""Memory that is scaled, switched off, or made to forget some rows, in a trained run (paper, section 6.3).

Legend: B batch, T tokens, H rows per token, D row width, U rows that an owner must read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.memory.description import MemoryState
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableState
from engram_jax.sharding import placed, spec

if TYPE_CHECKING:
    from engram_jax.runs.state import TrainState

ROW_PROJECTIONS = ("key_value_emd", "key_value_bias_md", "slice_hed")
"""Parameters of a reader that its rows enter first."""


def parse_scales(words: Sequence[str], engram: EngramConfig) -> dict[int, float]:
    """Factors on the rows by Engram layer: `["0.5"]` for every layer; `["1=0", "2=0.5"]` for some, 1 for the others.

    Raises:
      ConfigError: the run has no memory, or a word names no number or no layer with memory.
    """
    require(
        engram.enabled or not words,
        "memory_scale: leave it out, since this run has no memory to scale.",
    )
    layers = engram.engram_layer_ids
    scales = dict.fromkeys(layers, 1.0)
    for word in words:
        layer, equals, factor = word.rpartition("=")
        chosen = [i for i in layers if not equals or layer == str(i)]
        require(bool(chosen), f"memory_scale {word}: {layer!r} is not an Engram layer; they are {list(layers)}.")
        require(
            equals != "" or len(words) == 1, f"memory_scale {' '.join(words)}: give one number or LAYER=NUMBER each."
        )
        try:
            scales |= dict.fromkeys(chosen, float(factor))
        except ValueError:
            require(False, f"memory_scale {word}: {factor!r} is not a number. Write 0, or for some layers 1=0 2=0.5.")
    return scales


def scale_memory(state: TrainState, scales: Mapping[int, float]) -> TrainState:
    """The state in which every row of a layer's table counts `scales[layer]` times; 1 leaves the layer as it is.

    Rows enter a reader by one linear map. The map is scaled, not the table: so sampling, decoding and scoring all see
    it, wherever the table lies, without a copy of the table. Biases of the map (engram_bias) are scaled too, so that 0
    is silent for every reader. The gate and the short convolution normalise their input: a scale other than 0 changes
    neither of them, only the size of the gated value.
    """
    readers = dict(state.params.get("engram", {}))
    for layer, scale in scales.items():
        if scale != 1:
            reader = readers[str(layer)]
            readers[str(layer)] = reader | {name: reader[name] * scale for name in ROW_PROJECTIONS if name in reader}
    return replace(state, params=state.params | {"engram": readers}) if readers else state


def forget_rows(store: MemoryStore, state: TrainState, layer: str, rows_TH: np.ndarray) -> TrainState:
    """A copy of the state in which these rows of a layer's table are zero, and their optimizer's slots too.

    Call it under the mesh of the store.

    Args:
      rows_TH: int32, the rows of each token as hashing gives them; -1 in a head whose row stays.
    """
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else mesh.size
    # A plan names a row of every head for every token, and its tokens are cut over all devices: each gets all of them.
    filled_TH = np.where(rows_TH < 0, np.array(store.constants.offsets(int(layer))), rows_TH).astype(np.int32)
    shape = (devices, len(rows_TH) * devices, rows_TH.shape[1])
    ids_BTH, is_chosen_BTH = (
        placed(jnp.asarray(np.broadcast_to(np.repeat(x_TH, devices, axis=0), shape)), "batch", "own_seq", None)
        for x_TH in (filled_TH, rows_TH >= 0)
    )
    return replace(state, memory=_forget(store, layer, state.memory, ids_BTH, is_chosen_BTH))


@partial(jax.jit, static_argnums=(0, 1))
def _forget(
    store: MemoryStore, layer: str, memory: MemoryState, ids_BTH: jax.Array, is_chosen_BTH: jax.Array
) -> MemoryState:
    plan = store.plan_ids(
        {name: ids_BTH if name == layer else _any_rows(store, name, ids_BTH) for name in store.layers}
    )
    plan = {layer: plan[layer]}
    loaded = store.load(memory, plan)[layer]
    # A number for each lookup reaches its row as a gradient does.
    said_BTHD = jnp.broadcast_to(
        is_chosen_BTH.astype(jnp.float32)[..., None],
        (*ids_BTH.shape, store.config.engram_head_dim),
        out_sharding=spec("batch", "own_seq", None, None),
    )
    said_UD = store.reduce(plan, {layer: said_BTHD})[layer]

    def local(loaded: TableState, said_UD: jax.Array) -> TableState:
        is_chosen_U = said_UD[:, 0] > 0

        def zeroed(x_U: jax.Array) -> jax.Array:
            return jnp.where(is_chosen_U.reshape(-1, *[1] * (x_U.ndim - 1)), jnp.zeros_like(x_U), x_U)

        # With its optimizer rows: catch-up would move a zero row on by the momentum it had.
        return replace(loaded, rows=zeroed(loaded.rows), slots=jax.tree.map(zeroed, loaded.slots))

    saved = store.save(memory, plan, {layer: store.on_shards(local, loaded, said_UD)})
    return replace(memory, tables=memory.tables | saved.tables)


def _any_rows(store: MemoryStore, layer: str, ids_BTH: jax.Array) -> jax.Array:
    """The first row of every head, for layers that forget nothing: a plan covers all layers at once."""
    offsets_H = jnp.array(store.constants.offsets(int(layer)), jnp.int32)
    return jnp.zeros_like(ids_BTH) + offsets_H[None, None]
