"""Arrays as a compiled program describes them: numbers, layout, the memory they lie in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces of a TPU's layouts: `S(1)` is on-chip vector memory, `S(5)` the host's. No mark: HBM."""

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> float:
        if self.dtype in _BITS:
            return _BITS[self.dtype] / 8
        digits = re.search(r"\d+", self.dtype)
        return int(digits.group()) / 8 if digits else 0

    @property
    def bytes(self) -> int:
        """Of the numbers alone."""
        return math.ceil(self.size * self.item_bytes)

    @property
    def padded_bytes(self) -> int:
        """As it lies in memory: the minor dims are rounded up to the layout's tile."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile:
            return self.bytes
        order = self.layout.split(":")[0]
        dims = [self.dims[int(d)] for d in reversed(order.split(","))] if order else list(self.dims)  # major to minor
        sizes = [int(t) for t in tile.group(1).split(",")]
        dims = [1] * (len(sizes) - len(dims)) + dims
        for i, size in enumerate(reversed(sizes), 1):
            dims[-i] = math.ceil(dims[-i] / size) * size
        return math.ceil(math.prod(dims) * self.item_bytes)

    @property
    def space(self) -> int:
        mark = re.search(r"S\((\d+)\)", self.layout)
        return int(mark.group(1)) if mark else HBM

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type: several if it is a tuple, of tuples too."""
    return tuple(_shape(*leaf.groups()) for leaf in _LEAF.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    return Shape(dtype, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip()), layout or "")
