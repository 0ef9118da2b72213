"""Two programs about as large as a v5e's memory, by what the compiler says of each; JSON on the last line.

Products that widen and narrow in a loop, and their backward pass: arrays of several sizes whose lives overlap.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from engram_jax.aot.lowering import TooLarge, compiled

LAYERS, WIDTH = 4, 256


def loss(x_ND, w_LDF):
    @jax.checkpoint
    def block(x_ND, w_DF):
        h_NF = jnp.tanh(x_ND @ w_DF)
        g_ND = jnp.sin(h_NF @ w_DF.T) + x_ND
        a_NA = jnp.concatenate([g_ND, h_NF[:, : 2 * WIDTH]], axis=1)
        return g_ND + jnp.exp(-a_NA * a_NA) @ jnp.ones((3 * WIDTH, WIDTH)), None

    y_ND, _ = jax.lax.scan(block, x_ND, w_LDF)

    @jax.checkpoint
    def head(total, w_DF):
        logits = jnp.concatenate([y_ND @ w_DF, y_ND[:, :128]], axis=1)
        return total + jnp.sum(jax.nn.logsumexp(logits, axis=1)), None

    return jax.lax.scan(head, 0.0, w_LDF)[0]


def main():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    whole = jax.NamedSharding(jax.make_mesh((4,), ("x",), devices=devices), jax.P())
    found = []
    for rows in (851_968, 943_718):
        x_ND = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32, sharding=whole)
        w_LDF = jax.ShapeDtypeStruct((LAYERS, WIDTH, 4 * WIDTH), jnp.float32, sharding=whole)
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x_ND, w_LDF)
        try:
            done = compiled(lowered)
        except TooLarge as error:  # newer compilers go no further; their message says how much
            found.append({"is_accepted": False, "allocated": error.needed})
            continue
        sizes = done.sizes
        reported = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
        found.append({"is_accepted": done.is_accepted, "allocated": done.allocated, "reported": reported})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
