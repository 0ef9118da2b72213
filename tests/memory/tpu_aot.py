"""Compiles for TPUs that are not there and says what the programs would hold in which memory.

Needs libtpu, and no TPU. It ends the process on some errors, so tests call `compile_apart`, which starts this file as a
program of its own and reads the JSON it prints. By hand:

    python tests/memory/tpu_aot.py v5p:2x2x2 bfloat16

Another subject needs another `programs`; `topology_mesh` and `memory` are the same for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS, BATCH, WIDTH = 16 * 2**20, 65_536, 64
"""Local rows of a chip, rows of a step on it, and their width."""


def compile_apart(topology: str, row_dtype: str) -> dict[str, dict[str, Any]]:
    """`programs` in a process of its own. Raises RuntimeError with the end of its output if it fails."""
    return run_apart(__file__, topology, row_dtype)


def run_apart(script: str, *arguments: str) -> dict[str, Any]:
    """What a program that needs libtpu prints as its last line, read as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    environment["TPU_LOG_DIR"] = "disabled"  # it would leave two files a run in the temporary folder
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def topology_mesh(topology: str, fsdp: int = 4):
    """The house's mesh over the chips of a topology by libtpu's name for it, such as v5p:2x2x2 or v6e:2x4."""
    from jax.experimental import topologies

    from engram_jax.sharding import make_mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return make_mesh(-1, fsdp, devices=devices)


def memory(compiled) -> dict[str, Any]:
    """Bytes on one chip and in the part of the host's memory that belongs to it, and whether host arrays are tiled."""
    import jax

    sizes = compiled.memory_analysis()
    formats = jax.tree.leaves((compiled.input_formats, compiled.output_formats))
    formats = [f for f in formats if f.sharding is not None]  # an argument nobody uses has none
    return {
        "device_temp": sizes.temp_size_in_bytes,
        "host_argument": sizes.host_argument_size_in_bytes,
        "host_output": sizes.host_output_size_in_bytes,
        "host_alias": sizes.host_alias_size_in_bytes,
        "host_temp": sizes.host_temp_size_in_bytes,
        "tiled": [
            str(f.layout) for f in formats if f.sharding.memory_kind == "pinned_host" and not row_major(f.layout)
        ],
    }


def row_major(layout) -> bool:
    order = layout.major_to_minor
    return order == tuple(range(len(order))) and layout.tiling == ((1,),)


def programs(topology: str, row_dtype: str) -> dict[str, dict[str, Any]]:
    """Tables in host memory: made; read and written; the same with jit left to choose the layout of its output."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from engram_jax.memory.placements.host import HostPlacement
    from engram_jax.memory.table import TableState
    from engram_jax.sharding import MESH_AXES

    placement, array = HostPlacement(), jax.ShapeDtypeStruct
    slots = {name: array((1, WIDTH), "float32") for name in ("m", "v")} | {"last_step": array((1,), "int32")}
    one_row = TableState(array((1, WIDTH), row_dtype), slots, array((1,), "int32"))
    mesh, sharded = topology_mesh(topology), jax.P(MESH_AXES)

    def on_shards(function):
        return jax.shard_map(function, in_specs=sharded, out_specs=sharded)

    def step(table, ids, next_ids):
        early = on_shards(placement.take)(table, next_ids)
        new = jax.tree.map(lambda x: (x * 2).astype(x.dtype), on_shards(placement.take)(table, ids))
        ids, early = jax.lax.optimization_barrier((ids, early))
        return on_shards(placement.put)(table, ids, new), early

    with jax.set_mesh(mesh):
        allocate = on_shards(lambda: placement.allocate(ROWS, one_row))
        shapes = jax.eval_shape(allocate)
        at_rest = placement.at_rest(mesh, shapes)
        table = jax.tree.map(lambda x, rest: array(x.shape, x.dtype, sharding=rest), shapes, at_rest)
        device = NamedSharding(mesh, sharded)
        ids = array((mesh.size * BATCH,), jnp.int32, sharding=device)
        stated = jax.jit(step, donate_argnums=0, out_shardings=(at_rest, device))
        unstated = jax.jit(step, donate_argnums=0)
        return {
            "allocate": memory(jax.jit(allocate, out_shardings=at_rest).lower().compile()),
            "step": memory(stated.lower(table, ids, ids).compile()),
            "step, layout not stated": memory(unstated.lower(table, ids, ids).compile()),
        }


if __name__ == "__main__":
    print(json.dumps(programs(*sys.argv[1:])))
