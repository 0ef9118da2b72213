"""OverEncoding: `model.engram.engram_variant=over_encoding`. The layer is in layers/over_encoding.py.

Letters: H slices, e width of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from engram_jax.errors import require
from engram_jax.registries import load
from engram_jax.variants.readers import ReaderLayer, ReaderVariant
from engram_jax.variants.weights import WeightSpec

if TYPE_CHECKING:
    from engram_jax.config import EngramConfig, ModelConfig


class OverEncodingVariant(ReaderVariant):
    """N-gram embeddings averaged with the vocabulary's, at the model's input."""

    hash = "over_encoding"
    unused: ClassVar[Mapping[str, Any]] = {"engram_kernel_size": 0, "engram_bias": False}

    def check(self, engram: EngramConfig) -> None:
        ids = engram.engram_layer_ids
        require(
            ids in ((), (0,)),
            f"engram_layer_ids={ids} with engram_variant='over_encoding', which is read at the model's input only: set "
            "engram_layer_ids=(0,).",
        )

    def weights(self, config: ModelConfig) -> list[WeightSpec]:
        engram = config.engram
        shape = (engram.num_rows_per_token, engram.engram_head_dim, config.hidden_size)
        dims, start = (None, "memory", "embed"), engram.engram_head_dim**-0.5
        name, file, group = "slice_hed", "slice_proj.weight", "engram_projections"
        return [WeightSpec(name, shape, "e->d", file, "hed->h,d,e", dims, start, group=group)]

    def vocab_share(self, engram: EngramConfig) -> float:
        """The vocabulary's weight in the average."""
        return engram.engram_amplification / (1 + engram.num_rows_per_token)

    def layer(self, engram: EngramConfig) -> type[ReaderLayer]:
        return load("engram_jax.layers.over_encoding:OverEncoding")


VARIANT = OverEncodingVariant()
