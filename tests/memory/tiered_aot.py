"""Compiles tables in two tiers for TPUs that are not there: tpu_aot.py with other programs.

python tests/memory/tiered_aot.py v5p:2x2x2 bfloat16
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from tpu_aot import BATCH, ROWS, WIDTH, memory, topology_mesh

from engram_jax.memory.placements import DevicePlacement, HostPlacement, TieredPlacement
from engram_jax.memory.placements.tiered import TieredTable
from engram_jax.memory.table import TableState
from engram_jax.sharding import MESH_AXES


def one_row(row_dtype: str, width: int) -> TableState:
    """Shapes and dtypes of a row: wide and single numbers, floats and integers."""
    row: Any = jax.ShapeDtypeStruct
    slots = {"m": row((1, width), "float32"), "last_step": row((1,), "int32")}
    return TableState(row((1, width), row_dtype), slots, row((1,), "int32"))


def programs(topology: str, row_dtype: str) -> dict[str, dict[str, Any]]:
    """A tiered table made; its rows read, read ahead and written by one program; rows exchanged between the tiers."""
    placement = TieredPlacement(0.1, DevicePlacement(as_records=True), HostPlacement())
    mesh, like = topology_mesh(topology), one_row(row_dtype, WIDTH)
    sharded = jax.P(MESH_AXES)
    device = jax.NamedSharding(mesh, sharded)

    def on_shards(function):
        return jax.shard_map(function, in_specs=sharded, out_specs=sharded, check_vma=False)

    def placed(tree: Any, rest: Any = None) -> Any:
        rest = rest or jax.tree.map(lambda _: device, tree)
        return jax.tree.map(lambda x, r: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=r), tree, rest)

    def step(table, ids, next_ids):
        early = on_shards(placement.take)(table, next_ids)
        new = jax.tree.map(lambda x: (x * 2).astype(x.dtype), on_shards(placement.take)(table, ids))
        early, new = jax.lax.optimization_barrier((early, new))
        return on_shards(placement.put)(table, ids, new), early

    with jax.set_mesh(mesh):
        allocate = on_shards(lambda: placement.allocate(ROWS, like))
        shapes = jax.eval_shape(allocate)
        at_rest = placement.at_rest(mesh, shapes)
        hot, index = placed(shapes.hot), placed((shapes.hot_ids, shapes.hot_places))
        table = TieredTable(hot, index[0], index[1], placed(shapes.tail, at_rest.tail))
        ids = jax.ShapeDtypeStruct((mesh.size * BATCH,), jnp.int32, sharding=device)
        promote = jax.jit(on_shards(placement.promote), donate_argnums=0, out_shardings=at_rest)
        step = jax.jit(step, donate_argnums=0, out_shardings=(at_rest, device))
        return {
            "allocate": memory(jax.jit(allocate, out_shardings=at_rest).lower().compile()),
            "step": memory(step.lower(table, ids, ids).compile()),
            "promote": memory(promote.lower(table, ids).compile()),
        }


if __name__ == "__main__":
    print(json.dumps(programs(*sys.argv[1:])))
