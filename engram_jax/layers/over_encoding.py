"""OverEncoding: n-gram embeddings averaged with the vocabulary's, at the model's input (Huang et al. 2025, arXiv
2501.16975), the paper's other memory (section 3.2). It is another reader of the same store.

    x = a (E[t] + sum_i W_i row_i) / (1 + K (N - 1)),    i over the K slices of each order 2..N

The amplification a is 1 as published, and the square root of the hidden size in LongCat (Liu et al. 2026, arXiv
2601.21204), so that the first attention does not drown the input. docs/memory.md measures its worth.

A slice is what Engram calls a head: its row is narrow, and its own projection widens it. There is no gate and no
convolution. `Model.embed` takes the vocabulary's share of the average, and this reader adds the share of the rows.

Legend: B batch, T seq, H = K (N - 1) slices, d row width, D hidden size, M residual streams.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.layers.parameters import add_parameters
from engram_jax.layers.reader import Reader
from engram_jax.registries import READERS
from engram_jax.sharding import in_use, spec


class OverEncoding(Reader):
    """OverEncoding's reader: an update of the streams before the first block. Zero rows add nothing.

    The publication does not give an initial scale. Here W starts at d^-1/2, so that a projected row has the spread of
    the vocabulary's embeddings, with which it is averaged.
    """

    slice_hed: nnx.Param

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.share = config.engram.vocab_share
        add_parameters(self, READERS[config.engram.engram_variant].weights(config), rngs)

    def __call__(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """The same for every stream, [B, T, M, D] in `x.dtype`. Documents are kept apart by the rows' hash alone."""
        total_BTD = jnp.einsum(
            "bthe,hed->btd",
            rows_BTHd.astype(x_BTMD.dtype),
            in_use(self.slice_hed[...], None, "memory", "embed", dtype=x_BTMD.dtype),
            out_sharding=spec("batch", "seq", "act"),
        )
        return jnp.broadcast_to((self.share * total_BTD)[:, :, None], x_BTMD.shape)
