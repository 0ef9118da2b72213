"""Text from a trained model by plain re-computation: every new token runs the whole sequence through the model again.

The sequence lies in a buffer of fixed length, so there is one compilation. What stands right of the last token is
padding that a causal model cannot see.

Legend: B batch, T buffer length, D hidden size, V vocabulary, K kept candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.sharding import spec
from engram_jax.training.assembly import Parts
from engram_jax.training.state import TrainState

LENGTH_MULTIPLE = 64  # sequences of similar length share a compilation


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 200
    """New tokens at most; the end-of-document token stops earlier."""
    temperature: float = 0.8
    """0: always the most probable token."""
    top_k: int = 50
    """Draw from this many of the most probable tokens only (0: all)."""
    seed: int = 0

    def __post_init__(self):
        require(self.max_tokens > 0, f"max_tokens={self.max_tokens} must be positive.")
        require(self.temperature >= 0, f"temperature={self.temperature} must be 0 (greedy) or positive.")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all tokens) or positive.")
        require(0 <= self.seed < 1 << 32, f"seed={self.seed} must lie in 0..2^32-1.")


def generate(
    parts: Parts, state: TrainState, prompt_ids: Sequence[int], sampling: Sampling, eos_id: int | None = None
) -> Iterator[int]:
    """Yields the ids that continue `prompt_ids` (which begins with the tokenizer's bos, as documents do in training).

    Stops after `sampling.max_tokens` ids or before the first `eos_id`. The ids depend on the arguments alone.

    Raises:
      ConfigError: the prompt is empty or holds an id outside the vocabulary.
    """
    vocab_size, length = parts.config.model.vocab_size, len(prompt_ids)
    require(length > 0, "the prompt is empty: begin it with the tokenizer's bos.")
    require(
        min(prompt_ids) >= 0 and max(prompt_ids) < vocab_size,
        f"the prompt holds ids outside 0..{vocab_size - 1}: use the tokenizer the model was trained with.",
    )
    buffer_T = np.zeros(-(-(length + sampling.max_tokens) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, np.int32)
    buffer_T[:length] = prompt_ids
    key = jax.random.key(sampling.seed)
    for position in range(length, length + sampling.max_tokens):
        # Around each step, not around the loop: a suspended generator must not leave its mesh with the caller.
        with jax.set_mesh(parts.mesh):
            step_key = jax.random.fold_in(key, position)
            logits_V = _next_logits(parts, state, buffer_T, position)
            token = int(_choose(logits_V, step_key, sampling.temperature, sampling.top_k))
        if token == eos_id:
            return
        buffer_T[position] = token
        yield token


def next_logits(parts: Parts, state: TrainState, buffer_T: jax.Array, length: jax.Array) -> jax.Array:
    """float32 logits [V] of the token after the first `length` of `buffer_T`. Call under `jax.set_mesh(parts.mesh)`."""
    tokens_BT, segment_ids_BT = one_document(parts, buffer_T, length)
    plan = parts.store.plan(tokens_BT, segment_ids_BT)
    rows = parts.store.fetch(state.memory, plan, state.step)
    model = parts.model(state.params, state.buffers)
    hidden_BTD, _ = model.hidden(tokens_BT, rows, segment_ids_BT)
    last_B1D = jax.lax.dynamic_slice_in_dim(hidden_BTD, length - 1, 1, axis=1)
    return jax.reshard(model.logits(last_B1D), spec(None, None, None))[0, 0]


def one_document(parts: Parts, buffer_T: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`buffer_T` as a batch, and its segment ids: 1 for the first `length` tokens, 0 for padding. int32 [B, T] both.

    B is the number of devices: the mesh shards the batch, so each device computes the one sequence.
    """
    shape = (parts.mesh.size, *jnp.shape(buffer_T))
    is_token_T = jnp.arange(shape[1], dtype=jnp.int32) < length
    batch = spec("batch", "seq")
    tokens_BT = jnp.broadcast_to(jnp.asarray(buffer_T, jnp.int32)[None], shape, out_sharding=batch)
    return tokens_BT, jnp.broadcast_to(is_token_T.astype(jnp.int32)[None], shape, out_sharding=batch)


def choose(logits_V: jax.Array, key: jax.Array, temperature: float, top_k: int) -> jax.Array:
    """One id: the most probable at temperature 0, else drawn from softmax(logits / temperature) over the top k."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    vocab_size = logits_V.shape[-1]
    values_K, ids_K = jax.lax.top_k(logits_V, min(top_k or vocab_size, vocab_size))
    return ids_K[jax.random.categorical(key, values_K / temperature)]


# Two programs, because another temperature should not compile the model again.
_next_logits = jax.jit(next_logits, static_argnums=0)
_choose = jax.jit(choose, static_argnums=(2, 3))
