"""Multi-head latent attention (DeepSeek-V2), on whole sequences and with a cache.

Letters: B batch, T query position, S key position, D hidden, N head, H query-key head width, V value head width,
R width of the compressed latent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.layers.attention import attend, whole_sequence
from engram_jax.layers.cached_attention import KeysValues, attend_cached, positions_after
from engram_jax.layers.norm import RMSNorm
from engram_jax.layers.parameters import add_parameters
from engram_jax.layers.rope import rope, softmax_scale
from engram_jax.registries import ATTENTION
from engram_jax.sharding import in_use, placed, spec


class MLA(nnx.Module):
    """Keys and values of all heads come from one normalised latent of `kv_lora_rank`.

    Position goes through a separate rope part, whose key all heads share. Queries are full-rank, as in mHC's 27B model
    (arXiv 2512.24880, table 5).
    """

    q_dnh: nnx.Param
    kv_down_dr: nnx.Param
    kv_up_rnh: nnx.Param
    o_nhd: nnx.Param

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config.attention
        add_parameters(self, ATTENTION[self.config.kind].weights(config), rngs)
        self.kv_norm = RMSNorm(self.config.kv_lora_rank, config.rms_norm_eps)

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

    @staticmethod
    def new_cache(config: ModelConfig, layers: int, batch: int, places: int) -> KeysValues:
        """Latent and rope key side by side, one "head" wide; the values are the latent."""
        c = config.attention
        shape = (layers, batch, places, 1, c.kv_lora_rank + c.qk_rope_head_dim)
        return KeysValues(jnp.zeros(shape, config.dtype, out_sharding=spec(None, "batch", None, None, None)), None)

    def extend(
        self, x_BTD: jax.Array, cache: KeysValues, layer: jax.Array, length_B: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """y_BTD of new tokens and the cache after them, with absorbed projections (DeepSeek-V2, section 2.1.2).

        q k = (q W_k) c and W_v sum(p c), so keys and values of single heads never exist.
        """
        c, dtype = self.config, x_BTD.dtype
        act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")
        positions_BT = placed(positions_after(length_B, x_BTD.shape[1]), "batch", "seq")
        q_dnh = in_use(self.q_dnh[...], "embed", "heads", None, dtype=dtype)
        kv_down_dr = in_use(self.kv_down_dr[...], "embed", "latent", dtype=dtype)
        o_nhd = in_use(self.o_nhd[...], "heads", None, "embed", dtype=dtype)
        up_k_rnh, up_v_rnv = jnp.split(self.kv_up_rnh[...].astype(dtype), [c.qk_nope_head_dim], axis=-1)

        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, q_dnh, out_sharding=heads)
        q_nope, q_pe = jnp.split(q_BTNH, [c.qk_nope_head_dim], -1)
        absorbed_BTNR = jnp.einsum("btnh,rnh->btnr", q_nope, up_k_rnh, out_sharding=heads)
        q_BTNH = jnp.concatenate([absorbed_BTNR, rope(q_pe, positions_BT, c)], axis=-1)

        latent_BTR, k_pe = jnp.split(
            jnp.einsum("btd,dr->btr", x_BTD, kv_down_dr, out_sharding=act), [c.kv_lora_rank], axis=-1
        )
        latent_BT1R = self.kv_norm(latent_BTR)[:, :, None]
        k_BT1H = jnp.concatenate([latent_BT1R, rope(k_pe[:, :, None], positions_BT, c)], axis=-1)
        y_BTNR, cache = attend_cached(q_BTNH, k_BT1H, None, cache, layer, length_B, softmax_scale(c), c.kv_lora_rank)
        y_BTNV = jnp.einsum("btnr,rnv->btnv", y_BTNR, up_v_rnv, out_sharding=heads)
        return jnp.einsum("btnv,nvd->btd", y_BTNV, o_nhd, out_sharding=act), cache
