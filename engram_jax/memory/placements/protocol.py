"""What a placement must say. A new one is one file beside this one and one line in `PLACEMENTS`.

Legend: R local rows of a shard, U rows of a batch.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import jax

from engram_jax.config import MemoryConfig
from engram_jax.memory.table import TableState

Table = Any  # a pytree of arrays; a TableState where a placement has no need of more


class Placement(Protocol):
    """Where the rows of a table lie. Every method sees one shard, inside shard_map and under jit.

    Ids are local rows, ascending and distinct; those at or beyond the shard's end read as zero and write nowhere.
    """

    in_program: bool
    """False: the rows lie where a compiled program cannot reach them; memory/outside.py carries them in and out."""

    @classmethod
    def create(cls, config: MemoryConfig) -> Self: ...

    def allocate(self, num_rows: int, like: TableState) -> Table:
        """Zeros for `num_rows` rows; `like` gives one row's shapes and dtypes, [1, ...]."""
        ...

    def take(self, table: Table, ids_U: jax.Array) -> TableState:
        """The rows `ids_U` and their optimizer rows, in device memory: [U, ...]."""
        ...

    def put(self, table: Table, ids_U: jax.Array, batch: TableState) -> Table:
        """The table with these rows replaced, in place when it is donated."""
        ...
