"""Attention of new tokens to a cache of keys and values: prefill in chunks and decoding, one token or many at a time.

A cache holds position p of a sequence in place p. New tokens are written behind what a sequence has, then attend to
every place up to their own; what stands beyond (padding of a chunk, tokens taken back) is masked by that alone and is
overwritten later. Multi-head latent attention keeps the compressed latent and the one rope key only, kv_lora_rank +
qk_rope_head_dim numbers a token and layer, and reads them with absorbed projections (DeepSeek-V2, section 2.1.2):
q k = (q W_k) c and W_v sum(p c), so keys and values of single heads never exist.

Letters: B batch, T new position, S place in the cache, L layers of a stack, D hidden, N query head, G key-value head,
H key width, V value width, Q query heads per key-value head, R width of the compressed latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.config import AttentionConfig
from engram_jax.layers.attention import GQA, MLA
from engram_jax.layers.rope import rope, softmax_scale
from engram_jax.sharding import in_use, placed, spec

KEY_BLOCK = 512
"""Places of the cache whose scores exist at a time; blocks that no sequence has reached are not read."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """What a stack of layers keeps of every token."""

    k_LBSGH: jax.Array
    """MLA: latent and rope key side by side, G = 1."""
    v_LBSGV: jax.Array | None
    """None for MLA, whose values are the first R numbers of the keys."""


def new_keys_values(config: AttentionConfig, layers: int, batch: int, places: int, dtype: str) -> KeysValues:
    """Zeros, for `places` tokens (a multiple of KEY_BLOCK, or less than it) of each sequence."""
    if config.kind == "mla":
        shape = (layers, batch, places, 1, config.kv_lora_rank + config.qk_rope_head_dim)
        return KeysValues(jnp.zeros(shape, dtype, out_sharding=spec(None, "batch", None, None, None)), None)
    shape = (layers, batch, places, config.num_key_value_heads, config.qk_head_dim)
    k, v = (jnp.zeros(shape, dtype, out_sharding=spec(None, "batch", None, "heads", None)) for _ in range(2))
    return KeysValues(k, v)


def extend(
    attn: MLA | GQA, x_BTD: jax.Array, kept: KeysValues, layer: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, KeysValues]:
    """The layer's output for T new tokens of each sequence, and what is kept after them.

    Equal to `attn` of the whole sequences. length_B: tokens that each sequence has already; every sequence needs room
    for T more. `layer` picks the layer of the stack.
    """
    if isinstance(attn, MLA):
        return _extend_mla(attn, x_BTD, kept, layer, length_B)
    return _extend_gqa(attn, x_BTD, kept, layer, length_B)


def positions_after(length_B: jax.Array, count: int) -> jax.Array:
    """Positions of the next `count` tokens: int32 [B, T]."""
    return length_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


def _extend_mla(attn: MLA, x_BTD, kept, layer, length_B):
    c, dtype = attn.config, x_BTD.dtype
    act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")
    positions_BT = placed(positions_after(length_B, x_BTD.shape[1]), "batch", "seq")
    q_dnh = in_use(attn.q_dnh[...], "embed", "heads", None, dtype=dtype)
    kv_down_dr = in_use(attn.kv_down_dr[...], "embed", "latent", dtype=dtype)
    o_nhd = in_use(attn.o_nhd[...], "heads", None, "embed", dtype=dtype)
    up_k_rnh, up_v_rnv = jnp.split(attn.kv_up_rnh[...].astype(dtype), [c.qk_nope_head_dim], axis=-1)

    q_nope, q_pe = jnp.split(jnp.einsum("btd,dnh->btnh", x_BTD, q_dnh, out_sharding=heads), [c.qk_nope_head_dim], -1)
    absorbed_BTNR = jnp.einsum("btnh,rnh->btnr", q_nope, up_k_rnh, out_sharding=heads)
    q_BTNH = jnp.concatenate([absorbed_BTNR, rope(q_pe, positions_BT, c)], axis=-1)

    latent_BTR, k_pe = jnp.split(
        jnp.einsum("btd,dr->btr", x_BTD, kv_down_dr, out_sharding=act), [c.kv_lora_rank], axis=-1
    )
    k_BTGH = jnp.concatenate([attn.kv_norm(latent_BTR)[:, :, None], rope(k_pe[:, :, None], positions_BT, c)], axis=-1)
    y_BTNR, kept = _attend(q_BTNH, k_BTGH, None, kept, layer, length_B, softmax_scale(c), c.kv_lora_rank)
    y_BTNV = jnp.einsum("btnr,rnv->btnv", y_BTNR, up_v_rnv, out_sharding=heads)
    return jnp.einsum("btnv,nvd->btd", y_BTNV, o_nhd, out_sharding=act), kept


def _extend_gqa(attn: GQA, x_BTD, kept, layer, length_B):
    c, dtype = attn.config, x_BTD.dtype
    act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")
    positions_BT = placed(positions_after(length_B, x_BTD.shape[1]), "batch", "seq")
    q_BTNH, k_BTGH, v_BTGV = (
        jnp.einsum("btd,dnh->btnh", x_BTD, in_use(w[...], "embed", "heads", None, dtype=dtype), out_sharding=heads)
        for w in (attn.q_dnh, attn.k_dgh, attn.v_dgh)
    )
    q_BTNH, k_BTGH = rope(q_BTNH, positions_BT, c), rope(k_BTGH, positions_BT, c)
    y_BTNV, kept = _attend(q_BTNH, k_BTGH, v_BTGV, kept, layer, length_B, softmax_scale(c), c.qk_head_dim)
    o_nhd = in_use(attn.o_nhd[...], "heads", None, "embed", dtype=dtype)
    return jnp.einsum("btnv,nvd->btd", y_BTNV, o_nhd, out_sharding=act), kept


def _attend(q_BTNH, k_BTGH, v_BTGV, kept: KeysValues, layer, length_B, scale: float, value_width: int):
    """Writes the new keys and values and attends to all: each device its own sequences and heads."""

    def local(q, k_new, v_new, kept: KeysValues, layer, length_B):
        k_LBSGH = _write(kept.k_LBSGH, k_new, layer, length_B)
        v_LBSGV = None if kept.v_LBSGV is None else _write(kept.v_LBSGV, v_new, layer, length_B)
        kept = KeysValues(k_LBSGH, v_LBSGV)
        return _softmax_over_blocks(q, kept, layer, length_B, scale, value_width), kept

    arrays = (q_BTNH, k_BTGH, v_BTGV, kept, layer, length_B)
    if (heads := spec("batch", "seq", "heads", None)) is None:
        return local(*arrays)
    groups = None if v_BTGV is None else "heads"  # MLA's one key and value serve all heads
    keys = spec("batch", "seq", groups, None)
    places = jax.tree.map(lambda _: spec(None, "batch", None, groups, None), kept)
    specs = (heads, keys, None if v_BTGV is None else keys, places, jax.P(), spec("batch"))
    return jax.shard_map(local, in_specs=specs, out_specs=(heads, places), check_vma=False)(*arrays)


def _write(kept_LBSGH: jax.Array, new_BTGH: jax.Array, layer: jax.Array, length_B: jax.Array) -> jax.Array:
    """In place where the cache is donated. There is room: see `extend`."""
    sequence_B1 = jnp.arange(len(length_B), dtype=jnp.int32)[:, None]
    places_BT = positions_after(length_B, new_BTGH.shape[1])
    return kept_LBSGH.at[layer, sequence_B1, places_BT].set(new_BTGH.astype(kept_LBSGH.dtype), mode="drop")


def _softmax_over_blocks(
    q_BTNH: jax.Array, kept: KeysValues, layer: jax.Array, length_B: jax.Array, scale: float, value_width: int
) -> jax.Array:
    """softmax(q k scale) v of all places up to each query's own, y_BTNV in `q.dtype`.

    Blocks of keys in turn, with the running maximum and sum of the softmax (Milakov & Gimelshein 2018): memory does
    not grow with the context, and the work grows with the longest sequence, not with the size of the cache.
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
