"""Memory scaled or switched off at evaluation time: what the rest of the model does without it (paper, section 6.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engram_jax.config import EngramConfig, require

if TYPE_CHECKING:
    from engram_jax.training.state import TrainState

ROW_PROJECTIONS = ("key_value_emd", "key_value_bias_md")
"""Of a reader: all that its rows pass through first."""


def parse_scales(words: Sequence[str], engram: EngramConfig) -> dict[int, float]:
    """`["0.5"]`: every layer; `["1=0", "2=0.5"]`: these, the others stay at 1. By layer id, every layer named.

    Raises:
      ConfigError: no memory, no number, or a layer without memory.
    """
    require(engram.enabled or not words, "memory_scale: this run has no memory to scale (engram_layer_ids=()).")
    layers = engram.engram_layer_ids
    scales = dict.fromkeys(layers, 1.0)
    for word in words:
        layer, equals, factor = word.rpartition("=")
        chosen = [i for i in layers if not equals or layer == str(i)]
        require(bool(chosen), f"memory_scale {word}: no Engram layer is called {layer!r}; there are {list(layers)}.")
        require(equals != "" or len(words) == 1, f"memory_scale {' '.join(words)}: one number, or LAYER=NUMBER each.")
        try:
            scales |= dict.fromkeys(chosen, float(factor))
        except ValueError:
            require(False, f"memory_scale {word}: {factor!r} is no number. Give 0, or LAYER=NUMBER each (1=0 2=0.5).")
    return scales


def scale_memory(state: TrainState, scales: Mapping[int, float]) -> TrainState:
    """The state in which every row of a layer's table counts `scales[layer]` times; 1 leaves the layer as it is.

    Rows enter a reader by one linear map, so that map is scaled and not the table: the same in sampling, decoding and
    scoring, wherever the table lies, without a copy of it. Biases of the map (engram_bias) are scaled with the rows, so
    that 0 is silent for every reader. The gate and the short convolution normalise what they read: any scale but 0
    changes neither, and only the gated value itself gets smaller or larger.
    """
    readers = dict(state.params.get("engram", {}))
    for layer, scale in scales.items():
        if scale != 1:
            reader = readers[str(layer)]
            readers[str(layer)] = reader | {name: reader[name] * scale for name in ROW_PROJECTIONS if name in reader}
    return replace(state, params=state.params | {"engram": readers}) if readers else state
