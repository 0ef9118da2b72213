"""The weights of a layer, each declared once.

The layer makes its parameters from the declarations (layers/parameters.py). Counts (counts.py), optimizer groups
(optimizers/roles.py) and names in files (interop/names.py) read the same declarations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from engram_jax.config import ModelConfig

Group = Literal["attention", "norms", "engram_projections", "engram_conv", "hyper_connections"]
"""Lines of the table that `--print` shows."""

STREAM_MODULES = {"attn_hc": "hc_attn", "ffn_hc": "hc_ffn"}
"""The hyper-connections of a block, and the prefixes of their tensors in files."""


@dataclass(frozen=True)
class WeightSpec:
    """One float32 weight of a layer.

    Raises:
      ValueError: the declaration contradicts itself.
    """

    name: str
    """The layer's attribute: `q_dnh`. A matrix's name ends with one letter for each dim. `kv_norm.gain` is the weight
    `gain` of the sub-module `kv_norm`."""
    shape: tuple[int, ...]
    """Sizes of the dims, in one layer."""
    role: str
    """How the weight is optimized. "d->nh": a matrix from dim d to dims n and h, by Muon with weight decay. "vector":
    AdamW without weight decay. "embedding": AdamW with weight decay."""
    file: str
    """The tensor's name in an exported file, behind the layer's prefix: `q_proj.weight` becomes
    `model.layers.3.self_attn.q_proj.weight`. Neighbours with one file name are joined along the file's first dim."""
    layout: str
    """From the weight's dims to the file's: "dnh->nh,d" makes [N * H, D] of [D, N, H]. The letters between two commas
    are one dim of the file. "1" is a new dim of size 1."""
    dims: tuple[str | None, ...] | None = None
    """Logical name of each dim, which decides how a mesh cuts it (sharding.LOGICAL_TO_MESH); None is never cut."""
    start: float | Literal["zeros", "ones"] | None = None
    """The initial value; a number is the standard deviation of a normal distribution around 0. `dims` and `start` stay
    None for a weight that a sub-module makes itself."""
    group: Group = field(kw_only=True)
    """The line of `--print` that counts the weight."""
    rope_width: int = field(default=0, kw_only=True)
    """How many numbers at the end of the last dim the file rotates in pairs (2i, 2i + 1); ours are (i, i + half)."""
    stays_float32: bool = field(default=False, kw_only=True)
    """True: products use the weight in float32, so serving and export never round it."""

    def __post_init__(self):
        dims = {len(self.shape), len(self.layout.partition("->")[0])} | ({len(self.dims)} if self.dims else set())
        if len(dims) > 1:
            raise ValueError(
                f"weight {self.name}: shape={self.shape}, layout={self.layout!r} and dims={self.dims} must agree in "
                "the number of dims."
            )
        if self.group not in get_args(Group):
            raise ValueError(f"weight {self.name}: group={self.group!r} must be one of {', '.join(get_args(Group))}.")
        if (self.dims is None or self.start is None) and "." not in self.name:
            raise ValueError(f"weight {self.name}: the layer makes it, so it needs `dims` and `start`.")

    @property
    def path(self) -> tuple[str, ...]:
        """Keys from the layer's parameters to the weight."""
        return tuple(self.name.split("."))

    @property
    def leaf(self) -> str:
        """The last key: `gain` for `kv_norm.gain`."""
        return self.path[-1]


def output_std(config: ModelConfig) -> float:
    """Standard deviation of a projection back into the residual streams: smaller by 1/sqrt(2 layers)."""
    return config.initializer_range * (2 * config.num_hidden_layers) ** -0.5


def stream_weights(
    config: ModelConfig, module: str, file: str, maps: tuple[str, ...] = ("pre", "post", "res")
) -> list[WeightSpec]:
    """The weights of the sub-module `module`, a hyper-connection or a stream port (layers/hyper_connections.py).

    Args:
      file: prefix of the tensors' names.
      maps: the maps between streams and a sub-layer; a stream port has no `res`.
    """
    M, C = config.hc_mult, config.hc_mult * config.hidden_size
    width = {"pre": M, "post": M, "res": M * M}
    bias = {"pre": ((M,), "m->m"), "post": ((M,), "m->m"), "res": ((M, M), "mn->mn")}
    weight = partial(WeightSpec, group="hyper_connections", stays_float32=True)
    return [
        *(weight(f"{module}.phi_{part}_cm", (C, width[part]), "c->m", f"{file}_fn", "cm->m,c") for part in maps),
        *(weight(f"{module}.bias_{part}", bias[part][0], "vector", f"{file}_base", bias[part][1]) for part in maps),
        weight(f"{module}.alpha", (len(maps),), "vector", f"{file}_scale", "m->m"),
    ]
