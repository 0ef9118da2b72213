"""Tables in the memory of the host, read and written from inside the jitted program.

The host's processors gather and scatter the rows (`compute_on(compute_type="device_host")`). Only a batch's rows cross
to the device and back; the table never moves, and a donated table is written in place. So an accelerator holds memory
in proportion to the rows of a batch, and the host's memory limits one chip's share of a table.

Two conditions keep it so. Only `memory_analysis()` shows if one of them is broken:

* The arrays are in row-major order, untiled. A TPU's default layout is tiled, for arrays in host memory too, but a host
  computation works on plain arrays: XLA would convert the whole table before every gather and after every scatter.
  So jit needs `out_shardings=...at_rest(mesh, table)` for every output that is a table. Arguments bring their layout
  with them.
* Narrow floats are stored as unsigned integers of their width. XLA:CPU scatters integers in place, but bfloat16 (before
  jax 0.12) and float8 through a wider copy of the table.

Legend: R local rows of a shard, U rows of a batch, D row width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on as compute_on_api
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from engram_jax.config import ConfigError
from engram_jax.memory.placements.base import Placement
from engram_jax.memory.table import TableState
from engram_jax.sharding import MESH_AXES

HOST_MEMORY = "pinned_host"

_UNTILED = ((1,),)
_SORTED: Any = {"indices_are_sorted": True, "wrap_negative_indices": False}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostTable:
    """A table in host memory.

    bits: arrays of the table's shapes; bfloat16 as uint16, float8 as uint8, other dtypes unchanged.
    dtypes: the dtypes of the numbers, in the order of `bits`' leaves.
    """

    bits: TableState
    dtypes: tuple[str, ...] = field(metadata={"static": True})


@dataclass(frozen=True)
class HostPlacement(Placement):
    """Every array of the table in `pinned_host` memory of the host whose device owns the shard."""

    def check_room(self, shard_bytes: int, shards_here: int) -> None:
        check_room(shard_bytes * shards_here)

    def at_rest(self, mesh: Mesh, table: HostTable) -> Any:
        """Sharding, memory kind and layout of a table's arrays [S * R, ...], for jit's `out_shardings`."""
        return jax.tree.map(lambda x: self._at_rest(mesh, x.ndim), table)

    def _at_rest(self, mesh: Mesh, ndim: int) -> Format | NamedSharding:
        if mesh.empty:  # outside a mesh: one device, as in a notebook
            device = jax.local_devices()[0]
            sharding: Any = SingleDeviceSharding(device, memory_kind=HOST_MEMORY)
        else:
            device = mesh.devices.flat[0]
            sharding = NamedSharding(mesh, P(MESH_AXES), memory_kind=HOST_MEMORY)
        if device.platform != "tpu":  # other platforms never tile, and know no layouts
            return sharding
        return Format(Layout(tuple(range(ndim)), _UNTILED), sharding)

    def allocate(self, num_rows: int, like: TableState) -> HostTable:
        """Zeros, [num_rows, ...] for each leaf of `like` (shapes [1, ...]), made by the host in its own memory."""

        def zeros(leaf: jax.Array) -> jax.Array:
            # Without the barrier XLA makes a constant as large as the table on the device, and copies it to the host.
            zero = jax.lax.optimization_barrier(jnp.zeros((), _bits_dtype(leaf.dtype)))
            return jnp.broadcast_to(zero, (num_rows, *leaf.shape[1:]))

        bits = _on_host(lambda: jax.tree.map(zeros, like), jax.memory.Space.Host)()
        return HostTable(bits, tuple(str(leaf.dtype) for leaf in jax.tree.leaves(like)))

    def take(self, table: HostTable, ids_U: jax.Array) -> TableState:
        """Rows `ids_U` in device memory, [U, ...] for each array."""
        num_rows = table.bits.rows.shape[0]

        def gather(bits: TableState, ids_U: jax.Array) -> TableState:
            return jax.tree.map(lambda x: x.at[ids_U].get(mode="promise_in_bounds", **_SORTED), bits)

        # The bounds are applied on the device: jax refuses constants beside operands in host memory.
        bits = _on_host(gather, jax.memory.Space.Device)(table.bits, _to_host(jnp.minimum(ids_U, num_rows - 1)))
        leaves, structure = jax.tree.flatten(bits)
        leaves = [_from_bits(x, dtype) for x, dtype in zip(leaves, table.dtypes, strict=True)]
        return structure.unflatten([_zero_where(ids_U >= num_rows, x) for x in leaves])

    def put(self, table: HostTable, ids_U: jax.Array, batch: TableState) -> HostTable:
        """The table with rows `ids_U` replaced, in place when it is donated."""

        def scatter(bits: TableState, ids_U: jax.Array, new: TableState) -> TableState:
            def rows(x: jax.Array, new_U: jax.Array) -> jax.Array:
                return x.at[ids_U].set(new_U, mode="drop", unique_indices=True, **_SORTED)

            return jax.tree.map(rows, bits, new)

        new = _to_host(jax.tree.map(_to_bits, batch))
        bits = _on_host(scatter, jax.memory.Space.Host)(table.bits, _to_host(ids_U), new)
        return HostTable(bits, table.dtypes)


def available_host_bytes() -> int | None:
    """Memory that is available on this host, in bytes; None where the operating system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024  # in kB (proc(5))
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_room(needed_bytes: int, available_bytes: int | None = None) -> None:
    """Checks that this host's share of the tables fits into its memory.

    Args:
      needed_bytes: rows and optimizer rows of all shards whose devices belong to this process.
      available_bytes: None: `available_host_bytes()`; if that is unknown, there is no check.

    Raises:
      ConfigError: more memory is needed than available.
    """
    available = available_host_bytes() if available_bytes is None else available_bytes
    if available is not None and needed_bytes > available:
        raise ConfigError(
            f"Tables in host memory need {needed_bytes / 1e9:.1f} GB on this host, which has {available / 1e9:.1f} GB "
            "available: lower engram_vocab_size or engram_head_dim, choose an optimizer with smaller rows, or use "
            "more hosts."
        )


def _on_host(function: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """`function` run by the host; `out` is the `jax.memory.Space` of its results."""
    # jax 0.10 calls this function compute_on2; its compute_on is an older context manager.
    compute_on: Any = getattr(compute_on_api, "compute_on2", None) or compute_on_api.compute_on
    return compute_on(function, compute_type="device_host", out_memory_spaces=out)


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def _bits_dtype(dtype: Any) -> Any:
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return {1: jnp.uint8, 2: jnp.uint16}[jnp.dtype(dtype).itemsize] if narrow else dtype


def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _bits_dtype(x.dtype))


def _from_bits(x: jax.Array, dtype: str) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(dtype))


def _zero_where(is_zero_U: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(jax.lax.expand_dims(is_zero_U, range(1, x.ndim)), jnp.zeros((1,) * x.ndim, x.dtype), x)
