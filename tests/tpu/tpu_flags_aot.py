"""Compiles a sharded matrix product for a TPU topology, as a program of its own: on some flags libtpu ends the process.

python tests/tpu/tpu_flags_aot.py v6e:2x4
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(devices), ("x",))
sharded, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
x = jax.ShapeDtypeStruct((128 * len(devices), 1024), jnp.bfloat16)
w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
product = jax.jit(lambda x, w: (x @ w).sum(0), in_shardings=(sharded, sharded), out_shardings=whole)
print(product.lower(x, w).compile().as_text().count("all-reduce"))
