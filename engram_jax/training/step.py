"""The training step and the evaluation step: the compiled functions in which a run spends its time.

    plan -> load -> rows -> [ loss and gradients, in grad_accum parts ] -> reduce -> clip -> advance -> save

The rows of the whole batch are fetched before the first part and updated after the last part. Nothing in the
differentiated function is as large as a table. Plans are made ahead (training/planner.py). With `next_plan`, the step
reads the rows of the next batch before it writes this batch's update, and then replaces those that the update changed.

Legend: B batch, T seq, A accumulation parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.config import RunConfig
from engram_jax.layers.moe import MoEStats
from engram_jax.memory.description import LoadedRows, MemoryPlan, MemoryState
from engram_jax.memory.plan import RowPlan, capacity, overflow, requests
from engram_jax.memory.store import MemoryStore
from engram_jax.model import updated_buffers
from engram_jax.optimizers.groups import is_frozen
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import Batch, TrainState
from engram_jax.sharding import sharding_of

Metrics = dict[str, jax.Array]


def make_train_step(parts: Parts) -> Callable[..., tuple[TrainState, Metrics, LoadedRows | None]]:
    """Jitted `state, metrics, loaded = step(state, batch, plan, loaded=None, next_plan=None)`.

    State and loaded rows are donated. Without `loaded` the step loads the plan's rows itself. The third result is

    * the rows of `next_plan`, if it is given;
    * this batch's updated rows, if the tables lie outside the program (`Placement.in_program`): the caller saves them;
    * otherwise None.

    A row optimizer that moves no rows (`RowOptimizer.moves_rows`) writes no tables: there is nothing to save, and
    `loaded` is not donated.
    """
    config, store = parts.config, parts.store
    accum = config.train.grad_accum
    moves_rows = store.optimizer.moves_rows

    def loss(params, rows, buffers, batch, total_count):
        """This part's share of the batch's mean loss: the gradients of the parts add up to the batch's gradient."""
        model = parts.model(_resting(params, config.optimizer.frozen), buffers)
        rows = rows if moves_rows else jax.lax.stop_gradient(rows)
        hidden_BTD, stats = model.hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
        cross_entropy = jnp.sum(model.token_losses(hidden_BTD, batch["targets"])) / total_count
        balance = sum((jnp.sum(stack.seq_aux) for stack in stats.values()), jnp.zeros(())) / accum
        return cross_entropy + config.model.moe.seq_aux_alpha * balance, (cross_entropy, stats)

    def gradients(params, rows, buffers, batch) -> tuple[Any, Any]:
        total_count = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1)
        loss_and_grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        if accum == 1:
            (_, aux), grads = loss_and_grads(params, rows, buffers, batch, total_count)
            return aux, grads

        def one_part(param_grads, part):
            part_rows, part_batch = part
            (_, aux), (grads, row_grads) = loss_and_grads(params, part_rows, buffers, part_batch, total_count)
            return jax.tree.map(jnp.add, param_grads, grads), (aux, row_grads)

        zeros = jax.tree.map(jnp.zeros_like, params)
        param_grads, ((losses, stats), row_grads) = jax.lax.scan(one_part, zeros, _to_parts((rows, batch), accum))
        stats = jax.tree.map(lambda s: jnp.mean(s, axis=0), stats)
        return (jnp.sum(losses), stats), (param_grads, _from_parts(row_grads))

    def train_step(
        state: TrainState,
        batch: Batch,
        plan: MemoryPlan,
        loaded: LoadedRows | None = None,
        next_plan: MemoryPlan | None = None,
    ) -> tuple[TrainState, Metrics, LoadedRows | None]:
        early = store.load(state.memory, next_plan) if next_plan is not None else None
        # Behind the barrier the program, and so every bit, is the same whether rows are read here or earlier.
        current: LoadedRows = jax.lax.optimization_barrier(loaded or store.load(state.memory, plan))
        rows = store.rows(current, plan, state.step)
        (cross_entropy, stats), (grads, row_grads) = gradients(state.params, rows, state.buffers, batch)
        row_grads = store.reduce(plan, row_grads) if moves_rows else {}
        norm = optax.tree.norm((grads, row_grads))
        if config.optimizer.clip_norm:
            scale = jnp.minimum(1.0, config.optimizer.clip_norm / jnp.maximum(norm, 1e-30))
            grads, row_grads = jax.tree.map(lambda g: g * scale, (grads, row_grads))
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
        if moves_rows:
            memory, loaded = _update_rows(store, state, plan, row_grads, current, early, next_plan)
        else:
            memory, loaded = state.memory, early
        new_state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(jnp.add, state.params, updates),
            buffers=updated_buffers(state.buffers, _with_moving_router(stats, state.params, config), config.model),
            opt_state=opt_state,
            memory=memory,
        )
        metrics = {"loss": cross_entropy, "grad_norm": norm, "learning_rate": parts.schedule(state.step)}
        if stats:
            loads = jnp.concatenate([stack.load_E for stack in stats.values()])
            metrics["expert_load_max"] = jnp.max(loads) * loads.shape[-1]
            if parts.mesh.shape["expert"] > 1:  # share of the routed rows that took a further round
                metrics["expert_carried"] = jnp.mean(jnp.stack([jnp.mean(stack.carried) for stack in stats.values()]))
        for layer, row_plan in plan.items():
            counters = _memory_metrics(store, row_plan)
            counters["used_share"] = memory.rows_used[layer] / store.num_rows(layer)
            metrics |= {f"memory/{name}_{layer}": value for name, value in counters.items()}
        return new_state, metrics, loaded

    at_rest = TrainState(None, None, None, None, MemoryState(store.tables_at_rest(), None))  # type: ignore[arg-type]
    donated = (0, 3) if moves_rows else 0  # rows that are only read have no result to be donated to
    return jax.jit(train_step, donate_argnums=donated, out_shardings=(at_rest, None, None))


