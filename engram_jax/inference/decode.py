"""The model on new tokens of sequences that it has begun: one function prefills, decodes and verifies drafts.

`extend` takes T tokens of each sequence; the first `count_B` of them are real. Its states equal those of the whole
sequences run anew (tests/inference). T = 1 decodes. With T > 1, sequences with chunks of a prompt and sequences with
one new token share a step. A draft is verified by its logits; `rollback` takes back what is rejected.

Legend: B batch, T new tokens, W kept positions, H rows per token, M residual streams, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.inference.cache import Cache
from engram_jax.layers.reader import newest
from engram_jax.memory.description import MemoryRows, MemoryState
from engram_jax.memory.hashing import canonicalize, ngram_row_ids
from engram_jax.memory.store import MemoryStore
from engram_jax.model import Model, segments
from engram_jax.sharding import LOGICAL_TO_MESH, placed


def extend(
    model: Model,
    store: MemoryStore,
    memory: MemoryState,
    step: jax.Array,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Final normed states [B, T, D] of new tokens, and the cache after them. Call under the mesh; donate the cache.

    Args:
      memory, step: the tables, and the updates done when they are read (`TrainState.step`).
      tokens_BT: int32. Tokens behind the first `count_B` of a sequence are padding; their states mean nothing.
      count_B: int32, 0..T. 0 leaves a sequence unchanged.
    """
    tokens_BT, count_B = placed(tokens_BT, "batch", None), placed(count_B, "batch")
    rows, canonical_BW = fetch(store, memory, step, tokens_BT, count_B, cache.canonical_BW)
    x_BTMD, attention, readers = model.embed(tokens_BT), {}, {}
    # Only MoE statistics, which are dropped here, would ask which tokens are padding.
    for segment in segments(model.config):
        if segment.reads_memory:
            layer = str(segment.start)
            with jax.named_scope("engram"):
                reader, kept = model.engram[layer], cache.readers.get(layer)
                update_BTMD, readers[layer] = reader.extend(x_BTMD, rows[layer], count_B, kept)
                x_BTMD = x_BTMD + update_BTMD

        def run_block(carry: Any, block_layer: Any):
            x_BTMD, kept = carry
            block, layer = block_layer

            def attention(h_BTD: jax.Array):
                return block.attn.extend(h_BTD, kept, layer, cache.length_B)

            x_BTMD, kept = block.attend(x_BTMD, attention)
            return (block.feed_forward(x_BTMD)[0], kept), None

        layers = jnp.arange(segment.stop - segment.start, dtype=jnp.int32)
        start = (x_BTMD, cache.attention[segment.name])
        (x_BTMD, attention[segment.name]), _ = jax.lax.scan(run_block, start, (model.blocks[segment.name], layers))
    readers = {layer: kept for layer, kept in readers.items() if kept is not None}
    return model.final(x_BTMD), Cache(cache.length_B + count_B, attention, canonical_BW, readers)


def fetch(
    store: MemoryStore,
    memory: MemoryState,
    step: jax.Array,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    canonical_BW: jax.Array,
) -> tuple[MemoryRows, jax.Array]:
    """The rows that new tokens read, [B, T, H, row width] by layer, and the canonical ids to keep."""
    if not store.layers:
        return {}, canonical_BW
    canonical_BT = canonicalize(store.token_map, tokens_BT)
    window = store.config.engram_max_ngram_size - 1
    joined = jnp.concatenate([canonical_BW[:, canonical_BW.shape[1] - window :], canonical_BT], axis=1)
    ids = {la: ngram_row_ids(store.constants, int(la), joined)[:, window:] for la in store.layers}
    # Every device looks up an equal share of the tokens: repeat the last one to fill the shares.
    missing = -tokens_BT.shape[1] % _positions_cut()
    ids = {la: jnp.concatenate([x, *[x[:, -1:]] * missing], axis=1) for la, x in ids.items()}
    rows = store.fetch(memory, store.plan_ids(ids), step)
    rows = {la: placed(x, "batch", None, None, None)[:, : tokens_BT.shape[1]] for la, x in rows.items()}
    rows = {la: placed(x, "batch", "seq", None, None) for la, x in rows.items()}
    return rows, newest(canonical_BW, canonical_BT, count_B)


def _positions_cut() -> int:
    """Devices over which the positions of a batch are cut for lookups."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in LOGICAL_TO_MESH["own_seq"] or ())
