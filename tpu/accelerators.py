"""TPU types: chips, hosts, memory and list prices."""

from __future__ import annotations

import dataclasses
import difflib

from tpu.errors import TpuError

# On-demand list prices in US regions, dollars per chip-hour, as published in 2025. Spot, committed use and other
# regions differ; an estimate made with these is an estimate.
PRICES_ARE = "on-demand list price in the US, 2025; check https://cloud.google.com/tpu/pricing"


@dataclasses.dataclass(frozen=True)
class Generation:
    name: str
    gcloud_name: str
    """The first part of gcloud's --accelerator-type."""
    per_chip: int
    """How much one chip counts in the number of a type: 2 (TensorCores) for v4 and v5p, 1 for v5e and v6e."""
    sizes: tuple[int, ...]
    """Numbers that a type may end with, up to one cube of 64 chips."""
    cubes: int
    """Largest number of whole cubes of 64 chips in a slice; 0: no cubes."""
    one_host: int
    """Largest number of chips in one VM. Larger slices have four chips per VM."""
    hbm_gb: int
    bf16_tflops: int
    runtime: str
    """The TPU VM image (--version, --runtime-version)."""
    dollars: float


_2D = (1, 4, 8, 16, 32, 64, 128, 256)
_3D = (8, 16, 32, 64)
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", "v4", 2, _3D, 32, 4, 32, 275, "tpu-ubuntu2204-base", 3.22),
        Generation("v5e", "v5litepod", 1, _2D, 0, 8, 16, 197, "v2-alpha-tpuv5-lite", 1.20),
        Generation("v5p", "v5p", 2, _3D, 96, 4, 95, 459, "v2-alpha-tpuv5", 4.20),
        Generation("v6e", "v6e", 1, _2D, 0, 8, 32, 918, "v2-alpha-tpuv6e", 2.70),
    )
}


@dataclasses.dataclass(frozen=True)
class Type:
    """An accelerator type, such as v5e-8."""

    generation: Generation
    number: int

    @property
    def name(self) -> str:
        return f"{self.generation.name}-{self.number}"

    @property
    def gcloud_name(self) -> str:
        return f"{self.generation.gcloud_name}-{self.number}"

    @property
    def chips(self) -> int:
        return self.number // self.generation.per_chip

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= self.generation.one_host else self.chips // 4

    @property
    def dollars_per_hour(self) -> float:
        return self.chips * self.generation.dollars

    def __str__(self) -> str:
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        chips = "1 chip" if self.chips == 1 else f"{self.chips} chips"
        return f"{self.name} ({chips}, {hosts}, {self.chips * self.generation.hbm_gb} GB of HBM)"


def parse_type(text: str) -> Type:
    """The type of that name; v5e-8 and gcloud's v5litepod-8 are the same type.

    Raises:
      TpuError: the type does not exist; the message lists the valid types.
    """
    word = text.strip().lower()
    family, _, number = word.rpartition("-")
    if family in ("tpu7x", "v7x", "v7", "ironwood") or word in ("tpu7x", "ironwood"):
        raise TpuError(f"--type {text} is rented out only through GKE: see 'Through GKE' in tpu/README.md.")
    generation = next((g for g in GENERATIONS.values() if family in (g.name, g.gcloud_name)), None)
    if generation is None:
        near = difflib.get_close_matches(family or word, GENERATIONS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise TpuError(
            f"--type {text!r} does not exist{hint}. Valid types: {'; '.join(map(sizes, GENERATIONS.values()))}."
        )
    # ASCII digits only and no leading zero: gcloud gets the number as the user wrote it.
    if not (number.isascii() and number.isdigit() and number == str(int(number)) and _exists(generation, int(number))):
        raise TpuError(f"--type {text!r} does not exist. Valid types: {sizes(generation)}.")
    return Type(generation, int(number))


def _exists(generation: Generation, number: int) -> bool:
    cube = 64 * generation.per_chip
    return number in generation.sizes or (number % cube == 0 and 0 < number // cube <= generation.cubes)


def sizes(generation: Generation) -> str:
    text = f"{generation.name}-" + ", ".join(map(str, generation.sizes))
    if generation.cubes:
        cube = 64 * generation.per_chip
        text += f" and multiples of {cube} up to {cube * generation.cubes}"
    return text


def table() -> str:
    """All generations, one line each."""
    lines = [f"{'':4} {'HBM/chip':>9} {'bf16/chip':>12} {'$/chip-hour':>12}  types"]
    for g in GENERATIONS.values():
        lines.append(f"{g.name:4} {g.hbm_gb:>6} GB {g.bf16_tflops:>5} TFLOP/s {g.dollars:>12.2f}  {sizes(g)}")
    cores = "The number counts chips for v5e and v6e, and TensorCores (two per chip) for v4 and v5p."
    return "\n".join([*lines, cores, f"Prices: {PRICES_ARE}."])
