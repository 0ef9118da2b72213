"""The base class of placements. A new placement is one file beside this one and one line in registries.py.

docs/extending.md shows two complete ones.

Legend: R local rows of a shard, U rows of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jax.sharding import Mesh

from engram_jax.config import MemoryConfig, require
from engram_jax.memory.table import TableState
from engram_jax.registries import PLACEMENTS

Table = Any
"""One layer's table as its placement keeps it: a pytree of arrays inside programs, any object outside them."""


class Placement(ABC):
    """The memory that holds the tables, and how the rows of a batch are read from it and written back.

    A subclass implements `allocate`, `take` and `put`. They see one shard; ids are local rows of that shard, int32,
    ascending and distinct. Ids of R and above are unused places: they read as zero and write nothing.

    The attributes and the other methods answer what the rest of the package asks about a placement. Their defaults
    describe a placement that keeps all rows in one kind of memory, reachable from compiled programs.
    """

    in_program: ClassVar[bool] = True
    """True: compiled programs call `allocate`, `take` and `put`, under jit and inside shard_map. False: Python calls
    them between the steps, with NumPy arrays and on a thread of its own (numpy_tables.py, row_carrier.py)."""
    on_device: ClassVar[bool] = False
    """True: the memory of the devices holds every row. Reading a row twice is then cheap, so that no row is read
    ahead, and a row optimizer may pass over the whole table."""
    has_tiers: ClassVar[bool] = False
    """True: some rows lie in faster memory than the others, and the placement implements `promote` and `hit_rate`."""
    serving_placement: ClassVar[str] = ""
    """Name of the placement for sampling, evaluation and analysis of a run that was trained with this one. Empty: this
    one. Required where `in_program` is False."""

    @classmethod
    def create(cls, config: MemoryConfig, platform: str) -> Self:
        """The placement as configured.

        Args:
          config: the settings `memory.*` of the run.
          platform: cpu, gpu or tpu, the platform of the mesh's devices.

        Raises:
          ConfigError: a setting that means nothing to this placement.
        """
        refuse_folder(config)
        return cls()

    @property
    def device_share(self) -> float:
        """Share of a table's bytes that the memory of the devices holds, between 0 and 1."""
        return 1.0 if self.on_device else 0.0

    @property
    def folder(self) -> str:
        """Folder of the files that hold the tables; two stores cannot share it. Empty: there are no files."""
        return ""

    # --- one shard ---

    @abstractmethod
    def allocate(self, num_rows: int, like: TableState) -> Table:
        """A shard of `num_rows` rows, all zero. `like`: shapes and dtypes of one row, [1, ...]."""

    @abstractmethod
    def take(self, table: Table, ids_U: Any) -> TableState:
        """The rows `ids_U` with their slots and uses: [U, ...], in device memory or, outside programs, NumPy arrays."""

    @abstractmethod
    def put(self, table: Table, ids_U: Any, batch: TableState) -> Table:
        """The table with the rows `ids_U` replaced by `batch` [U, ...]; in place where the table is donated.

        Outside programs always in place: it returns the table that it was given.
        """

    # --- inside programs ---

    def at_rest(self, mesh: Mesh, table: Table) -> Any:
        """`out_shardings` of a jitted function that returns this table, whose arrays have shapes [S * R, ...].

        A pytree of shardings and formats. None: jit chooses.
        """
        return None

    def check_room(self, shard_bytes: int, shards_here: int) -> None:
        """Raises `ConfigError` with the numbers if the tables do not fit. Called before anything is allocated.

        Args:
          shard_bytes: rows and optimizer rows of all tables on one device.
          shards_here: devices of this process.
        """
        return None

    # --- outside programs ---

    def allocate_tables(self, num_rows: Mapping[str, int], shards: int, like: TableState) -> dict[str, list[Table]]:
        """Several tables, each as a list of `shards` shards of `num_rows[name]` rows, all zero.

        Override it to check first that all tables fit together, or to keep shards side by side.

        Raises:
          ConfigError: the tables do not fit.
        """
        return {name: [self.allocate(rows, like) for _ in range(shards)] for name, rows in num_rows.items()}

    def put_range(self, table: Table, start: int, batch: TableState) -> None:
        """Replaces the rows start .. start + U in place. Rows of R and above are dropped."""
        self.put(table, np.arange(start, start + len(batch.uses), dtype=np.int32), batch)

    # --- tiers ---

    def promote(self, table: Table, ids_U: jax.Array) -> Table:
        """The table with rows `ids_U` moved to the fast tier, as far as they are used more than rows there.

        Moves rows and changes no value. Called with the table donated, after the batch's update was saved.
        """
        raise NotImplementedError(f"{type(self).__name__} has no tiers.")

    def hit_rate(self, table: Table, ids_U: jax.Array) -> jax.Array:
        """Share of the rows `ids_U` that lie in the fast tier: float32 scalar, NaN where no id is a row."""
        raise NotImplementedError(f"{type(self).__name__} has no tiers.")


def in_program_placements() -> list[str]:
    """Names of the placements whose tables compiled programs can reach."""
    return [name for name in PLACEMENTS if PLACEMENTS[name].in_program]


def refuse_folder(config: MemoryConfig) -> None:
    """Raises `ConfigError` if the settings name a folder for tables, for placements that keep no files."""
    require(
        not config.mmap_dir,
        f"memory.mmap_dir={config.mmap_dir!r}: memory.placement={config.placement} keeps no files. Remove mmap_dir, or "
        "choose memory.placement=numpy.",
    )
