"""One training step and one evaluation step: the only compiled functions of a run.

    tokens -> plan -> fetch -> [ loss and gradients, in grad_accum parts ] -> reduce -> clip -> update

The rows of the whole batch are fetched before the first part and updated after the last. Nothing in the differentiated
function is as large as a table.

Legend: B batch, T seq, A accumulation parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.layers.cross_entropy import NO_LOSS
from engram_jax.model import updated_buffers
from engram_jax.sharding import spec
from engram_jax.training.assembly import Parts
from engram_jax.training.state import TrainState

Batch = dict[str, jax.Array]  # int32 [B, T]: tokens, targets, segment_ids, positions
Metrics = dict[str, jax.Array]


def make_train_step(parts: Parts) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Jitted `state, metrics = step(state, batch)`; the state is donated."""
    config, store = parts.config, parts.store
    accum = config.train.grad_accum

    def loss(params, rows, buffers, batch, total_count):
        """This part's share of the batch's mean loss, so that parts add up to the gradient of the whole batch."""
        model = parts.model(params, buffers)
        hidden_BTD, stats = model.hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
        cross_entropy = jnp.sum(model.token_losses(hidden_BTD, batch["targets"])) / total_count
        balance = sum((jnp.sum(stack.seq_aux) for stack in stats.values()), jnp.zeros(())) / accum
        return cross_entropy + config.model.moe.seq_aux_alpha * balance, (cross_entropy, stats)

    def gradients(params, rows, buffers, batch) -> tuple[Any, Any]:
        total_count = jnp.maximum(jnp.sum(batch["targets"] != NO_LOSS), 1)
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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        plan = store.plan(batch["tokens"], batch["segment_ids"])
        rows = store.fetch(state.memory, plan, state.step)
        (cross_entropy, stats), (grads, row_grads) = gradients(state.params, rows, state.buffers, batch)
        row_grads = store.reduce(plan, row_grads)
        norm = optax.tree.norm((grads, row_grads))
        if config.optimizer.clip_norm:
            scale = jnp.minimum(1.0, config.optimizer.clip_norm / jnp.maximum(norm, 1e-30))
            grads, row_grads = jax.tree.map(lambda g: g * scale, (grads, row_grads))
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(jnp.add, state.params, updates),
            buffers=updated_buffers(state.buffers, stats, config.model),
            opt_state=opt_state,
            memory=store.update(state.memory, plan, row_grads, state.step),
        )
        metrics = {"loss": cross_entropy, "grad_norm": norm, "learning_rate": parts.schedule(state.step)}
        if stats:
            loads = jnp.concatenate([stack.load_E for stack in stats.values()])
            metrics["expert_load_max"] = jnp.max(loads) * loads.shape[-1]
        for layer, row_plan in plan.items():
            distinct = jnp.sum(row_plan.unique_U < store.num_rows(layer))
            metrics[f"memory/distinct_share_{layer}"] = distinct / row_plan.unique_U.size
        return new_state, metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(parts: Parts) -> Callable[[TrainState, Batch], jax.Array]:
    """Jitted `losses_BT = step(state, batch)`: nats at each position, 0 where the target is not scored."""

    def eval_step(state: TrainState, batch: Batch) -> jax.Array:
        plan = parts.store.plan(batch["tokens"], batch["segment_ids"])
        rows = parts.store.fetch(state.memory, plan, state.step)
        model = parts.model(state.params, state.buffers)
        hidden_BTD, _ = model.hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
        return model.token_losses(hidden_BTD, batch["targets"])

    return jax.jit(eval_step)


def _to_parts(tree: Any, accum: int) -> Any:
    """[B, ...] -> [A, B/A, ...]; part a takes sequences a, a + A, ..., so every device keeps its own sequences."""

    def split(x):
        parts = x.reshape(x.shape[0] // accum, accum, *x.shape[1:])
        parts = jnp.moveaxis(parts, 1, 0)
        sharding = spec(None, "batch", *[None] * (x.ndim - 1))
        return parts if sharding is None else jax.reshard(parts, sharding)

    return jax.tree.map(split, tree)


def _from_parts(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
