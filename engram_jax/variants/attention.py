"""What an attention variant says (`AttentionVariant`) and what its layer does (`AttentionLayer`).

A variant is one file with both and one line in `engram_jax.registries.ATTENTION`; docs/extending.md has an example.
`model.attention.kind` then takes its name.

Letters: B batch, T position of a query, L layers of a stack, P places of a cache, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from engram_jax.errors import require
from engram_jax.variants.weights import WeightSpec

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from engram_jax.config import AttentionConfig, ModelConfig


class AttentionLayer(Protocol):
    """The Flax module of one layer's attention. Its parameters are those of `AttentionVariant.weights`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes the parameters. Layers are built under `jax.vmap`, so nothing here may depend on the layer's number."""
        ...

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """The attention's output y [B, T, D] in `x.dtype`, before it is added to the residual stream.

        Args:
          x_BTD: normed states. `context` may cut T over devices, `tensor` the heads.
          positions_BT: int32, from 0 in each document.
          segment_ids_BT: int32, the document of each token, 0 for padding. A token sees its own document's past only.
            None: a row is one document.
        """
        ...

    @staticmethod
    def new_cache(config: ModelConfig, layers: int, batch: int, places: int) -> Any:
        """Zeros in which `extend` keeps what later tokens need: arrays [L, B, ...] in `config.dtype`.

        places: tokens of a sequence that fit, a multiple of `layers.cached_attention.KEY_BLOCK` or less than it.
        """
        ...

    def extend(self, x_BTD: jax.Array, cache: Any, layer: jax.Array, length_B: jax.Array) -> tuple[jax.Array, Any]:
        """y [B, T, D] of T new tokens, equal to `__call__` on whole sequences, and the cache after them.

        Args:
          cache: of a whole stack.
          layer: int32 scalar, this layer's index in the stack.
          length_B: int32, the tokens that each sequence has already. What the cache holds beyond them, from padding or
            from tokens taken back, must not be seen. There is room for T more tokens.
        """
        ...


class AttentionVariant(ABC):
    """What settings, counts, mesh and files need to know of an attention. Importing it need not import jax."""

    mesh_axes: tuple[str, ...] = ("context", "tensor")
    """Mesh axes that may cut the layer's work: `context` cuts T, `tensor` cuts heads. The batch can always be cut."""

    def check(self, attention: AttentionConfig) -> None:  # noqa: B027
        """Raises `ConfigError` for settings that the layer cannot work with."""

    @abstractmethod
    def weights(self, config: ModelConfig) -> list[WeightSpec]:
        """The weights of one layer. Random numbers are drawn, and an exported file is written, in this order."""

    @abstractmethod
    def score_flops(self, config: ModelConfig, seq_len: int) -> float:
        """FLOPs of one layer per token, forward, for scores and their sums in one document of `seq_len` tokens.

        Products with weights are counted from `weights`. See `causal_score_flops`.
        """

    @abstractmethod
    def cache_numbers(self, config: ModelConfig, places: int) -> int:
        """How many numbers one layer's cache holds for a sequence with `places` places."""

    @abstractmethod
    def layer(self) -> type[AttentionLayer]:
        """The class of the layer. An import of jax belongs here if the variant is a default of many runs."""

    def cut_by_tensor(self, attention: AttentionConfig) -> dict[str, int]:
        """Settings under `model.attention` that `train.mesh_tensor` must divide, and their values."""
        return {"num_attention_heads": attention.num_attention_heads}

    def check_mesh(self, attention: AttentionConfig, axes: Mapping[str, int]) -> None:
        """Raises `ConfigError` if a mesh with these sizes by axis cannot cut the layer."""
        for axis in ("context", "tensor"):
            require(
                axes[axis] == 1 or axis in self.mesh_axes,
                f"train.mesh_{axis}={axes[axis]}: model.attention.kind={attention.kind!r} cannot be cut over {axis}. "
                f"Set train.mesh_{axis}=1.",
            )
        for name, value in self.cut_by_tensor(attention).items():
            require(
                value % axes["tensor"] == 0,
                f"model.attention.{name}={value} is not a multiple of train.mesh_tensor={axes['tensor']}: choose a "
                "factor of it.",
            )


def causal_score_flops(heads: int, key_dim: int, value_dim: int, seq_len: int) -> float:
    """FLOPs per token of causal attention: a query sees (seq_len + 1) / 2 keys on average, 2 FLOPs per key and dim."""
    return 2 * heads * (key_dim + value_dim) * (seq_len + 1) / 2
