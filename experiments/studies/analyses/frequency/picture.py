"""The picture of `frequency`: a column for each text, from the text that was read to the held-out one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.pictures import HEADING, STYLES, TEXT, TITLE, plain_axes, save
from experiments.studies.analyses.frequency.measure import SHARE, Measured
from experiments.studies.analyses.raw_numbers import mark_note
from experiments.studies.analyses.trained_runs import DIFFERENCE

KINDS = {"gate": "gate\n(mean of streams)", "age": "steps since the\nrows' update"}
"""Quantities of the memory that are drawn, and their axes' labels."""


def draw(measured: Measured, folder: Path) -> None:
    """Writes frequency.png."""
    save(figure(measured), folder / "frequency.png")


def figure(measured: Measured) -> Figure:
    kinds = [kind for kind in KINDS if f"{kind} {measured.layers[0]}" in next(iter(measured.numbers.values()))]
    columns = len(measured.numbers)
    made = Figure(figsize=(1.2 + 3.6 * columns, 3.2 + 2 * len(kinds)), dpi=150, layout="constrained")
    marks = mark_note(by for quantities in measured.numbers.values() for by in quantities[DIFFERENCE].values())
    heading = f"Memory by the frequency of the n-gram before a token ({marks})"
    made.suptitle(heading, fontweight="bold", fontsize=HEADING, wrap=True)
    made.supxlabel(
        f"occurrences of the {measured.order}-gram elsewhere in the text that was read (share of the tokens)",
        fontsize=TITLE,
    )
    heights = [1.4, *[1] * len(kinds)]
    panels = made.subplots(1 + len(kinds), columns, sharey="row", sharex="col", squeeze=False, height_ratios=heights)
    for column, (text, quantities) in enumerate(measured.numbers.items()):
        shares = quantities[SHARE]
        _draw_losses(panels[0][column], quantities[DIFFERENCE], list(shares))
        panels[0][column].set_title(text, fontsize=TITLE)
        for row, kind in enumerate(kinds, start=1):
            for number, layer in enumerate(measured.layers, start=1):
                color, marker = STYLES[number % len(STYLES)]
                _draw_line(panels[row][column], quantities[f"{kind} {layer}"], list(shares), color, marker, layer)
        panels[-1][column].set_xticks(range(len(shares)), [f"{label}\n({by.mean:.0%})" for label, by in shares.items()])
    for row, label in enumerate(["with memory - twin\n(nats per token)", *(KINDS[kind] for kind in kinds)]):
        panels[row][0].set_ylabel(label, fontsize=TITLE)
    for axes in panels.flat:
        axes.tick_params(labelsize=TEXT)
    plain_axes(panels.flat)
    if kinds:
        panels[1][0].legend(frameon=False, fontsize=TEXT)
    return made


def _draw_losses(axes: Axes, by_bucket: Mapping[str, OverSeeds], places: list[str]) -> None:
    x, means = [places.index(label) for label in by_bucket], [by.mean for by in by_bucket.values()]
    axes.bar(x, means, 0.7, color=STYLES[1][0], alpha=0.75)
    axes.errorbar(x, means, [by.stderr or 0 for by in by_bucket.values()], fmt="none", ecolor="black")
    for at, by in zip(x, by_bucket.values(), strict=True):
        if len(by.values) > 1:
            axes.plot([at] * len(by.values), by.values, ".", color="black", markersize=4)
    axes.axhline(0, color="black", linewidth=0.8)


def _draw_line(
    axes: Axes, by_bucket: Mapping[str, OverSeeds], places: list[str], color: str, marker: str, layer: str
) -> None:
    x, means = [places.index(label) for label in by_bucket], [by.mean for by in by_bucket.values()]
    axes.plot(np.array(x), means, f"{marker}-", color=color, markersize=5, label=f"layer {layer}")
    for at, by in zip(x, by_bucket.values(), strict=True):
        if len(by.values) > 1:
            axes.plot([at] * len(by.values), by.values, ".", color=color, markersize=3, alpha=0.6)
