"""Grouped-query attention, on whole sequences and with a cache.

Letters: B batch, T query position, D hidden, N query head, G key-value head, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.layers.attention import attend, whole_sequence
from engram_jax.layers.cached_attention import KeysValues, attend_cached, positions_after
from engram_jax.layers.parameters import add_parameters
from engram_jax.layers.rope import rope, softmax_scale
from engram_jax.registries import ATTENTION
from engram_jax.sharding import in_use, placed, spec


class GQA(nnx.Module):
    """Rope turns the whole head, whose width qk_nope + qk_rope queries, keys and values share."""

    q_dnh: nnx.Param
    k_dgh: nnx.Param
    v_dgh: nnx.Param
    o_nhd: nnx.Param

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config.attention
        add_parameters(self, ATTENTION[self.config.kind].weights(config), rngs)

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

    @staticmethod
    def new_cache(config: ModelConfig, layers: int, batch: int, places: int) -> KeysValues:
        c = config.attention
        shape = (layers, batch, places, c.num_key_value_heads, c.qk_head_dim)
        k, v = (jnp.zeros(shape, config.dtype, out_sharding=spec(None, "batch", None, "heads", None)) for _ in range(2))
        return KeysValues(k, v)

    def extend(
        self, x_BTD: jax.Array, cache: KeysValues, layer: jax.Array, length_B: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """y_BTD of new tokens and the cache after them."""
        c, dtype = self.config, x_BTD.dtype
        act, heads = spec("batch", "seq", "act"), spec("batch", "seq", "heads", "act")
        positions_BT = placed(positions_after(length_B, x_BTD.shape[1]), "batch", "seq")
        q_BTNH, k_BTGH, v_BTGH = (
            jnp.einsum("btd,dnh->btnh", x_BTD, in_use(w[...], "embed", "heads", None, dtype=dtype), out_sharding=heads)
            for w in (self.q_dnh, self.k_dgh, self.v_dgh)
        )
        q_BTNH, k_BTGH = rope(q_BTNH, positions_BT, c), rope(k_BTGH, positions_BT, c)
        y_BTNH, cache = attend_cached(q_BTNH, k_BTGH, v_BTGH, cache, layer, length_B, softmax_scale(c), c.qk_head_dim)
        o_nhd = in_use(self.o_nhd[...], "heads", None, "embed", dtype=dtype)
        return jnp.einsum("btnv,nvd->btd", y_BTNH, o_nhd, out_sharding=act), cache
