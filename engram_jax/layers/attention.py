"""Causal attention inside documents: multi-head latent attention (DeepSeek-V2) and grouped-query attention.

Letters: B batch, T query position, S key position, D hidden, N query head, G key-value head, H query-key head width,
V value head width, R width of the compressed latent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from engram_jax.config import AttentionConfig, ModelConfig
from engram_jax.layers.norm import RMSNorm
from engram_jax.layers.rope import rope
from engram_jax.sharding import spec


def causal_mask(length: int, segment_ids_BT: jax.Array | None) -> jax.Array:
    """mask_BTS (or one for all rows, [1, T, S]): True where a query may look: not ahead, not into another segment.

    Every query may look at itself, padding (segment 0) included, so no softmax is empty.
    """
    causal_1TS = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BT is None:
        return causal_1TS
    return causal_1TS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def attention(q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(H)) v -> y_BTNV in `q.dtype`; scores and softmax in float32 or wider.

    N must be a multiple of G: query heads n*N/G .. share a key-value head. The softmax is normalised after the product
    with v: a division of T x V numbers instead of T x S (1.3 times faster forward and backward on CPU).
    """
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    repeats = q_BTNH.shape[2] // k_BSGH.shape[2]
    k_BSNH, v_BSNV = (jnp.repeat(a, repeats, axis=2) if repeats > 1 else a for a in (k_BSGH, v_BSGV))
    score_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, preferred_element_type=wide) * q_BTNH.shape[-1] ** -0.5
    score_BNTS = jnp.where(mask_BTS[:, None], score_BNTS, jnp.finfo(wide).min)
    largest_BNT1 = jax.lax.stop_gradient(jnp.max(score_BNTS, axis=-1, keepdims=True))
    share_BNTS = jnp.exp(score_BNTS - largest_BNT1)
    total_BTN1 = jnp.einsum("bnts->btn", share_BNTS)[..., None]
    y_BTNV = jnp.einsum("bnts,bsnv->btnv", share_BNTS.astype(q_BTNH.dtype), v_BSNV, preferred_element_type=wide)
    return (y_BTNV / total_BTN1).astype(q_BTNH.dtype)


class MLA(nnx.Module):
    """Keys and values of all heads come from one normalised latent of `kv_lora_rank`; position goes through a separate
    rope part whose key all heads share. Queries are full-rank (paper.md 2.2 of the 27B model: no query compression)."""

    def __init__(
        self, hidden_size: int, config: AttentionConfig, eps: float, std: float, out_std: float, *, rngs: nnx.Rngs
    ):
        D, N, R = hidden_size, config.num_attention_heads, config.kv_lora_rank
        nope, pe, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        dims = {"q": ("embed", "heads", None), "kv_up": ("latent", "heads", None), "o": ("heads", None, "embed")}
        self.q_dnh = nnx.Param(
            normal(std)(rngs.params(), (D, N, nope + pe), jnp.float32, out_sharding=spec(*dims["q"]))
        )
        self.kv_down_dr = nnx.Param(
            normal(std)(rngs.params(), (D, R + pe), jnp.float32, out_sharding=spec("embed", "latent"))
        )
        self.kv_norm = RMSNorm(R, eps)
        self.kv_up_rnh = nnx.Param(
            normal(std)(rngs.params(), (R, N, nope + V), jnp.float32, out_sharding=spec(*dims["kv_up"]))
        )
        self.o_nhd = nnx.Param(normal(out_std)(rngs.params(), (N, V, D), jnp.float32, out_sharding=spec(*dims["o"])))
        self.config = config

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """x_BTD -> y_BTD; positions count from the start of each document, segment id 0 is padding."""
        c, dtype = self.config, x_BTD.dtype
        act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")

        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, self.q_dnh[...].astype(dtype), out_sharding=heads)
        q_nope, q_pe = jnp.split(q_BTNH, [c.qk_nope_head_dim], axis=-1)
        q_BTNH = jnp.concatenate([q_nope, rope(q_pe, positions_BT, c.rope_theta)], axis=-1)

        latent_BSR = jnp.einsum("btd,dr->btr", x_BTD, self.kv_down_dr[...].astype(dtype), out_sharding=act)
        latent_BSR, k_pe = jnp.split(latent_BSR, [c.kv_lora_rank], axis=-1)
        kv_up_rnh = self.kv_up_rnh[...].astype(dtype)
        kv_BSNH = jnp.einsum("bsr,rnh->bsnh", self.kv_norm(latent_BSR), kv_up_rnh, out_sharding=heads)
        k_nope, v_BSNV = jnp.split(kv_BSNH, [c.qk_nope_head_dim], axis=-1)
        k_pe = jnp.repeat(rope(k_pe[:, :, None], positions_BT, c.rope_theta), c.num_attention_heads, axis=2)
        k_BSNH = jnp.concatenate([k_nope, k_pe], axis=-1)

        y_BTNV = attention(q_BTNH, k_BSNH, v_BSNV, causal_mask(x_BTD.shape[1], segment_ids_BT))
        return jnp.einsum("btnv,nvd->btd", y_BTNV, self.o_nhd[...].astype(dtype), out_sharding=act)


class GQA(nnx.Module):
    """Grouped-query attention with rope on the whole head (width qk_nope + qk_rope for queries, keys and values)."""

    def __init__(self, hidden_size: int, config: AttentionConfig, std: float, out_std: float, *, rngs: nnx.Rngs):
        D, N, G, H = hidden_size, config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
        into, out = spec("embed", "heads", None), spec("heads", None, "embed")
        self.q_dnh = nnx.Param(normal(std)(rngs.params(), (D, N, H), jnp.float32, out_sharding=into))
        self.k_dgh = nnx.Param(normal(std)(rngs.params(), (D, G, H), jnp.float32, out_sharding=into))
        self.v_dgh = nnx.Param(normal(std)(rngs.params(), (D, G, H), jnp.float32, out_sharding=into))
        self.o_nhd = nnx.Param(normal(out_std)(rngs.params(), (N, H, D), jnp.float32, out_sharding=out))
        self.config = config

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """x_BTD -> y_BTD; positions count from the start of each document, segment id 0 is padding."""
        dtype, theta = x_BTD.dtype, self.config.rope_theta
        act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")
        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, self.q_dnh[...].astype(dtype), out_sharding=heads)
        k_BSGH = jnp.einsum("bsd,dgh->bsgh", x_BTD, self.k_dgh[...].astype(dtype), out_sharding=heads)
        v_BSGH = jnp.einsum("bsd,dgh->bsgh", x_BTD, self.v_dgh[...].astype(dtype), out_sharding=heads)
        q_BTNH, k_BSGH = rope(q_BTNH, positions_BT, theta), rope(k_BSGH, positions_BT, theta)
        y_BTNH = attention(q_BTNH, k_BSGH, v_BSGH, causal_mask(x_BTD.shape[1], segment_ids_BT))
        return jnp.einsum("btnh,nhd->btd", y_BTNH, self.o_nhd[...].astype(dtype), out_sharding=act)


def make_attention(config: ModelConfig, *, rngs: nnx.Rngs) -> MLA | GQA:
    """The attention that `config.attention.kind` names; the output projection starts 1/sqrt(2 layers) smaller."""
    std = config.initializer_range
    out_std = std * (2 * config.num_hidden_layers) ** -0.5
    if config.attention.kind == "mla":
        return MLA(config.hidden_size, config.attention, config.rms_norm_eps, std, out_std, rngs=rngs)
    return GQA(config.hidden_size, config.attention, std, out_std, rngs=rngs)
