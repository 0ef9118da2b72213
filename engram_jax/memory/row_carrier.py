"""Rows of tables outside the compiled program, carried in and out on a thread beside the training step."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from engram_jax.memory import numpy_tables
from engram_jax.memory.description import LoadedRows, MemoryPlan
from engram_jax.memory.numpy_tables import Tables
from engram_jax.memory.store import MemoryStore


class RowCarrier:
    """Carries rows for a training loop on a thread of its own, so that no step waits for the tables.

    For each batch, in this order: `load`, then `read_ahead` of the next batch, the step, `save`. The thread does one
    thing after another, as they were asked for:

        step t computes        rows of t+1 are gathered   (the tables lack the update of t)
        step t is done         rows of t are written
        load(t+1)              rows of t+1 that t changed are replaced by t's, on the device: the same bits

    If the thread fails, the next call and every one after it raises what it raised; the tables are then of no use.
    """

    def __init__(self, store: MemoryStore, reads_ahead: bool):
        self._store, self._reads_ahead = store, reads_ahead
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="memory-carrier")
        self._patch = jax.jit(store.patch, donate_argnums=0)
        self._writes: deque[Future[None]] = deque()
        self._early: tuple[MemoryPlan, Future[LoadedRows]] | None = None
        self._newer: list[tuple[MemoryPlan, LoadedRows]] = []
        """Rows saved since the early ones were asked for."""

    def load(self, tables: Tables, plan: MemoryPlan) -> LoadedRows:
        """The plan's rows after every update saved so far. Call under the run's mesh."""
        early, self._early = self._early, None
        newer, self._newer = self._newer, []
        if early is None or early[0] is not plan:
            self.settle()
            return numpy_tables.load(self._store, tables, plan)
        loaded = early[1].result()
        self._raise_failure()
        for saved_plan, saved in newer:
            loaded = self._patch(loaded, plan, saved, saved_plan)
        return loaded

    def read_ahead(self, tables: Tables, plan: MemoryPlan) -> None:
        """Starts to gather the rows that the next `load` will ask for. Does nothing without `reads_ahead`."""
        if self._reads_ahead:
            self._early, self._newer = (plan, self._worker.submit(numpy_tables.load, self._store, tables, plan)), []

    def save(self, tables: Tables, plan: MemoryPlan, loaded: LoadedRows) -> None:
        """Starts to write rows, as soon as the devices have them. They must not be donated to anything."""
        self._raise_failure()
        jax.tree.map(lambda x: x.copy_to_host_async(), loaded)
        self._writes.append(self._worker.submit(self._write, tables, plan, loaded))
        if self._early is not None:
            self._newer.append((plan, loaded))

    def settle(self) -> None:
        """Waits until every update has reached the tables."""
        while self._writes:
            self._writes[0].result()  # a failed one stays, to be raised again
            self._writes.popleft()

    def close(self) -> None:
        """Ends the thread once it has done what it was asked. Raises nothing: `settle` says whether that went well."""
        self._worker.shutdown()

    def _write(self, tables: Tables, plan: MemoryPlan, loaded: LoadedRows) -> None:
        try:
            numpy_tables.save(self._store, tables, plan, loaded)
        except Exception as error:
            error.add_note(
                "Raised while updated rows were written to the tables (memory.placement=numpy). Some of them may be "
                "written and some not: go on from the last checkpoint."
            )
            raise

    def _raise_failure(self) -> None:
        while self._writes and self._writes[0].done():
            self._writes[0].result()
            self._writes.popleft()
