"""Plans that fit: the shapes of the exchange are static, and this is who chooses them.

A plan is integers only and needs nothing but tokens, so it is made ahead of the step that uses it. Blocks and lists
start at what evenly spread ids would need, are then cut to what the first batch needed plus SLACK, and grow when a
batch needs more: that batch is planned again, larger, before any step sees it. Nothing overflows in silence, nothing
is dropped, and the numbers of a run do not depend on the shapes.
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
"""Room over what the largest block of the first batch needed. What travels is then 1.11 to 1.13 times what the busiest
device asks for (standard-library text, 8 devices); devices whose text repeats more send more empty places."""
MULTIPLE = 8


class Planner:
    """Makes the plans of a run's batches. `start` returns at once; `finish` waits and makes sure that the plan fits."""

    def __init__(self, store: MemoryStore, log: Callable[[str], None] = print):
        self._store, self._log = store, log
        self._capacities: dict[str, Capacity] | None = None
        self._exchanges = store.shards > 1 and bool(store.layers)  # one device knows its places beforehand
        self._tuned = False
        self._plan = jax.jit(self._plan_tokens, static_argnums=2)
        self.replanned = 0

    def start(self, batch: Batch) -> MemoryPlan:
        store, tokens = self._store, batch["tokens"]
        if self._exchanges and self._capacities is None:
            lookups = tokens.size // store.shards * store.config.num_rows_per_token
            even = Capacity(-(-lookups // store.shards), lookups)
            self._capacities = {layer: self._grown(layer, even) for layer in store.layers}
        sizes = tuple(sorted(self._capacities.items())) if self._capacities else None
        return self._plan(tokens, batch["segment_ids"], sizes)

    def finish(self, batch: Batch, plan: MemoryPlan) -> MemoryPlan:
        """The batch's plan, made again as often as it takes to fit.

        Raises:
          RunError: an id is no row of its table, or was damaged on its way.
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
        """Made before the shapes last grew: one more pair of shapes would be one more compile of the step."""
        return self._capacities != {layer: capacity(p) for layer, p in plan.items()}

    def _enlarged(self, layer: str, given: Capacity, need: Capacity) -> Capacity:
        """Grown where it is too small, and there only: places that travel empty cost as much as full ones."""
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
    """A run's batches on the devices, each with its plan, and a look at the plan that follows."""

    AHEAD = 3  # the current batch, the one whose rows may be read already, and one whose plan is on its way

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
        self._fill(1)
        return self._finished[0]

    @property
    def following(self) -> MemoryPlan:
        """The plan of the batch after the current one."""
        self._fill(2)
        return self._finished[1][1]

    def advance(self) -> None:
        """Leaves the current batch behind."""
        self._fill(1)
        self._finished.popleft()
