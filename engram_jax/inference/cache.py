"""What decoding keeps of each sequence: keys and values, the last canonical ids, the newest inputs of the readers.

N-gram windows and readers look back a few positions, so the memory's part is short. It holds the newest positions, the
newest last; before a sequence's start it holds id -1 and zeros, which windows and readers take for a beginning. The
cache moves by the number of *accepted* tokens: results of padding or of rejected drafts are not kept. `rollback` takes
tokens back: attention masks and overwrites what lies behind the new end, and the memory's part keeps `spare` positions
more than it reads, to shift back to.

Legend: B batch, W kept positions, L layers of a stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.layers.attention import attention_class
from engram_jax.layers.cached_attention import KEY_BLOCK
from engram_jax.layers.reader import reader_class, windows
from engram_jax.model import segments
from engram_jax.sharding import spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding keeps of B sequences."""

    length_B: jax.Array
    """int32: accepted tokens of each sequence."""
    attention: dict[str, Any]
    """What the attention of each stack of blocks (`Segment.name`) keeps: arrays [L, B, ...]."""
    canonical_BW: jax.Array
    """int32: canonical ids of the newest tokens, -1 before the start. Empty (W = 0) without memory."""
    readers: dict[str, Any]
    """What each Engram layer's reader keeps: arrays [B, W, ...]. A reader that looks at one position has no entry."""


def new_cache(config: ModelConfig, batch: int, max_len: int, spare: int = 0) -> Cache:
    """The cache of `batch` empty sequences. Call under the mesh.

    Args:
      max_len: tokens that a sequence may have, the padding of its last chunk included.
      spare: how many tokens `rollback` can take back.
    """
    places = max_len if max_len <= KEY_BLOCK else -(-max_len // KEY_BLOCK) * KEY_BLOCK
    engram, attention, reader = config.engram, attention_class(config), reader_class(config.engram)
    window = engram.engram_max_ngram_size - 1 + spare if engram.enabled else 0
    kept = {str(layer): reader.new_cache(config, batch, spare) for layer in engram.engram_layer_ids}
    return Cache(
        length_B=jnp.zeros(batch, jnp.int32, out_sharding=spec("batch")),
        attention={s.name: attention.new_cache(config, s.stop - s.start, batch, places) for s in segments(config)},
        canonical_BW=jnp.full((batch, window), -1, jnp.int32, out_sharding=spec("batch", None)),
        readers={layer: cache for layer, cache in kept.items() if cache is not None},
    )


def reset(cache: Cache, ends_B: jax.Array) -> Cache:
    """The cache in which sequences begin anew where `ends_B` is True; attention masks what they held."""

    def cleared(kept: jax.Array, value: float) -> jax.Array:
        return jnp.where(ends_B.reshape(-1, *[1] * (kept.ndim - 1)), jnp.asarray(value, kept.dtype), kept)

    readers = jax.tree.map(lambda kept: cleared(kept, 0), cache.readers)
    return Cache(cleared(cache.length_B, 0), cache.attention, cleared(cache.canonical_BW, -1), readers)


def rollback(cache: Cache, count_B: jax.Array) -> Cache:
    """The cache without each sequence's newest `count_B` tokens.

    count_B: at most the tokens that a sequence has. All calls together may go back at most `spare` tokens from the
    longest that the sequence ever was: what has left the memory's windows does not come back.
    """

    def earlier(kept: jax.Array, nothing: float) -> jax.Array:
        width = kept.shape[1]
        before = jnp.full_like(kept, nothing)
        return windows(jnp.concatenate([before, kept], axis=1), width - count_B, width)

    readers = jax.tree.map(lambda kept: earlier(kept, 0), cache.readers)
    return Cache(cache.length_B - count_B, cache.attention, earlier(cache.canonical_BW, -1), readers)


def fork(cache: Cache, index_B: jax.Array) -> Cache:
    """The cache whose sequence i continues sequence `index_B[i]`: read a prompt once, continue it many times.

    On a mesh all sequences are gathered: use it between steps, not in them.
    """

    def take(kept: jax.Array, axis: int) -> jax.Array:
        sharding = jax.typeof(kept).sharding
        if sharding.mesh.empty:
            return jnp.take(kept, index_B, axis=axis)
        whole = jax.reshard(kept, jax.P(*[None] * kept.ndim))
        return jax.reshard(jnp.take(whole, jax.reshard(index_B, jax.P(None)), axis=axis), sharding.spec)

    kept = {name: jax.tree.map(lambda x: take(x, 1), kv) for name, kv in cache.attention.items()}
    readers = jax.tree.map(lambda x: take(x, 0), cache.readers)
    return Cache(take(cache.length_B, 0), kept, take(cache.canonical_BW, 0), readers)
