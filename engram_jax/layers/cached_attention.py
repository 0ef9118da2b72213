"""Attention of new tokens to a cache of keys and values: prefill in chunks and decoding, one token or many at a time.

A cache holds position p of a sequence in place p. New tokens are written behind what a sequence has, then attend to
every place up to their own. What stands beyond (padding of a chunk, tokens taken back) is masked by that alone, and is
overwritten later.

Letters: B batch, T new position, S place in the cache, L layers of a stack, N query head, G key-value head, H key
width, V value width, Q query heads per key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.sharding import spec

KEY_BLOCK = 512
"""Places of the cache whose scores exist at a time; blocks that no sequence has reached are not read."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """What a stack of layers keeps of every token."""

    k_LBSGH: jax.Array
    v_LBSGV: jax.Array | None
    """None: the values are the first V numbers of the keys."""


def positions_after(length_B: jax.Array, count: int) -> jax.Array:
    """Positions of the next `count` tokens: int32 [B, T]."""
    return length_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


def attend_cached(
    q_BTNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGV: jax.Array | None,
    kept: KeysValues,
    layer: jax.Array,
    length_B: jax.Array,
    scale: float,
    value_width: int,
) -> tuple[jax.Array, KeysValues]:
    """y_BTNV of T new tokens in `q.dtype`, and the cache with their keys and values in it.

    Each device computes its own sequences and heads.

    Args:
      v_BTGV: None if the cache keeps no values: they are the first `value_width` numbers of the keys.
      kept: the cache of the stack. Its dim G lies on devices as the dim G of the new keys does.
      layer: int32 scalar, which layer of the stack.
      length_B: int32, the tokens that each sequence has already. There must be room for T more.
      scale: factor of the scores.
    """

    def local(q, k_new, v_new, kept: KeysValues, layer, length_B):
        k_LBSGH = _write(kept.k_LBSGH, k_new, layer, length_B)
        v_LBSGV = None if kept.v_LBSGV is None else _write(kept.v_LBSGV, v_new, layer, length_B)
        kept = KeysValues(k_LBSGH, v_LBSGV)
        return _softmax_over_blocks(q, kept, layer, length_B, scale, value_width), kept

    arrays = (q_BTNH, k_BTGH, v_BTGV, kept, layer, length_B)
    if (heads := spec("batch", "seq", "heads", None)) is None:
        return local(*arrays)
    places = jax.tree.map(lambda kept: jax.typeof(kept).sharding.spec, kept)
    keys = jax.P(*heads[:2], places.k_LBSGH[3], None)
    specs = (heads, keys, None if v_BTGV is None else keys, places, jax.P(), spec("batch"))
    return jax.shard_map(local, in_specs=specs, out_specs=(heads, places), check_vma=False)(*arrays)


def _write(kept_LBSGH: jax.Array, new_BTGH: jax.Array, layer: jax.Array, length_B: jax.Array) -> jax.Array:
    """In place where the cache is donated."""
    sequence_B1 = jnp.arange(len(length_B), dtype=jnp.int32)[:, None]
    places_BT = positions_after(length_B, new_BTGH.shape[1])
    return kept_LBSGH.at[layer, sequence_B1, places_BT].set(new_BTGH.astype(kept_LBSGH.dtype), mode="drop")


def _softmax_over_blocks(
    q_BTNH: jax.Array, kept: KeysValues, layer: jax.Array, length_B: jax.Array, scale: float, value_width: int
) -> jax.Array:
    """softmax(q k scale) v of all places up to each query's own, y_BTNV in `q.dtype`.

    One block of keys after the other, with the running maximum and sum of the softmax (Milakov & Gimelshein 2018):
    memory does not grow with the context, and the work grows with the longest sequence, not with the cache.
    """
    B, T, N, H = q_BTNH.shape
    S, G = kept.k_LBSGH.shape[2:4]
    block, wide = min(KEY_BLOCK, S), jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTGQH = q_BTNH.reshape(B, T, G, N // G, H)
    position_BT = positions_after(length_B, T)

    def places(array_LBSGH: jax.Array, i: jax.Array) -> jax.Array:
        start, size = (layer, 0, i * block, 0, 0), (1, B, block, *array_LBSGH.shape[3:])
        return jax.lax.dynamic_slice(array_LBSGH, start, size)[0]

    def one_block(i, carry):
        largest, total, y = carry
        k_BSGH = places(kept.k_LBSGH, i)
        v_BSGV = k_BSGH[..., :value_width] if kept.v_LBSGV is None else places(kept.v_LBSGV, i)
        score = jnp.einsum("btgqh,bsgh->btgqs", q_BTGQH, k_BSGH, preferred_element_type=wide) * scale
        place_S = i * block + jnp.arange(block, dtype=jnp.int32)
        visible_BTS = place_S[None, None] <= position_BT[..., None]
        score = jnp.where(visible_BTS[:, :, None, None], score, jnp.finfo(wide).min)
        now_largest = jnp.maximum(largest, jnp.max(score, axis=-1))
        # Place 0 is visible to every query, so after the first block the maximum is a score.
        share, shrink = jnp.exp(score - now_largest[..., None]), jnp.exp(largest - now_largest)
        y_new = jnp.einsum("btgqs,bsgv->btgqv", share.astype(q_BTNH.dtype), v_BSGV, preferred_element_type=wide)
        return now_largest, total * shrink + jnp.sum(share, axis=-1), y * shrink[..., None] + y_new

    start = (
        jnp.full((B, T, G, N // G), jnp.finfo(wide).min, wide),
        jnp.zeros((B, T, G, N // G), wide),
        jnp.zeros((B, T, G, N // G, value_width), wide),
    )
    num_blocks = (jnp.max(length_B) + T + block - 1) // block
    _, total, y = jax.lax.fori_loop(0, jnp.minimum(num_blocks, S // block), one_block, start)
    return (y / total[..., None]).reshape(B, T, N, value_width).astype(q_BTNH.dtype)
