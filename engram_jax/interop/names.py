"""A model's tensors under the names and in the layouts of DeepSeek's Hugging Face checkpoints, for export and import.

    model.layers.3.self_attn.q_proj.weight     [heads * head_dim, hidden]     <->     blocks/02-03/attn/q_dnh[1]

A linear layer's matrix is [outputs, inputs] in the file. Our dims have letters, which a layout puts in order and joins:
"dnh->nh,d" makes [N * H, D] of [D, N, H]. The file numbers blocks and experts one by one; ours are stacked.
DeepSeek has no names for some tensors: those names are this project's own (docs/interchange.md lists all).
Attention and readers declare their tensors themselves (variants/weights.py).

Rotary dims: our pairs are (i, i + H/2). A weight with `rope_width` has the pairs (2i, 2i + 1) in the file, so those
columns are permuted on the way.

Letters: D hidden, H width rotated, V vocabulary, E experts, F feed-forward width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.model import Segment, segments
from engram_jax.registries import ATTENTION, READERS
from engram_jax.variants.weights import STREAM_MODULES, WeightSpec, stream_weights

Tree = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Our side of a tensor: a leaf of the parameters or buffers, or one block's or expert's slice of it."""

    path: tuple[str, ...]
    """Keys to the leaf."""
    shape: tuple[int, ...]
    """The slice's shape."""
    layout: str
    """Our dims' letters -> the file's. Letters between two commas are one dim of the file; "1" is a new dim."""
    index: tuple[int, ...] = ()
    """Which slice of the leaf: block, then expert."""
    rope_width: int = 0
    """How many numbers at the end of our last dim are rotated in pairs."""

    def of(self, tree: Mapping[str, Any]) -> Any:
        for key in self.path:
            tree = tree[key]
        return tree

    def _order(self) -> tuple[list[int], list[int]]:
        """Our dims in the file's order, and the file's shape."""
        ours, theirs = self.layout.split("->")
        sizes = dict(zip(ours, self.shape, strict=True)) | {"1": 1}
        order = [ours.index(letter) for letter in theirs if letter in ours]
        return order, [math.prod(sizes[letter] for letter in group) for group in theirs.split(",")]

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(self._order()[1])

    def to_file(self, array: np.ndarray) -> np.ndarray:
        order, shape = self._order()
        return self._paired(array, interleave).transpose(order).reshape(shape)

    def from_file(self, array: np.ndarray) -> np.ndarray:
        order, _ = self._order()
        array = array.reshape([self.shape[dim] for dim in order]).transpose(np.argsort(order))
        return self._paired(array, split_halves)

    def _paired(self, array: np.ndarray, permute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if not self.rope_width:
            return array
        cut = array.shape[-1] - self.rope_width
        return np.concatenate([array[..., :cut], permute(array[..., cut:])], axis=-1)


def interleave(x: np.ndarray) -> np.ndarray:
    """Rotary pairs (i, i + H/2) of the last dim -> (2i, 2i + 1)."""
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


def split_halves(x: np.ndarray) -> np.ndarray:
    """The inverse of `interleave`."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


@dataclass(frozen=True)
class Weight:
    """A tensor of the file: one part, or several joined along dim 0."""

    name: str
    parts: tuple[Part, ...]
    stays_float32: bool = False
    """True: the tensor is float32 in checkpoints of every dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        first, *rest = self.parts[0].file_shape
        return (sum(part.file_shape[0] for part in self.parts), *rest) if len(self.parts) > 1 else (first, *rest)

    def to_file(self, tree: Mapping[str, Any]) -> np.ndarray:
        """float32, from the tree of parameters and buffers (NumPy arrays)."""
        arrays = [part.to_file(part.of(tree)[part.index]) for part in self.parts]
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def from_file(self, array: np.ndarray, tree: Tree) -> None:
        """Writes the tensor into the tree's NumPy arrays."""
        start = 0
        for part in self.parts:
            size = part.file_shape[0]
            part.of(tree)[part.index] = part.from_file(array[start : start + size].astype(np.float32))
            start += size


def table_name(layer: int | str) -> str:
    """The tensor's name of an Engram layer's rows, [rows, head_dim]: head after head, orders ascending."""
    return f"model.layers.{layer}.engram.embed.weight"


def weights(config: ModelConfig) -> Iterator[Weight]:
    """All tensors of a model except its tables, in the order of the model."""
    V, D = config.vocab_size, config.hidden_size
    yield _weight("model.embed_tokens.weight", ("embedding_vd",), (V, D), "vd->v,d")
    for segment in segments(config):
        for layer in range(segment.start, segment.stop):
            yield from _block(config, segment, layer)
    yield _weight("model.norm.weight", ("final_norm", "gain"), (D,), "d->d")
    if not config.tie_word_embeddings:
        yield _weight("lm_head.weight", ("head_dv",), (D, V), "dv->v,d")


def _weight(name: str, path: tuple[str, ...], shape: tuple[int, ...], layout: str, **settings: Any) -> Weight:
    stays = settings.pop("stays_float32", False)
    return Weight(name, (Part(path, shape, layout, **settings),), stays)


def _declared(specs: Sequence[WeightSpec], name: str, path: tuple[str, ...], at: tuple[int, ...]) -> Iterator[Weight]:
    """The tensors of a layer's weights; those with one file name are one tensor."""
    for file, group in itertools.groupby(specs, lambda spec: spec.file):
        joined = list(group)
        parts = tuple(Part((*path, *spec.path), spec.shape, spec.layout, at, spec.rope_width) for spec in joined)
        yield Weight(name + file, parts, any(spec.stays_float32 for spec in joined))


def _block(config: ModelConfig, segment: Segment, layer: int) -> Iterator[Weight]:
    D, moe, at = config.hidden_size, config.moe, (layer - segment.start,)
    name, path = f"model.layers.{layer}", ("blocks", segment.name)

    def vector(hf: str, *ours: str) -> Weight:
        return _weight(f"{name}.{hf}", path + ours, (D,), "d->d", index=at)

    if layer in config.engram.engram_layer_ids:
        reader = READERS[config.engram.engram_variant].weights(config)
        yield from _declared(reader, f"{name}.engram.", ("engram", str(layer)), ())
    yield vector("input_layernorm.weight", "attn_norm", "gain")
    attention = ATTENTION[config.attention.kind].weights(config)
    yield from _declared(attention, f"{name}.self_attn.", (*path, "attn"), at)
    yield vector("post_attention_layernorm.weight", "ffn_norm", "gain")
    if not segment.is_moe:
        yield from _feed_forward(f"{name}.mlp", (*path, "ffn"), at, D, config.intermediate_size)
    else:
        E, F = moe.n_routed_experts, moe.moe_intermediate_size
        ffn = (*path, "ffn")
        yield _weight(f"{name}.mlp.gate.weight", (*ffn, "router_de"), (D, E), "de->e,d", index=at)
        yield _weight(
            f"{name}.mlp.gate.e_score_correction_bias",
            (*ffn, "balance_bias"),
            (E,),
            "e->e",
            index=at,
            stays_float32=True,
        )
        for expert in range(E):
            yield from _feed_forward(f"{name}.mlp.experts.{expert}", ffn, (*at, expert), D, F, of_experts=True)
        if moe.n_shared_experts:
            yield from _feed_forward(f"{name}.mlp.shared_experts", (*ffn, "shared"), at, D, moe.n_shared_experts * F)
    if config.hc_mult > 1:
        for module, file in STREAM_MODULES.items():
            yield from _declared(stream_weights(config, module, file), f"{name}.", path, at)


def _feed_forward(
    name: str, path: tuple[str, ...], at: tuple[int, ...], D: int, F: int, of_experts: bool = False
) -> Iterator[Weight]:
    # The leaves of the routed experts have an expert dim, which `at` indexes.
    leaves = ("gate_edf", "up_edf", "down_efd") if of_experts else ("gate_df", "up_df", "down_fd")
    for hf, leaf in zip(("gate_proj", "up_proj", "down_proj"), leaves, strict=True):
        shape, layout = ((F, D), "fd->d,f") if hf == "down_proj" else ((D, F), "df->f,d")
        yield _weight(f"{name}.{hf}.weight", (*path, leaf), shape, layout, index=at)
