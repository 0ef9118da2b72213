"""Monitors of the memory in training: collisions, gates, staleness, tier hits. One forward pass, scalars only.

All metrics are measured on one batch before its step, over the whole batch on any mesh. Means of lookups and gates are
over real positions (segment id not 0). For each layer L:

    memory/collision_L/order<n>               share of a row's updates that belong to other n-grams, mean of the heads
    memory/collision_L/order<n>_worst_head    the same for the head with the largest share
    memory/gate_L/stream<m>_mean, _std        gates of residual stream m, if the reader has gates
    memory/gate_L/seen_<bucket>_mean, _std    gates of all streams, by the number of batches that had the n-gram before
    memory/staleness_L/mean, /max             steps since the rows that are read were last updated
    memory/hit_rate_L                         share of the distinct rows that lie in the fast tier

A row counts the updates that touched it (`TableState.uses`), so n-grams are counted in batches. All heads of an order
read the same n-gram, and each head counts at least the batches that had it. So the least count of the heads is never
below the true count (a count-min sketch), and 1 - least / count is a lower bound of the share of a head's row that
belongs to other n-grams. It is exact if the n-gram has the row of one head alone. The heads of an order have nearly the
same number of rows, so their shares should be alike: the mean tells how full the table is, and a much larger worst head
shows an unsuitable hash.

A metric without instances in the batch (an empty bucket; staleness before the first update) is NaN; loggers leave NaN
out.

Legend: B batch, T seq, H rows per token, O orders, K heads per order, M residual streams, S shards, U rows of a list.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.layers.reader import RecordingReader
from engram_jax.memory import routing
from engram_jax.memory.description import LoadedRows, MemoryPlan, MemoryRows
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import Batch, TrainState
from engram_jax.sharding import spec

Metrics = dict[str, jax.Array]

BUCKETS = {"0": (0, 0), "1_3": (1, 3), "4_15": (4, 15), "16_63": (16, 63), "64_up": (64, 2**31 - 1)}
"""Smallest and largest number of earlier batches with an n-gram of the highest order, by bucket."""


def make_monitor(parts: Parts) -> Callable[..., Metrics]:
    """Jitted `metrics = monitor(state, batch, plan, loaded=None)`: float32 scalars. Nothing is donated.

    `loaded`: the plan's rows; required if the tables lie outside the program. None: the monitor loads them.
    """
    store = parts.store

    def monitor(state: TrainState, batch: Batch, plan: MemoryPlan, loaded: LoadedRows | None = None) -> Metrics:
        loaded = loaded or store.load(state.memory, plan)
        real_BT = batch["segment_ids"] != 0
        uses = routing.send_rows({layer: loaded[layer].uses[:, None] for layer in plan}, plan, store.transport)
        gates = {}
        if store.config.has_gates:
            gates = _gates(parts, state, batch, store.rows(loaded, plan, state.step))
        metrics = {}
        for layer in plan:
            uses_BTOK = uses[layer][..., 0].reshape(*real_BT.shape, -1, store.config.engram_n_heads)
            if sharding := spec("batch", "seq", None, None):  # the exchange cuts rows along T as well
                uses_BTOK = jax.reshard(uses_BTOK, sharding)
            numbers = {f"collision_{layer}/{name}": x for name, x in collisions(uses_BTOK, real_BT).items()}
            seen_BT = jnp.min(uses_BTOK[:, :, -1], axis=-1)
            if layer in gates:
                spread = gate_spread(gates[layer], seen_BT, real_BT)
                numbers |= {f"gate_{layer}/{name}": x for name, x in spread.items()}
            last_U = store.optimizer.last_updates(loaded[layer].slots)
            if last_U is not None:
                waited = staleness(loaded[layer].uses, last_U, state.step)
                numbers |= {f"staleness_{layer}/{name}": x for name, x in waited.items()}
            metrics |= {f"memory/{name}": x for name, x in numbers.items()}
        if store.placement.has_tiers:
            metrics |= {f"memory/hit_rate_{layer}": x for layer, x in store.hit_rate(state.memory, plan).items()}
        return metrics

    return jax.jit(monitor)


def collisions(uses_BTOK: jax.Array, real_BT: jax.Array) -> Metrics:
    """By order, the share of a row's updates that belong to other n-grams; 0 for rows without updates."""
    least_BTO1 = jnp.min(uses_BTOK, axis=-1, keepdims=True)
    own_BTOK = jnp.where(uses_BTOK > 0, least_BTO1 / jnp.maximum(uses_BTOK, 1), 1.0)
    share_OK = jnp.mean(1 - own_BTOK, axis=(0, 1), where=_like(real_BT, own_BTOK))
    metrics = {}
    for i, share_K in enumerate(share_OK):
        metrics |= {f"order{i + 2}": jnp.mean(share_K), f"order{i + 2}_worst_head": jnp.max(share_K)}
    return metrics


def gate_spread(gate_BTM: jax.Array, seen_BT: jax.Array, real_BT: jax.Array) -> Metrics:
    """Mean and standard deviation of the gates, by stream and by the number of batches that had the n-gram."""
    gate_BTM, real_BTM = gate_BTM.astype(jnp.float32), _like(real_BT, gate_BTM)
    mean_M, std_M = (f(gate_BTM, axis=(0, 1), where=real_BTM) for f in (jnp.mean, jnp.std))
    metrics = {}
    for m in range(gate_BTM.shape[-1]):
        metrics |= {f"stream{m}_mean": mean_M[m], f"stream{m}_std": std_M[m]}
    for name, (first, last) in BUCKETS.items():
        inside_BTM = _like(real_BT & (seen_BT >= first) & (seen_BT <= last), gate_BTM)
        metrics[f"seen_{name}_mean"] = jnp.mean(gate_BTM, where=inside_BTM)
        metrics[f"seen_{name}_std"] = jnp.std(gate_BTM, where=inside_BTM)
    return metrics


def staleness(uses_U: jax.Array, last_U: jax.Array, step: jax.Array) -> Metrics:
    """Steps since the last update of the distinct rows that were ever updated: 0 for rows of the previous step.

    Unused places have no uses, so they do not count.
    """
    waited_U = jnp.where(uses_U > 0, (step - last_U).astype(jnp.float32), jnp.nan)
    return {"mean": jnp.nanmean(waited_U), "max": jnp.nanmax(waited_U)}


def _gates(parts: Parts, state: TrainState, batch: Batch, rows: MemoryRows) -> dict[str, jax.Array]:
    """Each Engram layer's gates: [B, T, M]. The compiler leaves out the layers after the last gate."""
    model = parts.model(state.params, state.buffers)
    recorders = {layer: RecordingReader(reader) for layer, reader in model.engram.items()}
    model.engram = nnx.Dict(recorders)  # type: ignore[assignment]  # called as a reader is
    model.hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
    return {layer: recorder.gate_btm[...] for layer, recorder in recorders.items()}


def _like(mask_BT: jax.Array, x: jax.Array) -> jax.Array:
    """The mask with the further dims of x: [B, T, ...]."""
    return jnp.broadcast_to(mask_BT.reshape(*mask_BT.shape, *[1] * (x.ndim - 2)), x.shape)
