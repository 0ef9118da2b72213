"""DeepSeek-V4.1's memory (arXiv 2609.19969): tables in FP8 with a power-of-two scale for every 32 values of a row.

    layers.1.engram.embed.weight    F8_E4M3 [384006168, 256]    all heads' rows, orders ascending, then heads
    layers.1.engram.embed.scale     F8_E8M0 [384006168, 8]
    layers.1.engram.wkv.weight      F8_E4M3 [25600, 6144]       4 keys, then the value, of 5120; 32 x 32 blocks
    layers.1.engram.q_weight        [4, 5120]                   gains of each stream's norm, used as a product only
    layers.1.engram.k_weight        [4, 5120]

Layers count from zero; there is no convolution and no bias. What the checkpoint's code does with image tokens (they
block older history and get no update) has no place in this model: feed it text.

Legend: D hidden, M streams, E memory width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram_jax.config import EngramConfig, require
from engram_jax.interop.foreign import (
    ForeignMemory,
    check_constant,
    dequantized,
    find,
    find_parts,
    has,
    shaped,
    text_settings,
)
from engram_jax.interop.shards import Folder
from engram_jax.interop.table_sources import FP8, RowSource
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import hash_constants


@dataclass(frozen=True)
class Names:
    """How the tensors' names end. `wkv_scale` is not published anywhere we read: these are the family's usual ones."""

    rows: str = "layers.{layer}.engram.embed.weight"
    row_scales: str = "layers.{layer}.engram.embed.scale"
    wkv: str = "layers.{layer}.engram.wkv.weight"
    wkv_scale: tuple[str, ...] = ("layers.{layer}.engram.wkv.scale", "layers.{layer}.engram.wkv.weight_scale_inv")
    query_gain: str = "layers.{layer}.engram.q_weight"
    key_gain: str = "layers.{layer}.engram.k_weight"


NEEDED = (
    "engram_layer_ids",
    "engram_max_ngram_size",
    "engram_n_heads",
    "engram_head_dim",
    "engram_vocab_size",
    "engram_pad_token_id",
    "hidden_size",
    "hc_mult",
    "rms_norm_eps",
    "vocab_size",
)


def open_memory(path: Path, names: Names | None = None, tokenizer: Path | None = None) -> ForeignMemory:
    """The memory of a checkpoint's folder: config.json, tokenizer.json (or `tokenizer`), safetensors files.

    Raises:
      ConfigError: the settings are not V4.1's, or the hash constants that follow from them are not the checkpoint's.
      RunError: a file or tensor is missing, or cut short.
    """
    names = names or Names()
    folder = Folder(path)
    settings = text_settings(folder, NEEDED, "DeepSeek-V4.1")
    sizes = settings["engram_vocab_size"]
    engram = EngramConfig(
        engram_layer_ids=tuple(settings["engram_layer_ids"]),
        engram_variant="deepseek_v41",
        engram_max_ngram_size=settings["engram_max_ngram_size"],
        engram_n_heads=settings["engram_n_heads"],
        engram_head_dim=settings["engram_head_dim"],
        engram_vocab_size=tuple(sizes) if isinstance(sizes, list) else sizes,
        engram_pad_token_id=settings["engram_pad_token_id"],
        engram_compressed_vocab_size=settings.get("engram_compressed_vocab_size") or 0,
        engram_kernel_size=0,
        engram_seed=settings.get("engram_seed") or 0,
    )
    for name in ("wkv.bias", "conv1d.weight", "short_conv.conv.weight"):
        require(
            not has(folder, f"engram.{name}"),
            f"{path} has engram.{name}: V4.1's memory has no biases and no convolution, so this is another model's.",
        )
    token_map = TokenMap.from_tokenizer(str(tokenizer or path / "tokenizer.json"))
    token_map.check(engram, token_map.vocab_size)
    constants = hash_constants(engram, token_map)
    if (published := settings.get("engram_num_embeddings")) is not None:
        rows = [constants.num_rows(layer) for layer in engram.engram_layer_ids]
        check_constant(f"{path / 'config.json'}: engram_num_embeddings", published, rows)

    M, D, E = settings["hc_mult"], settings["hidden_size"], engram.memory_dim
    sources, readers = {}, {}
    for layer in engram.engram_layer_ids:
        parts = find_parts(folder, names.rows.format(layer=layer))
        scales = find_parts(folder, names.row_scales.format(layer=layer)) if parts[0].dtype == FP8 else ()
        total = sum(part.num_rows for part in parts)
        expected = constants.num_rows(layer)
        require(
            total == expected and all(part.shape[1:] == (engram.engram_head_dim,) for part in parts),
            f"{parts[0].file}: {parts[0].name} has {total:,} rows of {parts[0].shape[1:]}, and config.json makes it "
            f"{expected:,} of ({engram.engram_head_dim},): rows are addressed modulo the heads' sizes, so a table of "
            "another size means nothing.",
        )
        sources[str(layer)] = RowSource(parts, expected, scales)
        wkv, gains = find(folder, names.wkv.format(layer=layer)), {}
        wkv_scales = [name.format(layer=layer) for name in names.wkv_scale]
        scale = find(folder, *wkv_scales) if wkv.dtype == FP8 else None
        matrix = dequantized(wkv, scale, ((M + 1) * D, E))
        for ours, theirs in (("query_norm", names.query_gain), ("key_norm", names.key_gain)):
            gains[ours] = shaped(find(folder, theirs.format(layer=layer)), (M, D))
        readers[str(layer)] = {"key_value_emd": matrix.reshape(M + 1, D, E).transpose(2, 0, 1), **gains}
    model = {name: settings[name] for name in ("hidden_size", "hc_mult", "rms_norm_eps", "vocab_size")}
    return ForeignMemory(path, engram, model, token_map, sources, readers)
