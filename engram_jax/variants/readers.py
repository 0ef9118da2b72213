"""What a reader variant says (`ReaderVariant`) and what its layer does (`ReaderLayer`).

A reader turns the table rows of a token's n-grams into an update of the residual streams. A variant is one file with
both and one line in `engram_jax.registries.READERS`; docs/extending.md has an example. `model.engram.engram_variant`
then takes its name.

Letters: B batch, T position, H rows per token, d width of a row, M residual streams, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from engram_jax.errors import require
from engram_jax.variants.weights import WeightSpec

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from engram_jax.config import EngramConfig, ModelConfig


class ReaderLayer(Protocol):
    """The Flax module of one Engram layer. `layers.reader.Reader` is a base class with the parts that many share."""

    has_gates: ClassVar[bool]
    """Whether `read` returns gates, which monitors and pictures of gates look at."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, those of `ReaderVariant.weights`."""
        ...

    def __call__(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """The update [B, T, M, D] in `x.dtype`, which the model adds to the streams. Rows of zeros must give zeros.

        Args:
          x_BTMD: the streams before the update. `context` may cut T over devices.
          rows_BTHd: float32 or bfloat16, orders ascending, then heads.
          segment_ids_BT: int32, the document of each token. A reader that looks back must not look into another one.
        """
        ...

    def read(
        self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The update, and the gates [B, T, M] in 0..1 that made it. Called only if `has_gates`."""
        ...

    @staticmethod
    def new_cache(config: ModelConfig, batch: int, spare: int) -> Any:
        """Zeros in which `extend` keeps what later tokens need, or None if it keeps nothing.

        Arrays [B, reach + spare, ...] hold the newest positions, the newest last, zeros before a sequence's start:
        `inference.cache.rollback` shifts them, and can take `spare` tokens back.
        """
        ...

    def extend(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, count_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The update of T new tokens, equal to `__call__` on whole sequences, and the cache after them.

        Args:
          count_B: int32, how many of the T tokens are real. The others follow them and must not reach the cache.
        """
        ...


class ReaderVariant(ABC):
    """What settings, counts, mesh and files need to know of a reader. Importing it need not import jax."""

    hash: str = "deepseek"
    """How n-grams become rows: a name in `engram_jax.registries.HASHES`."""
    removable: tuple[str, ...] = ()
    """The parts that `engram_without` may name."""
    unused: ClassVar[Mapping[str, Any]] = {}
    """Settings of `EngramConfig` that the reader does not use, and the only value that they may have."""

    def check(self, engram: EngramConfig) -> None:  # noqa: B027
        """Raises `ConfigError` for settings that the reader cannot work with, beside `removable` and `unused`."""

    @abstractmethod
    def weights(self, config: ModelConfig) -> list[WeightSpec]:
        """The weights of one Engram layer, without its table. Random numbers are drawn in this order."""

    @abstractmethod
    def layer(self, engram: EngramConfig) -> type[ReaderLayer]:
        """The class of the layer. An import of jax belongs here if the variant is a default of many runs."""

    def vocab_share(self, engram: EngramConfig) -> float:
        """What the model multiplies the vocabulary's embedding with before the first block."""
        return 1.0

    def reach(self, engram: EngramConfig) -> int:
        """How many positions back the reader looks, beside the n-grams' own."""
        return 0

    def cache_bytes(self, config: ModelConfig, spare: int) -> int:
        """Bytes that one layer's `new_cache` holds of a sequence."""
        return 0

    def check_settings(self, engram: EngramConfig) -> None:
        """Raises `ConfigError` if the settings do not fit this variant."""
        name = f"engram_variant={engram.engram_variant!r}"
        for setting, value in self.unused.items():
            found = getattr(engram, setting)
            require(found == value, f"{setting}={found} has no effect with {name}: set {setting}={value}.")
        fixed = [part for part in engram.engram_without if part not in self.removable]
        choices = f"choose from {', '.join(self.removable)}" if self.removable else "set engram_without=()"
        require(
            not fixed,
            f"engram_without={engram.engram_without} with {name}, which has no {' or '.join(fixed)} to leave out: "
            f"{choices}.",
        )
        self.check(engram)

    def check_mesh(self, engram: EngramConfig, seq_len: int, axes: Mapping[str, int]) -> None:
        """Raises `ConfigError` if a mesh with these sizes by axis cannot cut sequences of this length."""
        reach = self.reach(engram)
        require(
            seq_len // axes["context"] >= reach,
            f"data.seq_len={seq_len} over train.mesh_context={axes['context']} leaves pieces shorter than the {reach} "
            "positions that the reader of the memory looks back: lower mesh_context.",
        )
