"""Causal attention inside documents: multi-head latent attention (DeepSeek-V2) and grouped-query attention.

Letters: B batch, T query position, S key position, D hidden, N query head, G key-value head, H query-key head width,
V value head width, R width of the compressed latent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import PartitionSpec as P

from engram_jax.config import AttentionConfig, ModelConfig
from engram_jax.layers.norm import RMSNorm
from engram_jax.layers.rope import rope, softmax_scale
from engram_jax.layers.splash import splash_attention
from engram_jax.sharding import in_use, platform, sharding_of, spec


def causal_mask(length: int, segment_ids_BT: jax.Array | None) -> jax.Array:
    """mask_BTS (or one for all rows, [1, T, S]): True where a query may look: not ahead, not into another segment.

    Every query may look at itself, padding (segment 0) included, so no softmax is empty.
    """
    causal_1TS = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BT is None:
        return causal_1TS
    return causal_1TS & (segment_ids_BT[:, :, None] == whole_sequence(segment_ids_BT)[:, None, :])


def whole_sequence(x_BT: jax.Array) -> jax.Array:
    """x with all positions on every device that has some of them, whatever follows the first two dims."""
    sharding = sharding_of(x_BT)
    return x_BT if sharding is None else jax.reshard(x_BT, P(sharding.spec[0], None, *sharding.spec[2:]))


def attend(
    q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGV: jax.Array, segment_ids_BT: jax.Array | None, scale: float
) -> jax.Array:
    """Causal attention inside segments, y_BTNV: a kernel on TPU, elsewhere the product of all queries and keys."""
    if platform() == "tpu":
        return splash_attention(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, scale)
    return attention(q_BTNH, k_BSGH, v_BSGV, causal_mask(q_BTNH.shape[1], segment_ids_BT), scale)


def attention(
    q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array, scale: float | None = None
) -> jax.Array:
    """softmax(scale q k) v -> y_BTNV in `q.dtype`; scores and softmax in float32 or wider. scale: 1/sqrt(H) if None.

    N must be a multiple of G: query heads n*N/G .. share a key-value head. The softmax is normalised after the product
    with v: a division of T x V numbers instead of T x S (1.3 times faster forward and backward on CPU).
    """
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    repeats = q_BTNH.shape[2] // k_BSGH.shape[2]
    k_BSNH, v_BSNV = (
        jnp.repeat(a, repeats, axis=2, out_sharding=sharding_of(a)) if repeats > 1 else a for a in (k_BSGH, v_BSGV)
    )
    factor = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    score_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, preferred_element_type=wide) * factor
    score_BNTS = jnp.where(mask_BTS[:, None], score_BNTS, jnp.finfo(wide).min)
    largest_BNT1 = jax.lax.stop_gradient(jnp.max(score_BNTS, axis=-1, keepdims=True))
    share_BNTS = jnp.exp(score_BNTS - largest_BNT1)
    total_BTN1 = jnp.einsum("bnts->btn", share_BNTS)[..., None]
    y_BTNV = jnp.einsum("bnts,bsnv->btnv", share_BNTS.astype(q_BTNH.dtype), v_BSNV, preferred_element_type=wide)
    return (y_BTNV / total_BTN1).astype(q_BTNH.dtype)


class MLA(nnx.Module):
    """Keys and values of all heads come from one normalised latent of `kv_lora_rank`; position goes through a separate
    rope part whose key all heads share. Queries are full-rank (as in mHC's 27B model, arXiv
    2512.24880, table 5)."""

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
        q_dnh = in_use(self.q_dnh[...], "embed", "heads", None, dtype=dtype)
        kv_down_dr = in_use(self.kv_down_dr[...], "embed", "latent", dtype=dtype)
        o_nhd = in_use(self.o_nhd[...], "heads", None, "embed", dtype=dtype)

        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, q_dnh, out_sharding=heads)
        q_nope, q_pe = jnp.split(q_BTNH, [c.qk_nope_head_dim], axis=-1)
        q_BTNH = jnp.concatenate([q_nope, rope(q_pe, positions_BT, c)], axis=-1)

        latent_BTR = jnp.einsum("btd,dr->btr", x_BTD, kv_down_dr, out_sharding=act)
        latent_BTR, k_pe = jnp.split(latent_BTR, [c.kv_lora_rank], axis=-1)
        # A sequence that is cut over devices is joined here, where a key and value of all heads are R + pe numbers.
        latent_BSR = whole_sequence(self.kv_norm(latent_BTR))
        k_pe = whole_sequence(rope(k_pe[:, :, None], positions_BT, c))
        whole_heads = spec("batch", None, "heads", "act")
        kv_BSNH = jnp.einsum("bsr,rnh->bsnh", latent_BSR, self.kv_up_rnh[...].astype(dtype), out_sharding=whole_heads)
        k_nope, v_BSNV = jnp.split(kv_BSNH, [c.qk_nope_head_dim], axis=-1)
        k_pe = jnp.broadcast_to(k_pe, (*k_nope.shape[:3], c.qk_rope_head_dim), out_sharding=whole_heads)
        k_BSNH = jnp.concatenate([k_nope, k_pe], axis=-1)

        y_BTNV = attend(q_BTNH, k_BSNH, v_BSNV, segment_ids_BT, softmax_scale(c))
        return jnp.einsum("btnv,nvd->btd", y_BTNV, o_nhd, out_sharding=act)


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
        c, dtype = self.config, x_BTD.dtype
        act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")
        q_dnh, k_dgh, v_dgh = (
            in_use(w[...], "embed", "heads", None, dtype=dtype) for w in (self.q_dnh, self.k_dgh, self.v_dgh)
        )
        o_nhd = in_use(self.o_nhd[...], "heads", None, "embed", dtype=dtype)
        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, q_dnh, out_sharding=heads)
        k_BTGH = jnp.einsum("btd,dgh->btgh", x_BTD, k_dgh, out_sharding=heads)
        v_BTGH = jnp.einsum("btd,dgh->btgh", x_BTD, v_dgh, out_sharding=heads)
        q_BTNH, k_BTGH = rope(q_BTNH, positions_BT, c), rope(k_BTGH, positions_BT, c)
        y_BTNH = attend(q_BTNH, whole_sequence(k_BTGH), whole_sequence(v_BTGH), segment_ids_BT, softmax_scale(c))
        return jnp.einsum("btnh,nhd->btd", y_BTNH, o_nhd, out_sharding=act)


def make_attention(config: ModelConfig, *, rngs: nnx.Rngs) -> MLA | GQA:
    """The attention that `config.attention.kind` names; the output projection starts 1/sqrt(2 layers) smaller."""
    std = config.initializer_range
    out_std = std * (2 * config.num_hidden_layers) ** -0.5
    if config.attention.kind == "mla":
        return MLA(config.hidden_size, config.attention, config.rms_norm_eps, std, out_std, rngs=rngs)
    return GQA(config.hidden_size, config.attention, std, out_std, rngs=rngs)