def _resting(params: dict, patterns: tuple[str, ...]) -> dict:
    """Params with gradients stopped where they are frozen: XLA then does not compute these gradients."""
    if not patterns:
        return params
    return jax.tree.map(lambda x, rests: jax.lax.stop_gradient(x) if rests else x, params, is_frozen(params, patterns))


def _with_moving_router(stats: dict[str, MoEStats], params: dict, config: RunConfig) -> dict[str, MoEStats]:
    """The MoE stacks with a trained router: the balancing bias of a frozen router does not move either."""
    if not config.optimizer.frozen:
        return stats
    blocks = is_frozen(params, config.optimizer.frozen)["blocks"]
    return {name: stack for name, stack in stats.items() if not blocks[name]["ffn"]["router_de"]}


def _update_rows(
    store: MemoryStore,
    state: TrainState,
    plan: MemoryPlan,
    row_grads: dict[str, jax.Array],
    loaded: LoadedRows,
    early: LoadedRows | None,
    next_plan: MemoryPlan | None,
) -> tuple[MemoryState, LoadedRows | None]:
    """The tables after this batch, and the rows that the step returns: the next batch's, or updated rows to save."""
    if store.optimizer.whole_table:
        return store.update(state.memory, plan, row_grads, state.step), None
    if early is None and store.placement.on_device:
        # Reads the rows a second time. Kept over the whole step, rows and moments take 4.4 GB of a chip in engram_27b
        # on v5p-64, and reading them takes milliseconds. The barrier hides from XLA that both readings are the same.
        owned = {layer: row_plan.owned_U for layer, row_plan in plan.items()}
        tied: tuple[dict, dict] = jax.lax.optimization_barrier((owned, row_grads))
        plan = {layer: replace(row_plan, owned_U=tied[0][layer]) for layer, row_plan in plan.items()}
        return store.update(state.memory, plan, tied[1], state.step), None
    moved = store.advance(loaded, plan, row_grads, state.step)
    if early is None or next_plan is None:
        return store.save(state.memory, plan, moved), None if store.placement.in_program else moved
    # Without the barrier XLA does not know that the tables are read before they are overwritten, and copies them.
    both: tuple[LoadedRows, LoadedRows] = jax.lax.optimization_barrier((early, moved))
    early, moved = both
    return store.save(state.memory, plan, moved), store.patch(early, next_plan, moved, plan)


def _memory_metrics(store: MemoryStore, plan: RowPlan) -> Metrics:
    row_bytes = store.config.engram_head_dim * 4
    asked = requests(plan)
    places = capacity(plan).pair * store.shards
    return {
        "distinct_share": asked / plan.ids_BTH.size,  # share of the lookups that devices ask for
        "exchange_mb": jnp.float32(places * row_bytes / 1e6),  # per device and direction
        "exchange_overflow": overflow(plan),
    }


def make_eval_step(parts: Parts) -> Callable[..., jax.Array]:
    """Jitted `losses_BT = step(state, batch, plan, loaded=None)`: nats at each position, 0 where it is not scored."""
    store = parts.store

    def eval_step(state: TrainState, batch: Batch, plan: MemoryPlan, loaded: LoadedRows | None = None) -> jax.Array:
        rows = store.rows(loaded or store.load(state.memory, plan), plan, state.step)
        model = parts.model(state.params, state.buffers)
        hidden_BTD, _ = model.hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
        return model.token_losses(hidden_BTD, batch["targets"])

    return jax.jit(eval_step)


def _to_parts(tree: Any, accum: int) -> Any:
    """[B, ...] -> [A, B/A, ...]; part a takes sequences a, a + A, ..., so every device keeps its own sequences."""

    def split(x):
        parts = x.reshape(x.shape[0] // accum, accum, *x.shape[1:])
        parts = jnp.moveaxis(parts, 1, 0)
        sharding = sharding_of(x)
        return parts if sharding is None else jax.reshard(parts, jax.P(None, *sharding.spec))

    return jax.tree.map(split, tree)


def _from_parts(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
