"""The picture of `frequency`: a column for each text, from what was read to what was held out, on equal axes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.analysis.groups import OverSeeds
from engram_jax.comparison.picture import STYLES
from experiments.studies.analyses.trained_runs import DIFFERENCE, save_figure

if TYPE_CHECKING:
    from experiments.studies.analyses.frequency.measure import Measured


def draw(measured: Measured, path: Path) -> None:
    """Saves the picture as a PNG, atomically."""
    kinds = [
        kind for kind in ("gate", "age") if f"{kind} {measured.layers[0]}" in next(iter(measured.numbers.values()))
    ]
    size = (1 + 5.5 * len(measured.numbers), 3 + 2.2 * len(kinds))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(
        1 + len(kinds),
        len(measured.numbers),
        sharey="row",
        sharex="col",
        squeeze=False,
        height_ratios=[1.4, *[1] * len(kinds)],
    )
    for column, (text, quantities) in enumerate(measured.numbers.items()):
        shares = quantities["share"]
        _draw_losses(panels[0][column], quantities)
        panels[0][column].set_title(text, fontweight="bold")
        for row, kind in enumerate(kinds, start=1):
            for number, layer in enumerate(measured.layers, start=1):
                color, marker = STYLES[number % len(STYLES)]
                _draw_line(panels[row][column], quantities[f"{kind} {layer}"], list(shares), color, marker, layer)
        below = panels[-1][column]
        below.set_xticks(range(len(shares)), [f"{label}\n({by.mean:.0%})" for label, by in shares.items()])
        below.set_xlabel(f"the {measured.order}-gram's occurrences elsewhere in what was read (share of the tokens)")
    names = {"gate": "gate (mean of streams)", "age": "steps since the rows' update"}
    for row, label in enumerate(["nats per token, memory - twin", *(names[kind] for kind in kinds)]):
        panels[row][0].set_ylabel(label, fontsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    if kinds:
        panels[1][0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_losses(axes: Axes, quantities: dict[str, dict[str, OverSeeds]]) -> None:
    by_bucket = quantities[DIFFERENCE]
    x, places = np.arange(len(by_bucket)), list(quantities["share"])
    axes.bar(x, [by.mean for by in by_bucket.values()], 0.7, color=STYLES[1][0], alpha=0.75)
    axes.errorbar(
        x, [by.mean for by in by_bucket.values()], [by.stderr or 0 for by in by_bucket.values()], fmt="none", ecolor="k"
    )
    for label, by in by_bucket.items():
        if len(by.values) > 1:
            axes.plot([places.index(label)] * len(by.values), by.values, ".", color="black", markersize=4)
    axes.axhline(0, color="black", linewidth=0.8)


def _draw_line(
    axes: Axes, by_bucket: dict[str, OverSeeds], places: list[str], color: str, marker: str, layer: str
) -> None:
    x = [places.index(label) for label in by_bucket]
    axes.plot(
        x, [by.mean for by in by_bucket.values()], f"{marker}-", color=color, markersize=5, label=f"layer {layer}"
    )
    for at, by in zip(x, by_bucket.values(), strict=True):
        axes.plot([at] * len(by.values), by.values, ".", color=color, markersize=3, alpha=0.6)
