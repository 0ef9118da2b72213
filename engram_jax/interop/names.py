"""A model's tensors under the names and in the layouts of DeepSeek's Hugging Face checkpoints: one table for both ways.

    model.layers.3.self_attn.q_proj.weight     [heads * head_dim, hidden]     <->     blocks/02-03/attn/q_dnh[1]

A linear layer's matrix is [outputs, inputs] there; here its dims have letters, which a layout puts in order and joins:
"dnh->nh,d" makes [N * H, D] of [D, N, H]. Blocks that are stacked here are numbered one by one there, experts too.
Names that DeepSeek has none for are this project's own (docs/interchange.md lists all).

Rotary dims: pairs are (i, i + H/2) here and (2i, 2i + 1) in DeepSeek's latent attention, so the rope columns of queries
and of the shared key are permuted on the way. Grouped-query attention has the halves of Llama and Qwen there as well.

Letters: those of layers/ (D hidden, N heads, H head width, R latent, V vocabulary or value width, E experts or memory
width, F feed-forward width, M streams, K taps, C = M * D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.model import Segment, segments

Tree = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Our side of a tensor: a leaf of the parameters or buffers, or one block's or expert's slice of it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    """Of the slice."""
    layout: str
    """Our dims' letters -> the file's; those between two commas are one dim there, "1" is a new one."""
    index: tuple[int, ...] = ()
    rope_width: int = 0
    """Of our last dim, this many at its end are rotated in pairs."""

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
    """Whatever the checkpoint's dtype: what is computed in float32 from it would lose by rounding."""

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
    """The rows of an Engram layer, [rows, head_dim], in logical order: head after head, orders ascending."""
    return f"model.layers.{layer}.engram.embed.weight"


def weights(config: ModelConfig) -> Iterator[Weight]:
    """All tensors of a model but its tables, in the order of the model."""
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


def _block(config: ModelConfig, segment: Segment, layer: int) -> Iterator[Weight]:
    D, moe, at = config.hidden_size, config.moe, (layer - segment.start,)
    name, path = f"model.layers.{layer}", ("blocks", segment.name)

    def vector(hf: str, *ours: str) -> Weight:
        return _weight(f"{name}.{hf}", path + ours, (D,), "d->d", index=at)

    if layer in config.engram.engram_layer_ids:
        yield from _reader(config, layer)
    yield vector("input_layernorm.weight", "attn_norm", "gain")
    yield from _attention(config, f"{name}.self_attn", (*path, "attn"), at)
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
        for ours, theirs in (("attn_hc", "hc_attn"), ("ffn_hc", "hc_ffn")):
            yield from _hyper_connection(config, f"{name}.{theirs}", (*path, ours), at)


def _attention(config: ModelConfig, name: str, path: tuple[str, ...], at: tuple[int, ...]) -> Iterator[Weight]:
    D, a = config.hidden_size, config.attention
    N, H, R, rope = a.num_attention_heads, a.qk_head_dim, a.kv_lora_rank, a.qk_rope_head_dim

    def weight(hf: str, leaf: str, shape: tuple[int, ...], layout: str, rope_width: int = 0) -> Weight:
        return _weight(f"{name}.{hf}.weight", (*path, leaf), shape, layout, index=at, rope_width=rope_width)

    if a.kind == "gqa":
        G = a.num_key_value_heads
        yield weight("q_proj", "q_dnh", (D, N, H), "dnh->nh,d")
        yield weight("k_proj", "k_dgh", (D, G, H), "dgh->gh,d")
        yield weight("v_proj", "v_dgh", (D, G, H), "dgh->gh,d")
        yield weight("o_proj", "o_nhd", (N, H, D), "nhd->d,nh")
        return
    yield weight("q_proj", "q_dnh", (D, N, H), "dnh->nh,d", rope)
    yield weight("kv_a_proj_with_mqa", "kv_down_dr", (D, R + rope), "dr->r,d", rope)
    yield _weight(f"{name}.kv_a_layernorm.weight", (*path, "kv_norm", "gain"), (R,), "r->r", index=at)
    yield weight("kv_b_proj", "kv_up_rnh", (R, N, a.qk_nope_head_dim + a.v_head_dim), "rnh->nh,r")
    yield weight("o_proj", "o_nhd", (N, a.v_head_dim, D), "nhd->d,nh")


def _feed_forward(
    name: str, path: tuple[str, ...], at: tuple[int, ...], D: int, F: int, of_experts: bool = False
) -> Iterator[Weight]:
    # The leaves of the routed experts have an expert dim, which `at` indexes.
    leaves = ("gate_edf", "up_edf", "down_efd") if of_experts else ("gate_df", "up_df", "down_fd")
    for hf, leaf in zip(("gate_proj", "up_proj", "down_proj"), leaves, strict=True):
        shape, layout = ((F, D), "fd->d,f") if hf == "down_proj" else ((D, F), "df->f,d")
        yield _weight(f"{name}.{hf}.weight", (*path, leaf), shape, layout, index=at)


def _reader(config: ModelConfig, layer: int) -> Iterator[Weight]:
    engram, M, D = config.engram, config.engram_branches, config.hidden_size
    name, path = f"model.layers.{layer}.engram", ("engram", str(layer))
    if engram.engram_variant == "over_encoding":
        shape = (engram.num_rows_per_token, engram.engram_head_dim, D)
        yield _weight(f"{name}.slice_proj.weight", (*path, "slice_hed"), shape, "hed->h,d,e")
        return
    keys = 0 if "gate" in engram.engram_without else M
    # V4.1's names and layouts: the keys of all streams, then the value.
    yield _weight(f"{name}.wkv.weight", (*path, "key_value_emd"), (engram.memory_dim, keys + 1, D), "emd->md,e")
    if engram.engram_bias:
        yield _weight(f"{name}.wkv.bias", (*path, "key_value_bias_md"), (keys + 1, D), "md->md")
    if keys:
        yield _weight(f"{name}.q_weight", (*path, "query_norm"), (M, D), "md->m,d")
        yield _weight(f"{name}.k_weight", (*path, "key_norm"), (M, D), "md->m,d")
    if "multi_branch" in engram.engram_without:
        yield from _hyper_connection(config, f"{name}.hc", (*path, "port"), (), ("pre", "post"))
    if K := engram.engram_kernel_size:
        yield _weight(f"{name}.conv_norm.weight", (*path, "conv_norm"), (M, D), "md->m,d")
        yield _weight(f"{name}.conv1d.weight", (*path, "conv_kmd"), (K, M, D), "kmd->md,1,k")


def _hyper_connection(
    config: ModelConfig,
    name: str,
    path: tuple[str, ...],
    at: tuple[int, ...],
    maps: tuple[str, ...] = ("pre", "post", "res"),
) -> Iterator[Weight]:
    M, C = config.hc_mult, config.hc_mult * config.hidden_size
    width = {"pre": M, "post": M, "res": M * M}
    bias = {"pre": ((M,), "m->m"), "post": ((M,), "m->m"), "res": ((M, M), "mn->mn")}

    def joined(hf: str, *parts: tuple[str, tuple[int, ...], str]) -> Weight:
        return Weight(
            f"{name}_{hf}", tuple(Part((*path, leaf), shape, layout, at) for leaf, shape, layout in parts), True
        )

    yield joined("fn", *((f"phi_{part}_cm", (C, width[part]), "cm->m,c") for part in maps))
    yield joined("base", *((f"bias_{part}", *bias[part]) for part in maps))
    yield joined("scale", ("alpha", (len(maps),), "m->m"))
