"""One training step after another, with plans made ahead and rows read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax

from engram_jax.memory.description import LoadedRows, MemoryPlan, MemoryState
from engram_jax.memory.row_carrier import RowCarrier
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import Batch, TrainState
from engram_jax.training.monitors import make_monitor
from engram_jax.training.planner import PlannedBatches, Planner
from engram_jax.training.step import Metrics, make_eval_step, make_train_step


def reads_ahead(parts: Parts) -> bool:
    """Whether the next batch's rows are read while the current step computes; the numbers are the same either way.

    Never from device memory, where reading is cheap. Never inside a program on CPU: XLA:CPU (jax 0.10) drops the
    barrier that puts the reading before the writing, and copies the whole table at every step.
    """
    placement = parts.store.placement
    if not parts.config.memory.prefetch or placement.on_device:
        return False
    return not placement.in_program or parts.mesh.devices.flat[0].platform != "cpu"


class Stepper:
    """Takes the batches of a run through the training step. Use as a context manager; call under the run's mesh."""

    def __init__(self, parts: Parts, batches: Iterator[Batch], log: Callable[[str], None] = print):
        self._store = parts.store
        self._batches = PlannedBatches(batches, Planner(parts.store, log))
        self._step = make_train_step(parts)
        settings, placement = parts.config.memory, parts.store.placement
        self._reads_ahead = reads_ahead(parts)
        self._loaded: LoadedRows | None = None
        """Rows of the current batch, if they were read in the previous step."""
        self._promote = None
        if placement.has_tiers and settings.promote_every:
            at_rest = MemoryState(parts.store.tables_at_rest(), None)  # type: ignore[arg-type]
            self._promote = jax.jit(parts.store.promote, donate_argnums=0, out_shardings=at_rest)
        self._promote_every = settings.promote_every
        self._carrier = None if placement.in_program else RowCarrier(parts.store, self._reads_ahead)
        """Carries the rows of tables that the step cannot reach."""
        self._monitor = None
        if parts.store.layers and settings.monitor_every:
            self._monitor = make_monitor(parts)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_) -> None:
        if self._carrier is not None:
            self._carrier.close()

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """The state after the next batch; `step` is the number of steps done. The old state is donated."""
        batch, plan = self._batches.current
        if self._carrier is not None:
            state, metrics = self._step_with(self._carrier, state, batch, plan)
        elif self._reads_ahead:
            following = self._batches.following
            loaded = self._loaded or jax.jit(self._store.load)(state.memory, plan)
            state, metrics, self._loaded = self._step(state, batch, plan, loaded, following)
        else:
            state, metrics, _ = self._step(state, batch, plan)
        if self._promote is not None and (step + 1) % self._promote_every == 0:
            state = replace(state, memory=self._promote(state.memory, plan))
        self._batches.advance()
        return state, metrics

    def _step_with(
        self, carrier: RowCarrier, state: TrainState, batch: Batch, plan: MemoryPlan
    ) -> tuple[TrainState, Metrics]:
        """A step without tables: the carrier brings the batch's rows and takes them back."""
        tables = state.memory.tables
        loaded = carrier.load(tables, plan)
        if self._reads_ahead:
            carrier.read_ahead(tables, self._batches.following)
        inside = replace(state, memory=replace(state.memory, tables={}))
        state, metrics, moved = self._step(inside, batch, plan, loaded)
        if moved is not None:  # None: the row optimizer moves no rows
            carrier.save(tables, plan, moved)
        return replace(state, memory=replace(state.memory, tables=tables)), metrics

    def look(self, state: TrainState) -> Metrics:
        """Metrics of the memory on the next batch, before its step (training/monitors.py); {} without memory."""
        if self._monitor is None:
            return {}
        batch, plan = self._batches.current
        if self._carrier is not None:
            self._carrier.settle()
            loaded = self._store.load(state.memory, plan)
            return self._monitor(replace(state, memory=replace(state.memory, tables={})), batch, plan, loaded)
        if self._reads_ahead and self._loaded is None:
            self._loaded = jax.jit(self._store.load)(state.memory, plan)
        return self._monitor(state, batch, plan, self._loaded)

    def settle(self) -> None:
        """Waits until every update has reached the tables, before they are saved or evaluated."""
        if self._carrier is not None:
            self._carrier.settle()


def make_evaluator(parts: Parts, log: Callable[[str], None] = print) -> Callable[[TrainState, Batch], jax.Array]:
    """`losses_BT = evaluator(state, batch)`, with plans that fit, for any placement."""
    planner, step, store = Planner(parts.store, log), make_eval_step(parts), parts.store

    def losses(state: TrainState, batch: Batch) -> jax.Array:
        plan = planner(batch)
        if store.placement.in_program:
            return step(state, batch, plan)
        loaded = store.load(state.memory, plan)
        return step(replace(state, memory=replace(state.memory, tables={})), batch, plan, loaded)

    return losses
