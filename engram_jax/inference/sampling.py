"""How the next token is drawn from the logits.

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engram_jax.config import require


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a continuation are drawn from the model's logits."""

    max_tokens: int = 200
    """New tokens at most, at least 1. The end-of-document token stops earlier."""
    temperature: float = 0.8
    """Divides the logits before drawing, 0 or more. 0: always the most probable token."""
    top_k: int = 50
    """Draw only from this many of the most probable tokens. 0: from all."""
    top_p: float = 1.0
    """Draw only from the fewest most probable tokens that together have this probability, in (0, 1]. 1: from all."""
    seed: int = 0
    """Seed of the drawing, 0..2^32-1. The same seed gives the same text."""

    def __post_init__(self):
        require(self.max_tokens > 0, f"max_tokens={self.max_tokens} must be positive.")
        require(self.temperature >= 0, f"temperature={self.temperature} must be 0 (greedy) or positive.")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all tokens) or positive.")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1].")
        require(0 <= self.seed < 1 << 32, f"seed={self.seed} must lie in 0..2^32-1.")


def choose(
    logits_BV: jax.Array, keys_B: jax.Array, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """One id per sequence, int32 [B]: the most probable at temperature 0, else drawn from softmax(logits/temperature).

    top_k and top_p cut the tail of that distribution, k first, p of what k left; at least one token stays.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    kept = min(top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    if kept == logits_BV.shape[-1] and top_p == 1:
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    values_BK, ids_BK = jax.lax.top_k(logits_BV, kept)
    share_BK = jax.nn.softmax(values_BK)
    before_BK = jnp.cumsum(share_BK, axis=-1) - share_BK  # probability of the tokens that stand before this one
    values_BK = jnp.where(before_BK < top_p, values_BK, -jnp.inf)
    place_B = jax.vmap(jax.random.categorical)(keys_B, values_BK)
    return jnp.take_along_axis(ids_BK, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
