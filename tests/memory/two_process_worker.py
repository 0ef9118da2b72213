"""One of two processes of a training loop over the store, or, imported, the same loop in one process.

    python tests/memory/two_process_worker.py <port> <process> <folder> [damaged]

Each process has four CPU devices, makes its own half of every batch, and writes its own shards of the tables and the
losses of its own sequences. `damaged`: the second process names rows that do not exist, in the first step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.plan import RowIdError, check, fits
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.runs.table_checkpoint import save_tables
from engram_jax.sharding import lookups, make_mesh

V, B, T, D, STEPS = 60, 16, 12, 4, 20
CONFIG = EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=D, engram_vocab_size=(41, 67))


def store_on(shards: int) -> MemoryStore:
    optimizer = CatchUpAdam(np.full(STEPS, 1e-2))
    return MemoryStore.create(
        CONFIG, TokenMap.identity(V), optimizer, shards=shards, init_std=0.5, row_dtype="bfloat16"
    )


def train(folder: Path, processes: int = 1, process: int = 0, damaged: bool = False) -> None:
    """Writes `tables/` and `losses-<process>.npy`, float32 [STEPS, sequences of this process], into the folder."""
    mesh = make_mesh(2, 4)
    store = store_on(mesh.size)
    plan_ids = jax.jit(store.plan_ids)

    @jax.jit
    def step(state, plan, targets, k):
        rows = store.fetch(state, plan, k)

        def losses(rows):
            return sum(jnp.mean((jnp.sum(r, 2) - targets) ** 2, axis=(1, 2)) for r in rows.values())

        grads = jax.grad(lambda rows: jnp.sum(losses(rows)))(rows)
        return store.update(state, plan, store.reduce(plan, grads), k), losses(rows)

    def mine(x: np.ndarray) -> jax.Array:
        half = np.split(x, processes)[process]
        return jax.make_array_from_process_local_data(jax.NamedSharding(mesh, lookups(x.ndim)), half)

    with jax.set_mesh(mesh):
        ids_of = jax.jit(lambda tokens: {layer: p.ids_BTH for layer, p in store.plan(tokens).items()})
        state, seen = store.init(jax.random.key(3)), []
        for k in range(STEPS):
            rng = np.random.default_rng(k)
            tokens = np.minimum(rng.zipf(1.4, (B, T)), V - 1).astype(np.int32)
            ids = ids_of(mine(tokens))
            if damaged and process == 1:
                wrong = np.full((B // 2, *ids["2"].shape[1:]), 10**6, np.int32)
                ids["2"] = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, lookups(3)), wrong)
            plan = plan_ids(ids)
            check(plan)
            assert fits(plan)
            state, losses = step(state, plan, mine(rng.normal(size=(B, T, D)).astype(np.float32)), jnp.int32(k))
            parts = sorted(losses.addressable_shards, key=lambda shard: shard.index[0].start)
            seen.append(np.concatenate([shard.data for shard in parts]))
        save_tables(folder / "tables", store, mesh, state.tables)
        used = {layer: int(count) for layer, count in state.rows_used.items()}
    np.save(folder / f"losses-{process}.npy", np.stack(seen))
    (folder / f"used-{process}.json").write_text(json.dumps(used))


if __name__ == "__main__":
    port, process, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    assert jax.process_count() == 2 and len(jax.local_devices()) == 4
    try:
        train(folder, 2, process, damaged="damaged" in sys.argv)
    except RowIdError as error:
        print(f"RowIdError: {error}")
