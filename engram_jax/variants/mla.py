"""Multi-head latent attention (DeepSeek-V2): `model.attention.kind=mla`. The layer is in layers/mla.py.

Letters: D hidden size, N heads, H key width, R width of the latent, V value width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from engram_jax.registries import load
from engram_jax.variants.attention import AttentionLayer, AttentionVariant, causal_score_flops
from engram_jax.variants.weights import WeightSpec, output_std

if TYPE_CHECKING:
    from engram_jax.config import ModelConfig


class LatentAttention(AttentionVariant):
    """Keys and values of all heads come from one latent. Files have DeepSeek's names and rotate DeepSeek's pairs."""

    def weights(self, config: ModelConfig) -> list[WeightSpec]:
        a, D, std = config.attention, config.hidden_size, config.initializer_range
        N, R, V, rope = a.num_attention_heads, a.kv_lora_rank, a.v_head_dim, a.qk_rope_head_dim
        q, down = ("embed", "heads", None), ("embed", "latent")
        up, out = ("latent", "heads", None), ("heads", None, "embed")
        weight = partial(WeightSpec, group="attention")
        return [
            weight("q_dnh", (D, N, a.qk_head_dim), "d->nh", "q_proj.weight", "dnh->nh,d", q, std, rope_width=rope),
            weight(
                "kv_down_dr", (D, R + rope), "d->r", "kv_a_proj_with_mqa.weight", "dr->r,d", down, std, rope_width=rope
            ),
            WeightSpec("kv_norm.gain", (R,), "vector", "kv_a_layernorm.weight", "r->r", group="norms"),
            weight("kv_up_rnh", (R, N, a.qk_nope_head_dim + V), "r->nh", "kv_b_proj.weight", "rnh->nh,r", up, std),
            weight("o_nhd", (N, V, D), "nh->d", "o_proj.weight", "nhd->d,nh", out, output_std(config)),
        ]

    def score_flops(self, config: ModelConfig, seq_len: int) -> float:
        a = config.attention
        return causal_score_flops(a.num_attention_heads, a.qk_head_dim, a.v_head_dim, seq_len)

    def cache_numbers(self, config: ModelConfig, places: int) -> int:
        """The latent and the one rope key of each token."""
        return places * (config.attention.kv_lora_rank + config.attention.qk_rope_head_dim)

    def layer(self) -> type[AttentionLayer]:
        return load("engram_jax.layers.mla:MLA")


VARIANT = LatentAttention()
