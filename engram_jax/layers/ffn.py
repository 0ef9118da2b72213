"""The dense feed-forward layer.

Letters: B batch, T position, D hidden, F intermediate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from engram_jax.sharding import in_use, spec


class FFN(nnx.Module):
    """SwiGLU: (silu(x gate) * (x up)) down (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, out_std: float, *, rngs: nnx.Rngs):
        D, F = hidden_size, intermediate_size
        self.gate_df = nnx.Param(normal(std)(rngs.params(), (D, F), jnp.float32, out_sharding=spec("embed", "ffn")))
        self.up_df = nnx.Param(normal(std)(rngs.params(), (D, F), jnp.float32, out_sharding=spec("embed", "ffn")))
        self.down_fd = nnx.Param(normal(out_std)(rngs.params(), (F, D), jnp.float32, out_sharding=spec("ffn", "embed")))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD -> y_BTD in `x.dtype`."""
        dtype, inner = x_BTD.dtype, spec("batch", "seq", "ffn")
        gate_df, up_df = (in_use(w[...], "embed", "ffn", dtype=dtype) for w in (self.gate_df, self.up_df))
        gate_BTF = jnp.einsum("btd,df->btf", x_BTD, gate_df, out_sharding=inner)
        up_BTF = jnp.einsum("btd,df->btf", x_BTD, up_df, out_sharding=inner)
        down_fd = in_use(self.down_fd[...], "ffn", "embed", dtype=dtype)
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return jnp.einsum("btf,fd->btd", hidden_BTF, down_fd, out_sharding=spec("batch", "seq", "act"))
