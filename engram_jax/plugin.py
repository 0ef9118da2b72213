"""Engram as one layer of any Flax model: token ids and hidden states in, an update of the hidden states out.

Legend: B batch, T seq, M residual streams, D hidden size, H rows per token, d row width.
"""

from __future__ import annotations

import os
from typing import Any

import jax
from flax import nnx
from tokenizers import Tokenizer

from engram_jax.config import EngramConfig, ModelConfig, require
from engram_jax.layers.reader import reader_class
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.dense_table import DenseTable
from engram_jax.memory.hashing import canonicalize, hash_constants, ngram_row_ids


class Engram(nnx.Module):
    """One Engram layer for a model of your own: an n-gram hash, a table of rows, and the reader that gates them.

    The update is added to the residual stream before the block that shall use it (arXiv 2601.07372, section 2):

        engram = Engram(EngramConfig(engram_layer_ids=(1,), engram_vocab_size=50_000), token_map, 128, rngs=rngs)
        x_BTD = x_BTD + engram(x_BTD, tokens_BT)

    The table is an ordinary parameter, so any optax optimizer trains it and every step passes over all its rows. Above
    about a million rows take `MemoryStore` with `EngramReader`: they read and update only the rows of a batch.

    Attributes:
      constants: `HashConstants`, which fix the row of every n-gram.
      table: `DenseTable`, float32 [rows, d].
      reader: `EngramReader`, or the reader that `config.engram_without` asks for.
    """

    def __init__(
        self,
        config: EngramConfig,
        tokenizer: TokenMap | Tokenizer | str | os.PathLike[str],
        hidden_size: int,
        *,
        layer: int | None = None,
        streams: int = 1,
        rms_norm_eps: float = 1e-6,
        shard_over: str | tuple[str, ...] = (),
        rngs: nnx.Rngs,
    ):
        """
        Args:
          config: the memory. `engram_initializer_range=0` makes the first update zero, for a model that is trained
            already.
          tokenizer: what `config`'s hash needs to know of it: a `TokenMap`, a `tokenizers.Tokenizer`, or the path of a
            tokenizer.json.
          hidden_size: D.
          layer: which of `config.engram_layer_ids` this layer is; may be left out if there is only one. Layers have
            different hashes, so that two layers do not lose the same n-grams to collisions.
          streams: M, the residual streams of a model with hyper-connections. 1: an ordinary residual model.
          rms_norm_eps: epsilon of the norms of hidden state and key, eq. 4.
          shard_over: axes of the current mesh to cut the rows over, see `DenseTable`.
          rngs: `rngs.params()` gives the keys of the reader's weights and of the rows.

        Raises:
          ConfigError: the layer is not in the config, or config and tokenizer do not fit.
        """
        ids = config.engram_layer_ids
        require(
            len(ids) == 1 if layer is None else layer in ids,
            f"layer={layer} must be one of engram_layer_ids={ids}." + " Set both." * (not ids),
        )
        require(
            config.vocab_share == 1,
            f"engram_variant={config.engram_variant!r} also scales the embedding of the vocabulary, which a layer "
            "cannot reach: choose 'paper', or build an engram_jax.Model.",
        )
        self.layer = ids[0] if layer is None else layer
        self.token_map = tokenizer if isinstance(tokenizer, TokenMap) else TokenMap.from_tokenizer(tokenizer)
        self.constants = hash_constants(config, self.token_map)
        sizes = ModelConfig(
            vocab_size=self.token_map.vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=ids[-1] + 1,
            hc_mult=streams,
            rms_norm_eps=rms_norm_eps,
            engram=config,
        )
        self.token_map.check(config, sizes.vocab_size)
        self.streams, self.cross_documents = streams, config.engram_cross_documents
        self.reader: Any = reader_class(config)(sizes, rngs=rngs)
        self.table = DenseTable(
            self.constants.num_rows(self.layer),
            config.engram_head_dim,
            std=config.engram_initializer_range,
            shard_over=shard_over,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """The update of the hidden states, to be added to them; its shape and dtype are those of `x`.

        Args:
          x: hidden states [B, T, D], or [B, T, M, D] of M streams; any float dtype.
          tokens_BT: raw token ids [B, T], any integer dtype. An id outside the vocabulary hides itself and ends the
            n-gram window.
          segment_ids_BT: int [B, T], the document of each token in packed rows. None: each row is one document.

        Raises:
          ConfigError: `x` does not have M streams.
        """
        is_plain = x.ndim == 3
        x_BTMD = x[:, :, None] if is_plain else x
        require(
            x_BTMD.ndim == 4 and x_BTMD.shape[2] == self.streams,
            f"x has shape {x.shape}: it must be [batch, seq, hidden_size], or with streams={self.streams} "
            "[batch, seq, streams, hidden_size].",
        )
        update_BTMD = self.reader(x_BTMD, self.table(self.row_ids(tokens_BT, segment_ids_BT)), segment_ids_BT)
        return update_BTMD[:, :, 0] if is_plain else update_BTMD

    def row_ids(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Rows of the table that each token reads: int32 [B, T, H]. The same as `MemoryStore` with this config."""
        segments_BT = None if self.cross_documents else segment_ids_BT
        return ngram_row_ids(self.constants, self.layer, canonicalize(self.token_map, tokens_BT), segments_BT)
