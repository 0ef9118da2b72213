"""The look of every picture: colours, markers, sizes of text, and how a picture is saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.files import replacing

Style = tuple[str, str]
"""A colour and a marker."""
STYLES: tuple[Style, ...] = tuple(
    zip(("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vPX", strict=True)
)
"""Okabe and Ito's colours, which colour-blind readers can tell apart; each has its own marker, for print."""
HEADING, TITLE, TEXT, SMALL = 12, 10, 9, 8
"""Sizes in points: of a figure's heading, a panel's title, axes, and legends. Nothing is smaller than SMALL."""


def plain_axes(panels: Iterable[Axes], grid: str = "y") -> None:
    """Axes without a frame at the top and right, with a faint grid behind the data."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
        axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically. Raises `OSError`."""
    with replacing(path) as temporary, warnings.catch_warnings():
        # Matplotlib's font lacks many scripts and draws boxes for them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png")
