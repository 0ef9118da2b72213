"""What a sequence leaves behind for its next token: keys and values, the last canonical ids, the convolution's inputs.

An n-gram window and the short convolution reach back a few positions, so the memory's part of the state is short: it
holds the newest positions, newest last, and nothing (id -1, gate 0) before a sequence's start, which is how both treat
a beginning. Everything moves by the number of *accepted* tokens; what padding or rejected drafts computed is not kept.
`rollback` takes tokens back: keys and values behind the new end are masked and overwritten, and the memory's part
keeps `spare` positions more than it reads, so that there is something to shift back to.

Legend: B batch, T seq, S places in the cache, W kept positions, M residual streams, D hidden size, L layers of a stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.layers.cached_attention import KEY_BLOCK, KeysValues, new_keys_values
from engram_jax.model import segments
from engram_jax.sharding import spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatedValues:
    """The newest inputs of an Engram layer's convolution."""

    gate_BWM: jax.Array
    value_BWD: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    length_B: jax.Array
    """int32: accepted tokens of each sequence."""
    attention: dict[str, KeysValues]
    """By stack of blocks (`Segment.name`)."""
    canonical_BW: jax.Array
    """int32: canonical ids of the newest tokens, -1 before the start. Empty (W = 0) without memory."""
    gated: dict[str, GatedValues]
    """By Engram layer; none without convolution."""


def new_cache(config: ModelConfig, batch: int, max_len: int, spare: int = 0) -> Cache:
    """The cache of `batch` empty sequences. Call under the mesh.

    max_len: tokens a sequence may have, the padding of its last chunk included. spare: how many tokens `rollback` can
    take back.
    """
    places = max_len if max_len <= KEY_BLOCK else -(-max_len // KEY_BLOCK) * KEY_BLOCK
    engram, dtype = config.engram, config.dtype
    attention = {
        s.name: new_keys_values(config.attention, s.stop - s.start, batch, places, dtype) for s in segments(config)
    }
    window = engram.engram_max_ngram_size - 1 + spare if engram.enabled else 0
    reach = max(engram.engram_kernel_size - 1, 0) * engram.engram_max_ngram_size
    gated = {}
    if reach:
        kept = spec("batch", None, None)
        for layer in engram.engram_layer_ids:
            wide = jnp.promote_types(dtype, jnp.float32)
            gate = jnp.zeros((batch, reach + spare, config.engram_branches), wide, out_sharding=kept)
            value = jnp.zeros((batch, reach + spare, config.hidden_size), dtype, out_sharding=kept)
            gated[str(layer)] = GatedValues(gate, value)
    return Cache(
        length_B=jnp.zeros(batch, jnp.int32, out_sharding=spec("batch")),
        attention=attention,
        canonical_BW=jnp.full((batch, window), -1, jnp.int32, out_sharding=spec("batch", None)),
        gated=gated,
    )


def reset(cache: Cache, ends_B: jax.Array) -> Cache:
    """Sequences where `ends_B` is True begin anew; their keys and values are masked from now on."""

    def cleared(kept: jax.Array, value: float) -> jax.Array:
        return jnp.where(ends_B.reshape(-1, *[1] * (kept.ndim - 1)), jnp.asarray(value, kept.dtype), kept)

    gated = jax.tree.map(lambda kept: cleared(kept, 0), cache.gated)
    return Cache(cleared(cache.length_B, 0), cache.attention, cleared(cache.canonical_BW, -1), gated)


def rollback(cache: Cache, count_B: jax.Array) -> Cache:
    """The cache without each sequence's newest `count_B` tokens: at most what it has, and not to more than `spare`
    before the furthest that it ever reached, since what moves out of the memory's windows does not come back."""

    def earlier(kept: jax.Array, nothing: float) -> jax.Array:
        width = kept.shape[1]
        before = jnp.full_like(kept, nothing)
        return _windows(jnp.concatenate([before, kept], axis=1), width - count_B, width)

    gated = jax.tree.map(lambda kept: earlier(kept, 0), cache.gated)
    return Cache(cache.length_B - count_B, cache.attention, earlier(cache.canonical_BW, -1), gated)


def fork(cache: Cache, index_B: jax.Array) -> Cache:
    """Sequence i of the result goes on from sequence `index_B[i]`: a prompt read once, continued many times.

    On a mesh all sequences are gathered, so use it between steps, not in them.
    """

    def take(kept: jax.Array, axis: int) -> jax.Array:
        sharding = jax.typeof(kept).sharding
        if sharding.mesh.empty:
            return jnp.take(kept, index_B, axis=axis)
        whole = jax.reshard(kept, jax.P(*[None] * kept.ndim))
        return jax.reshard(jnp.take(whole, jax.reshard(index_B, jax.P(None)), axis=axis), sharding.spec)

    kept = {name: jax.tree.map(lambda x: take(x, 1), kv) for name, kv in cache.attention.items()}
    gated = jax.tree.map(lambda x: take(x, 0), cache.gated)
    return Cache(take(cache.length_B, 0), kept, take(cache.canonical_BW, 0), gated)


def newest(kept_BW: jax.Array, new_BT: jax.Array, count_B: jax.Array) -> jax.Array:
    """The kept positions after the first `count_B` of T new ones were accepted: [B, W, ...]."""
    joined = jnp.concatenate([kept_BW, new_BT.astype(kept_BW.dtype)], axis=1)
    return _windows(joined, count_B, kept_BW.shape[1])


def _windows(x_BT: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """x[b, start_B[b] : start_B[b] + width] of each sequence."""
    place_BW = start_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.take_along_axis(x_BT, place_BW.reshape(*place_BW.shape, *[1] * (x_BT.ndim - 2)), axis=1)
