"""Grouped-query attention (Llama, Qwen): `model.attention.kind=gqa`. The layer is in layers/gqa.py.

Letters: D hidden size, N query heads, G key-value heads, H width of a head.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from engram_jax.errors import require
from engram_jax.registries import load
from engram_jax.variants.attention import AttentionLayer, AttentionVariant, causal_score_flops
from engram_jax.variants.weights import WeightSpec, output_std

if TYPE_CHECKING:
    from engram_jax.config import AttentionConfig, ModelConfig


class GroupedQueryAttention(AttentionVariant):
    """Several query heads share a key-value head. Files have the names and the rotated halves of Llama and Qwen."""

    def check(self, attention: AttentionConfig) -> None:
        N, G = attention.num_attention_heads, attention.num_key_value_heads
        require(
            G > 0 and N % G == 0,
            f"num_attention_heads={N} must be a multiple of num_key_value_heads={G}, which must be positive.",
        )

    def weights(self, config: ModelConfig) -> list[WeightSpec]:
        a, D, std = config.attention, config.hidden_size, config.initializer_range
        N, G, H = a.num_attention_heads, a.num_key_value_heads, a.qk_head_dim
        into, out = ("embed", "heads", None), ("heads", None, "embed")
        weight = partial(WeightSpec, group="attention")
        return [
            weight("q_dnh", (D, N, H), "d->nh", "q_proj.weight", "dnh->nh,d", into, std),
            weight("k_dgh", (D, G, H), "d->gh", "k_proj.weight", "dgh->gh,d", into, std),
            weight("v_dgh", (D, G, H), "d->gh", "v_proj.weight", "dgh->gh,d", into, std),
            weight("o_nhd", (N, H, D), "nh->d", "o_proj.weight", "nhd->d,nh", out, output_std(config)),
        ]

    def score_flops(self, config: ModelConfig, seq_len: int) -> float:
        a = config.attention
        return causal_score_flops(a.num_attention_heads, a.qk_head_dim, a.qk_head_dim, seq_len)

    def cache_numbers(self, config: ModelConfig, places: int) -> int:
        """Keys and values of each token."""
        return places * 2 * config.attention.num_key_value_heads * config.attention.qk_head_dim

    def cut_by_tensor(self, attention: AttentionConfig) -> dict[str, int]:
        return super().cut_by_tensor(attention) | {"num_key_value_heads": attention.num_key_value_heads}

    def layer(self) -> type[AttentionLayer]:
        return load("engram_jax.layers.gqa:GQA")


VARIANT = GroupedQueryAttention()
