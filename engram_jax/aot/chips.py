"""TPU chips by their public figures, and the topologies they come in.

Sizes count CHIPS everywhere in this project: `v5p-64` is 64 chips, v5p:4x4x4. (gcloud's accelerator types count
TensorCores for v4 and v5p: there the same slice is v5p-128.)

Figures: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, as of November 2026. `clock_ghz` is not published for
all: it is the published FLOP/s over the multiply-adds of the matrix units, and only turns the compiler's cycles into
seconds. A v4 has six links of 50 GB/s. Between slices of v4 nothing is published: v5e's rate stands in.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from engram_jax.config import ConfigError, require

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    name: str
    libtpu: str
    """libtpu's name for the chip."""
    hbm_bytes: int
    """Memory that the compiler gives a program: measured by asking for too much, a little under the published size."""
    flops: float
    """FLOP/s in bfloat16."""
    hbm_rate: float
    """Bytes per second between chip and memory."""
    ici_rate: float
    """Bytes per second that a chip can send within its slice, over all its links: half the bidirectional figure."""
    dcn_rate: float
    """Bytes per second between slices."""
    host_bytes: int
    """Memory of a host with `chips_per_host` chips."""
    torus: int
    """Dimensions of the network between chips: 2 or 3."""
    max_chips: int
    """Chips of the largest slice."""
    clock_ghz: float
    devices: int = 1
    """jax devices on one chip."""
    chips_per_host: int = 4
    usual: tuple[str, ...] = ()
    """The shapes of its usual slices."""
    libtpu_config: str = ""
    """libtpu's chip_config_name. A v4 needs "megacore", which makes its two TensorCores one device as on a VM."""


_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            "v4",
            int(30.75 * GIB),
            275e12,
            1200e9,
            300e9,
            3.1e9,
            407 * 10**9,
            3,
            4096,
            1.05,
            usual=_3D,
            libtpu_config="megacore",
        ),
        Chip("v5e", "v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, 3.1e9, 192 * 10**9, 2, 256, 1.5, usual=_2D),
        Chip(
            "v5p",
            "v5p",
            int(95.74 * GIB),
            459e12,
            2765e9,
            600e9,
            6.25e9,
            448 * 10**9,
            3,
            6144,
            1.75,
            usual=(*_3D, "16x16x24"),
        ),
        Chip("v6e", "v6e", int(31.25 * GIB), 918e12, 1638e9, 400e9, 12.5e9, 720 * 10**9, 2, 256, 1.75, usual=_2D),
        Chip("7x", "tpu7x", int(189.5 * GIB), 2307e12, 7380e9, 600e9, 12.5e9, 960 * 10**9, 3, 9216, 2.2, 2, usual=_3D),
    )
}
_ALIASES = {"tpu7x": "7x", "v7x": "7x", "ironwood": "7x", "trillium": "v6e", "v5litepod": "v5e"}


@dataclass(frozen=True)
class Topology:
    chip: Chip
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.dims)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        return max(1, self.chips // self.chip.chips_per_host)

    @property
    def libtpu(self) -> str:
        return f"{self.chip.libtpu}:{'x'.join(map(str, self.dims))}"

    @property
    def name(self) -> str:
        """Such as v5p-64; with several slices v5p-64-x2, each of 64 chips."""
        return f"{self.chip.name}-{math.prod(self.dims)}" + (f"-x{self.slices}" if self.slices > 1 else "")

    def __str__(self) -> str:
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{several}{self.chip.name}:{'x'.join(map(str, self.dims))} ({self.chips} chips, {self.hosts} hosts)"


def topology(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as `v5p-64` (chips) or `v5p:4x4x4` (the slice's shape).

    Raises:
      ConfigError: there is no such chip or slice; the message lists the valid ones.
    """
    require(slices > 0, f"--slices {slices} must be positive.")
    found = re.fullmatch(r"([a-z0-9]+?)(?::(\d+(?:x\d+)+)|-(\d+))", name.strip().lower())
    chip = CHIPS.get(_ALIASES.get(found.group(1), found.group(1))) if found else None
    if found is None or chip is None:
        raise ConfigError(
            f"{name!r} is not a TPU slice. Use a chip ({', '.join(CHIPS)}) with a number of chips or a shape, for "
            "example v5p-64 or v5p:4x4x4."
        )
    if found.group(2):
        dims = tuple(int(d) for d in found.group(2).split("x"))
        if len(dims) < 3 and chip.torus == 3:
            dims = (*dims, *[1] * (3 - len(dims)))
    else:
        chips = int(found.group(3))
        by_size = {math.prod(shape): shape for shape in map(_dims, chip.usual)}
        if chips not in by_size:
            raise ConfigError(f"--topology {name!r}: there is no {chip.name} slice of {chips} chips. {_usual(chip)}")
        dims = by_size[chips]
    require(_exists(chip, dims), f"--topology {name!r}: there is no {chip.name} slice of this shape. {_usual(chip)}")
    return Topology(chip, dims, slices)


def _dims(shape: str) -> tuple[int, ...]:
    return tuple(int(d) for d in shape.split("x"))


def _exists(chip: Chip, dims: tuple[int, ...]) -> bool:
    """A usual shape; of a 3D network also any of whole cubes of 4x4x4, sorted by length."""
    if dims in map(_dims, chip.usual):
        return True
    is_cubes = len(dims) == 3 and all(d % 4 == 0 and d for d in dims) and list(dims) == sorted(dims)
    return chip.torus == 3 and is_cubes and math.prod(dims) <= chip.max_chips


def _usual(chip: Chip) -> str:
    listed = ", ".join(f"{chip.name}-{math.prod(_dims(shape))} = {shape}" for shape in chip.usual)
    cubes = f" (and any AxBxC of multiples of 4, A <= B <= C, up to {chip.max_chips} chips)" if chip.torus == 3 else ""
    counts = "Numbers are chips; gcloud's v4-N and v5p-N count TensorCores, two to a chip."
    return f"There are {listed}{cubes}. {counts}"
