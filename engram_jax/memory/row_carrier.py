"""Rows of tables outside compiled programs, carried to and from the devices on a thread beside the training step."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from engram_jax.memory import numpy_tables
from engram_jax.memory.description import LoadedRows, MemoryPlan
from engram_jax.memory.numpy_tables import Tables
from engram_jax.memory.store import MemoryStore


class RowCarrier:
    """Carries rows for a training loop on its own thread, so that no step waits for the tables.

    The loop calls for each batch, in this order: `load`, `read_ahead` for the next batch, the step, `save`. The thread
    does one thing at a time, in the order of the calls:

        step t computes        the thread reads the rows of batch t+1   (the tables lack the update of step t)
        step t is done         the thread writes the rows of batch t
        load(t+1)              rows of batch t+1 that step t changed are replaced on the device: the same bits

    If the thread fails, the next call and every later one raises its exception; the tables are then useless.
    """

    def __init__(self, store: MemoryStore, reads_ahead: bool):
        self._store, self._reads_ahead = store, reads_ahead
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="memory-carrier")
        self._patch = jax.jit(store.patch, donate_argnums=0)
        self._writes: deque[Future[None]] = deque()
        self._early: tuple[MemoryPlan, Future[LoadedRows]] | None = None
        self._newer: list[tuple[MemoryPlan, LoadedRows]] = []
        """Rows saved since the early rows were asked for."""

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
        """Starts to read the rows that the next `load` will ask for. Does nothing without `reads_ahead`."""
        if self._reads_ahead:
            self._early, self._newer = (plan, self._worker.submit(numpy_tables.load, self._store, tables, plan)), []

    def save(self, tables: Tables, plan: MemoryPlan, loaded: LoadedRows) -> None:
        """Starts to write rows, as soon as the devices have computed them. Do not donate them to any program."""
        self._raise_failure()
        jax.tree.map(lambda x: x.copy_to_host_async(), loaded)
        self._writes.append(self._worker.submit(self._write, tables, plan, loaded))
        if self._early is not None:
            self._newer.append((plan, loaded))

    def settle(self) -> None:
        """Waits until every update has reached the tables."""
        while self._writes:
            self._writes[0].result()  # a failed write stays in the queue, so that every later call raises it again
            self._writes.popleft()

    def close(self) -> None:
        """Ends the thread after its last task. Raises nothing: call `settle` first to learn whether a task failed."""
        self._worker.shutdown()

    def _write(self, tables: Tables, plan: MemoryPlan, loaded: LoadedRows) -> None:
        try:
            numpy_tables.save(self._store, tables, plan, loaded)
        except Exception as error:
            error.add_note(
                "Raised while updated rows were written to tables outside the compiled program. Some rows may be "
                "written and others not: continue from the last checkpoint."
            )
            raise

    def _raise_failure(self) -> None:
        while self._writes and self._writes[0].done():
            self._writes[0].result()
            self._writes.popleft()
