"""Engram's readers: `model.engram.engram_variant` = paper, deepseek_v41 or qwen_ple. The layer is in layers/engram.py.

They differ in the hash of n-grams and in the gate at a score of 0.

Letters: M gated states, D hidden size, E width of a token's rows together, K taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engram_jax.registries import load
from engram_jax.variants.readers import ReaderLayer, ReaderVariant
from engram_jax.variants.weights import WeightSpec, stream_weights

if TYPE_CHECKING:
    from engram_jax.config import EngramConfig, ModelConfig


class EngramVariant(ReaderVariant):
    """A published Engram. Files have the names of DeepSeek-V4.1's checkpoints."""

    unused: ClassVar[Mapping[str, Any]] = {"engram_amplification": 1.0}

    def __init__(self, hash: str, gate: Literal["signed_sqrt", "copysign_sqrt"], removable: tuple[str, ...]):
        """
        Args:
          gate: the function of a score whose sigmoid is the gate (layers/engram.py).
        """
        self.hash, self.gate, self.removable = hash, gate, removable

    def weights(self, config: ModelConfig) -> list[WeightSpec]:
        engram, M, D = config.engram, config.engram_branches, config.hidden_size
        keys = 0 if "gate" in engram.engram_without else M
        E, K, gains = engram.memory_dim, engram.engram_kernel_size, ("streams", "norm")
        projection, norm = (partial(WeightSpec, group=group) for group in ("engram_projections", "norms"))
        # A key for each state, then the one value that all share, are one matrix.
        matrix, bias, out = "key_value_emd", "key_value_bias_md", ("memory", "streams", "embed")
        found = [projection(matrix, (E, keys + 1, D), "e->d", "wkv.weight", "emd->md,e", out, config.initializer_range)]
        if engram.engram_bias:
            found += [projection(bias, (keys + 1, D), "vector", "wkv.bias", "md->md", gains, "zeros")]
        if keys:
            found += [norm("query_norm", (M, D), "vector", "q_weight", "md->m,d", gains, "ones")]
            found += [norm("key_norm", (M, D), "vector", "k_weight", "md->m,d", gains, "ones")]
        if "multi_branch" in engram.engram_without:
            found += stream_weights(config, "port", "hc", ("pre", "post"))
        if K:
            taps = (None, "streams", "norm")
            found += [
                norm("conv_norm", (M, D), "vector", "conv_norm.weight", "md->m,d", gains, "ones"),
                WeightSpec(
                    *("conv_kmd", (K, M, D), "vector", "conv1d.weight", "kmd->md,1,k", taps, "zeros"),
                    group="engram_conv",
                ),
            ]
        return found

    def reach(self, engram: EngramConfig) -> int:
        """The convolution's taps, dilated by the largest order of n-grams."""
        return max(engram.engram_kernel_size - 1, 0) * engram.engram_max_ngram_size

    def cache_bytes(self, config: ModelConfig, spare: int) -> int:
        """The convolution's newest inputs: gates in float32 or wider, values in `config.dtype`."""
        reach = self.reach(config.engram)
        position = config.engram_branches * max(config.itemsize, 4) + config.hidden_size * config.itemsize
        return (reach + spare) * position if reach else 0

    def layer(self, engram: EngramConfig) -> type[ReaderLayer]:
        return load("engram_jax.layers.engram_readers:engram_reader")(engram)


PAPER = EngramVariant("deepseek", "signed_sqrt", ("multi_branch", "compression", "gate", "wide_hash"))
DEEPSEEK_V41 = EngramVariant("deepseek", "copysign_sqrt", PAPER.removable)
QWEN_PLE = EngramVariant("qwen", "signed_sqrt", ("multi_branch", "gate"))
