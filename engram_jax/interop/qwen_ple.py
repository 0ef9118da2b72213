"""Qwen3.8-Flash-Next's memory, "PLE" (`qwen4_exp`): raw ids, windows that end at EOS, a convolution, centred gains.

    ple.ple_embedding.ngram_embedding(.shard_i).weight      [rows, 160]; rows padded to a multiple of 128
    ple.{key_proj,value_proj}.weight                        [M * D, E], [D, E]
    ple.{norm_key,norm_query,norm_conv}.weight              [M * D], norms over groups of D; the gain is 1 + weight
    ple.conv1d.weight                                       [M * D, 1, 4], dilated by the largest order
    ple.ple_embedding.layer_multipliers, ngram_heads_vocab_sizes, ngram_heads_offsets       the hash, to be compared

Qwen counts layers from one, we from zero. In the FP8 checkpoint every part of the table has one scale; such rows become
float32 or bfloat16 here, as the frozen FP8 store has a scale for 32 values.

Legend: D hidden, M streams, E memory width, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.interop.foreign import (
    ForeignMemory,
    check_constant,
    dequantized,
    find,
    find_parts,
    has,
    integers,
    shaped,
    text_settings,
)
from engram_jax.interop.shards import Folder, Tensor
from engram_jax.interop.table_sources import FP8, RowSource
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import HashConstants, hash_constants


@dataclass(frozen=True)
class Names:
    """How the tensors' names end. The scales' are not published anywhere we read: these are the usual ones."""

    rows: str = "ple.ple_embedding.ngram_embedding.weight"
    key: str = "ple.key_proj.weight"
    value: str = "ple.value_proj.weight"
    key_gain: str = "ple.norm_key.weight"
    query_gain: str = "ple.norm_query.weight"
    conv_gain: str = "ple.norm_conv.weight"
    conv: str = "ple.conv1d.weight"
    scale_suffixes: tuple[str, ...] = ("weight_scale_inv", "weight_scale", "scale")
    multipliers: str = "layer_multipliers"
    head_sizes: str = "ngram_heads_vocab_sizes"
    head_offsets: str = "ngram_heads_offsets"


NEEDED = (
    "ple_layer_ids",
    "ngram_size",
    "heads_per_ngram",
    "ple_embed_dim",
    "ngram_vocab_size_base",
    "eos_token_id",
    "ple_conv_kernel_size",
    "hc_count",
    "hidden_size",
    "rms_norm_eps",
    "vocab_size",
)


def open_memory(path: Path, names: Names | None = None) -> ForeignMemory:
    """The memory of a checkpoint's folder: config.json and safetensors files.

    Raises:
      ConfigError: the settings are not Qwen's, cannot be represented, or give other hash constants than the checkpoint.
      RunError: a file or tensor is missing, or cut short.
    """
    names = names or Names()
    folder = Folder(path)
    settings = text_settings(folder, NEEDED, "qwen4_exp")
    layers = settings["ple_layer_ids"]
    require(
        len(layers) == 1 and layers[0] >= 1,
        f"{path / 'config.json'}: ple_layer_ids={layers}; one layer, counted from one, can be read, for the names of "
        "several layers' tensors are not known.",
    )
    orders, eos = settings["ngram_size"] - 1, settings["eos_token_id"]
    num_heads, width = orders * settings["heads_per_ngram"], settings["ple_embed_dim"]
    require(
        width % num_heads == 0,
        f"{path / 'config.json'}: ple_embed_dim={width} is not a multiple of the {num_heads} heads.",
    )
    require(
        isinstance(eos, int),
        f"{path / 'config.json'}: eos_token_id={eos}; windows reset at one token here, so it must be one number.",
    )
    engram = EngramConfig(
        engram_layer_ids=(layers[0] - 1,),
        engram_variant="qwen_ple",
        engram_max_ngram_size=settings["ngram_size"],
        engram_n_heads=settings["heads_per_ngram"],
        engram_head_dim=width // num_heads,
        engram_vocab_size=settings["ngram_vocab_size_base"],
        engram_pad_token_id=eos,
        engram_kernel_size=settings["ple_conv_kernel_size"],
        engram_conv_norm_eps=settings["rms_norm_eps"],
        engram_seed=settings.get("seed", 1234),
    )
    for name in ("key_proj.bias", "value_proj.bias", "conv1d.bias"):
        require(not has(folder, f"ple.{name}"), f"{path} has ple.{name}, and Qwen's reader has no biases.")
    token_map = TokenMap.identity(settings["vocab_size"])
    constants = hash_constants(engram, token_map)
    layer = engram.engram_layer_ids[0]
    _check_buffers(folder, names, constants, layer)

    M, D, E, K = settings["hc_count"], settings["hidden_size"], engram.memory_dim, engram.engram_kernel_size
    source = _rows(folder, names, constants.num_rows(layer), settings)
    key = _matrix(folder, names, names.key, (M * D, E)).reshape(M, D, E)
    value = _matrix(folder, names, names.value, (D, E))
    reader = {"key_value_emd": np.concatenate([key, value[None]]).transpose(2, 0, 1)}
    gains = {"query_norm": names.query_gain, "key_norm": names.key_gain} | ({"conv_norm": names.conv_gain} if K else {})
    for ours, theirs in gains.items():
        reader[ours] = 1 + shaped(find(folder, theirs), (M, D), (M * D,))  # zero-centred in the file
    if K:
        reader["conv_kmd"] = shaped(find(folder, names.conv), (M * D, 1, K)).reshape(M, D, K).transpose(2, 0, 1)
    model = {name: settings[name] for name in ("hidden_size", "rms_norm_eps", "vocab_size")} | {"hc_mult": M}
    return ForeignMemory(path, engram, model, token_map, {str(layer): source}, {str(layer): reader})


def _check_buffers(folder: Folder, names: Names, constants: HashConstants, layer: int) -> None:
    """Compares what the checkpoint stores of its hash with what is derived here."""
    derived = {
        names.multipliers: constants.multipliers[0],
        names.head_sizes: constants.head_rows(layer),
        names.head_offsets: constants.offsets(layer),
    }
    for name, ours in derived.items():
        matching = [tensor for full, tensor in folder.tensors.items() if full.split(".")[-1] == name]
        if matching:
            check_constant(f"{matching[0].file}: {matching[0].name}", integers(matching[0]), ours)


def _rows(folder: Folder, names: Names, num_rows: int, settings: dict) -> RowSource:
    parts = find_parts(folder, names.rows)
    multiple = settings.get("make_ngram_vocab_size_divisible_by", 128)
    padded = -(-num_rows // multiple) * multiple
    total, width = sum(part.num_rows for part in parts), settings["ple_embed_dim"]
    require(
        total in (num_rows, padded),
        f"{parts[0].file}: {parts[0].name} has {total:,} rows in {len(parts)} parts, and config.json makes it "
        f"{num_rows:,}, padded to {padded:,}: rows are addressed modulo the heads' sizes, so a table of another size "
        f"means nothing (ple_embed_dim={width}).",
    )
    if parts[0].dtype != FP8:
        return RowSource(parts, num_rows)
    return RowSource(parts, num_rows, part_scales=tuple(_scale(folder, names, part) for part in parts))


def _scale(folder: Folder, names: Names, part: Tensor) -> float:
    stem = part.name.removesuffix("weight")
    scale = find(folder, *(stem + suffix for suffix in names.scale_suffixes))
    return float(shaped(scale, (), (1,), (1, 1)))


def _matrix(folder: Folder, names: Names, name: str, shape: tuple[int, int]) -> np.ndarray:
    tensor = find(folder, name)
    if tensor.dtype != FP8:
        return shaped(tensor, shape)
    scale = find(folder, *(tensor.name.removesuffix("weight") + suffix for suffix in names.scale_suffixes))
    if int(np.prod(scale.shape)) == 1:
        return shaped(tensor, shape) * shaped(scale, (), (1,), (1, 1))
    return dequantized(tensor, scale, shape)
