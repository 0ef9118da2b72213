"""Causal attention inside documents: the products that attention variants share (mla.py, gqa.py).

Letters: B batch, T query position, S key position, N query head, G key-value head, H query-key head width, V value
head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from engram_jax.config import ModelConfig
from engram_jax.layers.splash import splash_attention
from engram_jax.registries import ATTENTION
from engram_jax.sharding import platform, sharding_of
from engram_jax.variants.attention import AttentionLayer


def causal_mask(length: int, segment_ids_BT: jax.Array | None) -> jax.Array:
    """mask_BTS, or [1, T, S] for all rows: True where a query may look, which is its own segment up to itself.

    Every query may look at itself, padding (segment 0) included, so no softmax is empty.
    """
    causal_1TS = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BT is None:
        return causal_1TS
    return causal_1TS & (segment_ids_BT[:, :, None] == whole_sequence(segment_ids_BT)[:, None, :])


def whole_sequence(x_BT: jax.Array) -> jax.Array:
    """x [B, T, ...] with all positions T of a sequence on every device that has some of them."""
    sharding = sharding_of(x_BT)
    return x_BT if sharding is None else jax.reshard(x_BT, P(sharding.spec[0], None, *sharding.spec[2:]))


def attend(
    q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGV: jax.Array, segment_ids_BT: jax.Array | None, scale: float
) -> jax.Array:
    """Causal attention inside segments, y_BTNV in `q.dtype`: by a kernel on TPU, elsewhere by the T x S products.

    k and v have all S = T positions (`whole_sequence`); N is a multiple of G. scale: factor of the scores.
    """
    if platform() == "tpu":
        return splash_attention(q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, scale)
    return attention(q_BTNH, k_BSGH, v_BSGV, causal_mask(q_BTNH.shape[1], segment_ids_BT), scale)


def attention(
    q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array, scale: float | None = None
) -> jax.Array:
    """softmax(scale q k) v -> y_BTNV in `q.dtype`; scores and softmax in float32 or wider. scale: 1/sqrt(H) if None.

    N must be a multiple of G: N / G neighbouring query heads share a key-value head. The softmax is normalised after
    the product with v: a division of T x V numbers instead of T x S (1.3 times faster forward and backward on CPU).
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


def attention_class(config: ModelConfig) -> type[AttentionLayer]:
    """The layer that `config.attention.kind` names."""
    return ATTENTION[config.attention.kind].layer()


def make_attention(config: ModelConfig, *, rngs: nnx.Rngs) -> AttentionLayer:
    """A new layer of the attention that `config.attention.kind` names."""
    return attention_class(config)(config, rngs=rngs)
