"""The store by itself: what a step of the memory costs as the table grows, on one device and on eight.

    python -m benchmarks.store                                             # 0.1 to 40 million rows, all placements
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.store       # the same with huge pages (Linux)

A step is plan, fetch, reduce and update of one batch (4,096 tokens, 65,536 lookups, rows of 16, catch-up Adam). Beside
it, in the same run: `jnp.take` from a table sharded by rows, its dense gradient and dense Adam, which is what a table
costs as an ordinary embedding. Eight devices are eight threads of this machine, so their exchange is a copy in memory:
read ratios within one block, not across blocks. A larger table has more distinct rows to move (fewer n-grams share
one), so the time of each distinct row is printed too: that is what must not depend on the table.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tyro

CHILD = "ENGRAM_BENCHMARK_DEVICES"


@dataclass(frozen=True)
class Options:
    rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 40_000_000)
    """Rows of the tables."""
    plain_rows: tuple[int, ...] = (100_000, 1_000_000, 4_000_000)
    """Rows of the ordinary embedding: it holds four arrays of the table's size, and a copy while it updates."""
    devices: tuple[int, ...] = (1, 8)
    placements: tuple[str, ...] = ("device", "host", "tiered", "numpy")
    repeats: int = 9
    seed: int = 0
    corpus: str = "python"
    """Text for the share that de-duplication saves (see data.corpus). Empty: leave it out."""


B, T, WIDTH, VOCAB = 8, 512, 16, 32_000


