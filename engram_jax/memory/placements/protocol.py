"""What a placement must say. A new one is one file beside this one and one line in `PLACEMENTS`.

Legend: R local rows of a shard, U rows of a batch.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import jax
from jax.sharding import Mesh

from engram_jax.config import MemoryConfig
from engram_jax.memory.table import TableState

Table = Any  # a pytree of arrays; a TableState where a placement has no need of more


class Placement(Protocol):
    """Where the rows of a table lie. `allocate`, `take` and `put` see one shard, inside shard_map and under jit.

    Ids are local rows, ascending and distinct; those at or beyond the shard's end read as zero and write nowhere.
    """

    @property
    def in_program(self) -> bool:
        """Whether a compiled program can reach the rows. Otherwise memory/numpy_tables.py carries them in and out."""
        ...

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> Self:
        """`platform` is the one of the mesh's devices: cpu, gpu or tpu."""
        ...

    def at_rest(self, mesh: Mesh, table: Table) -> Any:
        """What `out_shardings` must say where a jitted function returns this table (arrays or shapes, [S * R, ...]).

        A pytree of shardings and formats, or None where nothing need be said.
        """
        ...

    def check_room(self, shard_bytes: int, shards_here: int) -> None:
        """Raises `ConfigError` with the numbers if this process's shards cannot fit, before anything is allocated."""
        ...

    def allocate(self, num_rows: int, like: TableState) -> Table:
        """Zeros for `num_rows` rows; `like` gives one row's shapes and dtypes, [1, ...]."""
        ...

    def take(self, table: Table, ids_U: jax.Array) -> TableState:
        """The rows `ids_U` and their optimizer rows, in device memory: [U, ...]."""
        ...

    def put(self, table: Table, ids_U: jax.Array, batch: TableState) -> Table:
        """The table with these rows replaced, in place when it is donated."""
        ...
