"""The dense feed-forward layer.

Letters: B batch, T position, D hidden, F intermediate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from engram_jax.sharding import spec


class FFN(nnx.Module):
    """SwiGLU: (silu(x gate) * (x up)) down (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, out_std: float, *, rngs: nnx.Rngs):
        D, F = hidden_size, intermediate_size
        self.gate_df = nnx.Param(normal(std)(rngs.params(), (D, F), jnp.float32, out_sharding=spec("embed", "ffn")))
        self.up_df = nnx.Param(normal(std)(rngs.params(), (D, F), jnp.float32, out_sharding=spec("embed", "ffn")))
        self.down_fd = nnx.Param(normal(out_std)(rngs.params(), (F, D), jnp.float32, out_sharding=spec("ffn", "embed")))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype, act = x_BTD.dtype, spec("batch", "seq", "act")
        gate_BTF = jnp.einsum("btd,df->btf", x_BTD, self.gate_df[...].astype(dtype), out_sharding=act)
        up_BTF = jnp.einsum("btd,df->btf", x_BTD, self.up_df[...].astype(dtype), out_sharding=act)
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return jnp.einsum("btf,fd->btd", hidden_BTF, self.down_fd[...].astype(dtype), out_sharding=act)
