"""The planner: makes the plans of a run's batches and chooses the static shapes of their exchange.

A plan has only integers and depends only on tokens, so it is made before the step that uses it. Blocks and lists start
with the sizes that evenly spread ids need. After the first batch they get the sizes that it needed plus SLACK. When a
batch needs more, the sizes grow and that batch is planned again before any step uses it. So no lookup is dropped, and
the numbers of a run do not depend on the shapes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

from engram_jax.errors import RunError
from engram_jax.memory.description import MemoryPlan
from engram_jax.memory.plan import Capacity, RowIdError, capacity, check, fits
from engram_jax.memory.store import MemoryStore
from engram_jax.runs.state import Batch

SLACK = 1.1
"""Sizes relative to the largest block of the first batch. Devices then send 1.11 to 1.13 times what the busiest device
asks for (standard-library text, 8 devices); devices with more repetitive text send more empty places."""
MULTIPLE = 8
"""Sizes are multiples of this."""


class Planner:
    """Makes the plans of a run's batches. `start` returns at once; `finish` waits and makes sure that the plan fits."""

    def __init__(self, store: MemoryStore, log: Callable[[str], None] = print):
        self._store, self._log = store, log
        self._capacities: dict[str, Capacity] | None = None
        self._exchanges = store.shards > 1 and bool(store.layers)  # on one device the sizes follow from the batch
        self._tuned = False
        self._plan = jax.jit(self._plan_tokens, static_argnums=2)
        self.replanned = 0

    def start(self, batch: Batch) -> MemoryPlan:
        """The batch's plan with the present sizes, which it may overflow; does not wait for it."""
        store, tokens = self._store, batch["tokens"]
        if self._exchanges and self._capacities is None:
            lookups = tokens.size // store.shards * store.config.num_rows_per_token
            even = Capacity(-(-lookups // store.shards), lookups)
            self._capacities = {layer: self._grown(layer, even) for layer in store.layers}
        sizes = tuple(sorted(self._capacities.items())) if self._capacities else None
        return self._plan(tokens, batch["segment_ids"], sizes)

    def finish(self, batch: Batch, plan: MemoryPlan) -> MemoryPlan:
        """The batch's plan, made again with larger sizes until it fits.

        Raises:
          RunError: an id lies outside its table, or a request was damaged on its way.
        """
        if not self._exchanges:
            return plan
        capacities = self._capacities
        assert capacities is not None
        while not fits(plan) or not self._tuned or self._is_outdated(plan):
            if fits(plan) and not self._tuned:
                capacities = {layer: self._grown(layer, _need(p)) for layer, p in plan.items()}
                self._tuned = True
            elif not fits(plan):
                capacities = {layer: self._enlarged(layer, capacities[layer], _need(p)) for layer, p in plan.items()}
                if self._tuned:
                    self.replanned += 1
                    self._log(
                        f"Memory: a batch asks for more rows of one device than the exchange had room for; planned "
                        f"again with room for {capacities} (the step compiles once more)."
                    )
            self._capacities = capacities
            plan = self.start(batch)
        try:
            check(plan)
        except RowIdError as error:
            raise RunError(str(error)) from error
        return plan

    def __call__(self, batch: Batch) -> MemoryPlan:
        return self.finish(batch, self.start(batch))

    def _plan_tokens(self, tokens, segment_ids, sizes) -> MemoryPlan:
        return self._store.plan(tokens, segment_ids, dict(sizes) if sizes else None)

    def _is_outdated(self, plan: MemoryPlan) -> bool:
        """Whether the plan was made with earlier sizes; the step would have to compile for them as well."""
        return self._capacities != {layer: capacity(p) for layer, p in plan.items()}

    def _enlarged(self, layer: str, given: Capacity, need: Capacity) -> Capacity:
        """The given sizes, grown only where they are too small: empty places cost as much as full places."""
        grown = self._grown(layer, need)
        return Capacity(*(new if n > old else old for old, new, n in zip(given, grown, need, strict=True)))

    def _grown(self, layer: str, need: Capacity) -> Capacity:
        rows = self._store.layouts[layer].rows_per_shard

        def room(places: int) -> int:
            return min(-(-int(places * SLACK) // MULTIPLE) * MULTIPLE + MULTIPLE, rows)

        return Capacity(room(need.pair), room(need.owner))


def _need(plan: Any) -> Capacity:
    return Capacity(*map(int, jax.device_get(plan.need)))


class PlannedBatches:
    """A run's batches on the devices, each with its plan; knows the plan of the next batch too."""

    AHEAD = 3  # the current batch, the next batch, whose rows may be read already, and one that is being planned

    def __init__(self, batches: Iterator[Batch], planner: Planner):
        self._batches, self._planner = batches, planner
        self._started: deque[tuple[Batch, MemoryPlan]] = deque()
        self._finished: deque[tuple[Batch, MemoryPlan]] = deque()

    def _fill(self, count: int) -> None:
        while len(self._finished) + len(self._started) < self.AHEAD:
            batch = next(self._batches)
            self._started.append((batch, self._planner.start(batch)))
        while len(self._finished) < count:
            batch, plan = self._started.popleft()
            self._finished.append((batch, self._planner.finish(batch, plan)))

    @property
    def current(self) -> tuple[Batch, MemoryPlan]:
        """The current batch and its plan."""
        self._fill(1)
        return self._finished[0]

    @property
    def following(self) -> MemoryPlan:
        """The plan of the batch after the current one."""
        self._fill(2)
        return self._finished[1][1]

    def advance(self) -> None:
        """Makes the next batch the current one."""
        self._fill(1)
        self._finished.popleft()