def main(options: Options) -> None:
    if os.environ.get(CHILD) is None:  # fake devices are a matter of before jax starts: one process for each number
        for devices in options.devices:
            flags = f"--xla_force_host_platform_device_count={devices}"
            environment = os.environ | {CHILD: str(devices), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            subprocess.run([sys.executable, "-m", "benchmarks.store", *sys.argv[1:]], env=environment, check=True)
        return
    measure(options)


def measure(options: Options) -> None:
    import jax
    import numpy as np

    from benchmarks.common import header
    from benchmarks.memory import rounds

    header()
    mesh = make_mesh_here()
    rng = np.random.default_rng(options.seed)
    batches = [np.minimum(rng.zipf(1.2, (B, T)) - 1, VOCAB - 1).astype(np.int32) for _ in range(3)]
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        place: Callable[[Any], Any] = lambda x: jax.device_put(x, sharding)  # noqa: E731
        tokens = [{"tokens": place(x), "segment_ids": place(np.ones_like(x))} for x in batches]
        grads = place(rng.normal(size=(B, T, 16, WIDTH)).astype(np.float32))
        plain: dict[int, float] = {}
        for num_rows in options.plain_rows:
            entry = PlainTable(num_rows, mesh, tokens, grads)
            plain |= {num_rows: rounds({"plain": entry}, options.repeats)["plain"]}
            print(f"  {'take + dense Adam':18} {num_rows:>11,} rows  {plain[num_rows] * 1e3:8.1f} ms  {entry.memory()}")
            del entry
            gc.collect()
        for placement in options.placements:
            entries = {rows: StoreStep(rows, placement, mesh, tokens, grads) for rows in options.rows}
            times = rounds({str(rows): entry for rows, entry in entries.items()}, options.repeats)
            first = times[str(options.rows[0])]
            for rows, entry in entries.items():
                seconds = times[str(rows)]
                against = f"   {plain[rows] / seconds:6.1f} x faster than take + dense" if rows in plain else ""
                print(
                    f"  {placement:18} {rows:>11,} rows  {seconds * 1e3:8.1f} ms  {seconds / first:5.2f} x the first"
                    f"  {seconds / entry.distinct_rows() * 1e9:5.0f} ns for each distinct row"
                    f"  {entry.memory()}{against}"
                )
            del entries, entry
            gc.collect()
        if "numpy" in options.placements:
            read_ahead(options, mesh, tokens, grads)
        if options.corpus:
            deduplication(options, mesh, place)


def make_mesh_here() -> Any:
    from engram_jax.sharding import make_mesh

    return make_mesh(fsdp=int(os.environ[CHILD]))


def make_store(num_rows: int, placement: str, shards: int) -> Any:
    import numpy as np

    from engram_jax.config import EngramConfig, MemoryConfig
    from engram_jax.memory.compression import TokenMap
    from engram_jax.memory.row_optimizers import CatchUpAdam
    from engram_jax.memory.store import MemoryStore
    from engram_jax.registries import PLACEMENTS

    config = EngramConfig(engram_layer_ids=(0,), engram_head_dim=WIDTH, engram_vocab_size=num_rows // 16)
    where = PLACEMENTS[placement].create(MemoryConfig(placement=placement), "cpu")  # type: ignore[arg-type]
    optimizer = CatchUpAdam(np.full(1000, 1e-3))
    return MemoryStore.create(config, TokenMap.identity(VOCAB), optimizer, placement=where, shards=shards)


class StoreStep:
    """Plan, fetch, reduce, update; each call goes on from the last one's state."""

    def __init__(self, num_rows: int, placement: str, mesh: Any, batches: list, grads: Any):
        import jax

        from engram_jax.memory.description import MemoryState
        from engram_jax.training.planner import Planner

        self.store = make_store(num_rows, placement, mesh.size)
        self.planner = Planner(self.store, log=lambda _: None)
        self.batches, self.grads = itertools.cycle(batches), grads
        self.state = self.store.init(jax.random.key(0))
        self.inside = self.store.placement.in_program

        def step(state, plan, grads, held):
            held = held or self.store.load(state, plan)
            rows = self.store.rows(held, plan, 1)
            # rows enter the gradient, so that the fetch is not optimized away
            summed = self.store.reduce(plan, {"0": grads + 1e-6 * rows["0"]})
            moved = self.store.advance(held, plan, summed, 1)
            return self.store.save(state, plan, moved), None if self.inside else moved

        at_rest = MemoryState({"0": self.store.at_rest("0")} if self.inside else {}, None)  # type: ignore[arg-type]
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(at_rest, None))

    def __call__(self) -> Any:
        from dataclasses import replace

        from engram_jax.memory import numpy_tables

        plan = self.planner(next(self.batches))
        if self.inside:
            self.state, _ = self.step(self.state, plan, self.grads, None)
            return self.state
        held = self.store.load(self.state, plan)
        state, moved = self.step(replace(self.state, tables={}), plan, self.grads, held)
        numpy_tables.save(self.store, self.state.tables, plan, moved)
        self.state = replace(state, tables=self.state.tables)
        return moved

    def distinct_rows(self) -> int:
        """Rows that the owners read and write in one step."""
        return int((self.planner(next(self.batches))["0"].owned_U < self.store.layouts["0"].rows_per_shard).sum())

    def memory(self) -> str:
        table = self.store.num_bytes / 1e9
        if not self.inside:
            return f"table {table:6.3f} GB"
        plan = self.planner(next(self.batches))
        sizes = self.step.lower(self.state, plan, self.grads, None).compile().memory_analysis()
        return f"table {table:6.3f} GB, temporaries {sizes.temp_size_in_bytes / 1e9:6.3f} GB"


class PlainTable:
    """An ordinary embedding, sharded by rows: take, dense gradient, dense Adam."""

    def __init__(self, num_rows: int, mesh: Any, batches: list, grads: Any):
        import jax
        import jax.numpy as jnp
        import optax

        from engram_jax.memory.hashing import ngram_row_ids

        store = make_store(num_rows, "device", mesh.size)
        rows = -(-store.num_rows("0") // mesh.size) * mesh.size
        self.batches, self.grads = itertools.cycle([batch["tokens"] for batch in batches]), grads
        by_rows = jax.P(mesh.axis_names)
        adam = optax.adam(1e-3)
        table = jax.jit(lambda: jnp.zeros((rows, WIDTH), out_sharding=by_rows))()
        self.state = (table, jax.jit(adam.init)(table))

        def step(state, tokens, grads):
            table, moments = state
            ids_BTH = ngram_row_ids(store.constants, 0, tokens, None)
            batch = jax.P(mesh.axis_names)
            seen, back = jax.vjp(lambda table: table.at[ids_BTH].get(out_sharding=batch), table)
            updates, moments = adam.update(back(grads + 1e-6 * seen)[0], moments)
            return optax.apply_updates(table, updates), moments

        self.step = jax.jit(step, donate_argnums=0)
        self.table_bytes = 3 * table.nbytes

    def __call__(self) -> Any:
        self.state = self.step(self.state, next(self.batches), self.grads)
        return self.state

    def memory(self) -> str:
        compiled = self.step.lower(self.state, next(self.batches), self.grads).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        return f"table {self.table_bytes / 1e9:6.3f} GB, temporaries {temporaries / 1e9:6.3f} GB"


def read_ahead(options: Options, mesh: Any, batches: list, grads: Any) -> None:
    """A step of matrix products with a table outside the program, read before each step and while the last one runs."""
    import jax
    import jax.numpy as jnp

    from engram_jax.training.planner import PlannedBatches, Planner

    store = make_store(max(options.rows), "numpy", mesh.size)
    tables = store.init(jax.random.key(0)).tables
    x = jnp.ones((1024, 1024))

    @jax.jit
    def step(held, plan, grads):
        rows = store.rows(held, plan, 1)
        work = jax.lax.fori_loop(0, 16 // mesh.size, lambda _, y: jnp.tanh(y @ x), x)
        summed = store.reduce(plan, {"0": grads + 1e-6 * rows["0"] + 1e-20 * work[0, 0]})
        return store.advance(held, plan, summed, 1)

    from engram_jax.memory.row_carrier import RowCarrier

    def steps(reads_ahead: bool) -> Iterator[None]:
        planned = PlannedBatches(itertools.cycle(batches), Planner(store, log=lambda _: None))
        with contextlib.closing(RowCarrier(store, reads_ahead)) as carrier:
            while True:
                _, plan = planned.current
                held = carrier.load(tables, plan)
                if reads_ahead:
                    carrier.read_ahead(tables, planned.following)
                moved = step(held, plan, grads)
                carrier.save(tables, plan, moved)
                planned.advance()
                jax.block_until_ready(moved)
                yield

    runs = {"before each step": steps(False), "while the last one runs": steps(True)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            next(run)
            if repeat > 1:
                times[name].append(time.perf_counter() - start)
    (first, before), (second, ahead) = ((name, sorted(seconds)[len(seconds) // 2]) for name, seconds in times.items())
    print(
        f"  numpy, with computation: rows read {first} {before * 1e3:.1f} ms a step, "
        f"{second} {ahead * 1e3:.1f} ms ({ahead / before:.2f} x)"
    )


def deduplication(options: Options, mesh: Any, place: Callable[[Any], Any]) -> None:
    """The share of lookups that is left when every device asks for a row once, on text."""
    import numpy as np

    from engram_jax.config import DataConfig
    from engram_jax.data.loader import load_data
    from engram_jax.memory.plan import requests

    text = load_data(DataConfig(corpus=options.corpus), 4096, log=lambda _: None)
    stream = text.train.stream.tokens
    store = make_store(4_000_000, "device", mesh.size)
    for sequences, length in ((mesh.size, 512), (4 * mesh.size, 512), (4 * mesh.size, 4096)):
        tokens = np.asarray(stream[: sequences * length], np.int32).reshape(sequences, length)
        plan = store.plan(place(tokens))["0"]
        asked = int(requests(plan)) / plan.ids_BTH.size
        busiest = int(plan.need.pair) * mesh.size**2 / max(int(requests(plan)), 1)
        uneven = f"; the fullest block is {busiest:.2f} x the mean" if mesh.size > 1 else ""
        print(f"  {sequences // mesh.size} x {length} tokens a device: {asked:.1%} of the lookups are distinct{uneven}")


if __name__ == "__main__":
    main(tyro.cli(Options))
