"""Engram's readers that lack a part (EngramConfig.engram_without, paper 6.2), and the choice among them.

Legend: B batch, T seq, H rows per token, D hidden size, M residual streams.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import EngramConfig, ModelConfig
from engram_jax.layers.engram import EngramReader
from engram_jax.layers.hyper_connections import StreamPort, read_streams
from engram_jax.layers.short_conv import wide


class UngatedReader(EngramReader):
    """Every gate is 1, so the value alone reaches the streams, and there are no keys."""

    has_gates: ClassVar[bool] = False

    def gated_value(self, x_BTMD: jax.Array, rows_BTHd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.ones_like(wide(x_BTMD[..., 0])), self.keys_value(rows_BTHd, x_BTMD.dtype)[:, :, 0]


class SingleBranchReader(EngramReader):
    """One key and one gate for the state H_pre x that a sub-layer reads; H_post writes the update back.

    The paper keeps the streams and fuses once, after H_pre. It does not say whose H_pre, and how the update returns.
    Here the fusion has its own H_pre and H_post, which start and train as every sub-layer's do. It has no H_res: the
    full reader does not mix streams either, and zero rows must add nothing.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.port = StreamPort(config.hidden_size, config.hc_mult, config.hc_gate_init, config.rms_norm_eps, rngs=rngs)

    def gated_value(self, x_BTMD: jax.Array, rows_BTHd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The one gate [B, T, 1], and the value [B, T, D]."""
        pre_BTM, _ = self.port.coefficients(x_BTMD)
        return super().gated_value(read_streams(x_BTMD, pre_BTM)[:, :, None], rows_BTHd)

    def written(self, x_BTMD: jax.Array, y_BTMD: jax.Array) -> jax.Array:
        _, post_BTM = self.port.coefficients(x_BTMD)  # the same numbers as above: a compiler makes them once
        return post_BTM[..., None] * y_BTMD


WITHOUT: dict[str, type[EngramReader]] = {"gate": UngatedReader, "multi_branch": SingleBranchReader}


def engram_reader(engram: EngramConfig) -> type[EngramReader]:
    """Engram's reader without the parts in `engram_without`. Parts of the hash make no difference to it."""
    return next((WITHOUT[part] for part in engram.engram_without if part in WITHOUT), EngramReader)
