"""Batches from the hosts' memory to the devices: every process brings the rows that its own devices need.

Which rows these are is the mesh's business: a torus of chips need not follow the order of the processes, and devices of
several processes may need the same rows (those that share a sequence or a matrix).
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.runs.state import Batch
from engram_jax.sharding import spec


class Feed:
    """Call under the mesh."""

    def __init__(self, mesh: Mesh, batch_size: int):
        self._sharding = NamedSharding(mesh, spec("batch", "seq"))  # type: ignore[arg-type]
        by_row = NamedSharding(mesh, P(self._sharding.spec[0]))
        everything = np.arange(batch_size)
        places = by_row.addressable_devices_indices_map((batch_size,)).values()
        self.rows: list[int] = sorted({int(row) for index in places for row in everything[index]})
        """Of the global batch, those needed here."""
        self._batch_size = batch_size

    def rows_here(self, batch: dict[str, np.ndarray]) -> Batch:
        """The global batch on the devices, of which `batch` holds `self.rows` only."""
        return self._put(batch, np.searchsorted(self.rows, np.arange(self._batch_size)))

    def whole(self, batch: dict[str, np.ndarray]) -> Batch:
        """The global batch on the devices, which every process has in full."""
        return self._put(batch, np.arange(self._batch_size))

    def _put(self, batch: dict[str, np.ndarray], places: np.ndarray) -> Batch:
        def put(x: np.ndarray) -> jax.Array:
            shape = (self._batch_size, *x.shape[1:])

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return x[places[index[0]]][(slice(None), *index[1:])]

            return jax.make_array_from_callback(shape, self._sharding, part)

        with jax.transfer_guard("allow"):  # the loop allows no others
            return {name: put(x) for name, x in batch.items()}


def on_host(x: jax.Array) -> np.ndarray:
    """All of an array, on every process. All of them must call it."""
    return jax.device_get(x if x.is_fully_addressable else _everywhere(x))


_everywhere = jax.jit(lambda x: jax.reshard(x, P()))
