"""A study's picture: losses with error bars over seeds and the fitted curve; the paper's curve beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.compare_picture import STYLES
from experiments.studies import fits
from experiments.studies.declared import Point, Study
from experiments.studies.report import LOSS, complete

LABEL = "validation loss (nats per token)"


def draw(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Saves the picture as a PNG, atomically."""
    figure = Figure(figsize=(13 if study.paper else 7, 5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if study.paper else 1, squeeze=False)[0]
    figure.suptitle(study.question, fontsize=11, wrap=True)
    _draw_ours(panels[0], study, points, rows)
    if study.paper:
        _draw_papers(panels[1], study)
    for axes in panels:
        axes.set_xlabel(study.x_label)
        if study.shape == "log_line":
            axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw_ours(axes: Axes, study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> None:
    losses = {point.x: [row[LOSS] for row in rows if row["point"] == point.name] for point in points}
    losses = {x: values for x, values in losses.items() if values}
    means = [statistics.mean(values) for values in losses.values()]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in losses.values()]
    color, marker = STYLES[1]
    axes.errorbar(*(list(losses), means, deviations), fmt=marker, color=color, capsize=3, label="mean ± std over seeds")
    for x, values in losses.items():
        axes.plot([x] * len(values), values, ".", color=STYLES[0][0], alpha=0.4, markersize=4)
    _, loss_PS = complete(points, rows)
    x_P = np.array([point.x for point in points])
    curve = None if study.shape == "differences" else fits.fit(study.shape, x_P, loss_PS)
    if curve is not None:
        shown = np.geomspace if study.shape == "log_line" else np.linspace
        x = shown(x_P.min(), x_P.max(), 200)
        axes.plot(x, curve.at(x), "--", color=color, label="fit, seeds paired")
    axes.set_title("this study", fontsize=10)
    axes.set_ylabel(LABEL)


def _draw_papers(axes: Axes, study: Study) -> None:
    paper = json.loads((Path(__file__).parent / "data" / study.paper).read_text())
    for (name, curve), (color, marker) in zip(paper["curves"].items(), STYLES[2:], strict=False):
        x, loss = np.array(curve).T
        if study.shape == "valley":  # budgets lie far apart, and would flatten each other
            name, loss = f"{name}: lowest {loss.min():.4f} at {x[loss.argmin()]:g}", loss - loss.min()
        axes.plot(x, loss, marker, color=color, linestyle=":", label=name)
    axes.set_ylabel("loss above the curve's lowest point" if study.shape == "valley" else LABEL)
    axes.set_title(paper["source"].split(";")[0], fontsize=9)
