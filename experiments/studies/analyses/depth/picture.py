"""The pictures of `depth`: lens.png, cka.png and alignment.png, the paper's beside ours.

Legend: S seeds, L layers; A layers of one model, B of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engram_jax.analysis.cka import draw_cka, soft_alignment
from engram_jax.analysis.logit_lens import DIRECTIONS, draw_lens
from engram_jax.pictures import HEADING, SMALL, STYLES, TITLE, Style, plain_axes, save
from experiments.studies.analyses.depth.measure import Measured
from experiments.studies.analyses.depth.report import paper
from experiments.studies.trained.pair import ENGRAM, MOE

PAPERS_K = 5
"""Layers that the paper's soft alignment weighs."""
PAIRS = ((MOE, MOE), (MOE, ENGRAM), (ENGRAM, ENGRAM))


def draw(measured: Measured, folder: Path) -> None:
    """Writes lens.png, and with two seeds or more cka.png and alignment.png."""
    papers = paper()
    save(lens_figure(measured, papers), folder / "lens.png")
    if len(measured.seeds) > 1:
        save(cka_figure(measured, papers), folder / "cka.png")
        save(alignment_figure(measured, papers), folder / "alignment.png")


def lens_figure(measured: Measured, paper: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(15, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(DIRECTIONS) + 1)
    dots = " (dots: seeds)" if len(measured.seeds) > 1 else ""
    title = f"How far each layer's prediction is from that of the last layer{dots}"
    figure.suptitle(title, fontweight="bold", fontsize=HEADING)
    for axes, direction in zip(panels, DIRECTIONS, strict=False):
        draw_lens(axes, {point: measured.divergence(point, direction) for point in (MOE, ENGRAM)})
        axes.set_title(f"this study: KL({direction})", fontsize=TITLE)
    draw_lens(panels[-1], {name: np.array([curve]) for name, curve in paper["divergence"].items()}, first=0)
    panels[-1].set_title("the paper, figure 4a: direction not stated, one run each", fontsize=TITLE)
    return figure


def cka_figure(measured: Measured, paper: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(18, 4.3), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(PAIRS) + 1)
    figure.suptitle("How alike the layers of two models are (CKA)", fontweight="bold", fontsize=HEADING)
    for axes, pair in zip(panels, PAIRS, strict=False):
        mean_AB = np.mean([like.cka_AB for like in measured.between(*pair)], axis=0)
        same = pair[0] == pair[1]
        names = (f"{pair[0]}, a seed", f"{pair[1]}, another") if same else pair
        draw_cka(axes, mean_AB, measured.alignment(*pair).mean(0), *names)
        axes.set_title(f"{pair[0]} and {pair[1]}, seeds differ{': the control' if same else ''}", fontsize=TITLE)
    papers_AB = np.array(paper["cka"]["Engram-27B"])
    draw_cka(panels[-1], papers_AB, soft_alignment(papers_AB, PAPERS_K), "MoE-27B", "Engram-27B")
    panels[-1].set_title("the paper, figure 4b: no control", fontsize=TITLE)
    panels[-1].legend(fontsize=SMALL, loc="lower right")
    return figure


def alignment_figure(measured: Measured, paper: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    ours, papers = figure.subplots(1, 2)
    curves = {f"{MOE} of another seed: the control": (MOE, MOE), ENGRAM: (MOE, ENGRAM)}
    _draw_alignment(ours, {label: measured.alignment(*pair) for label, pair in curves.items()}, STYLES)
    ours.set_title("this study (dots: seeds)", fontsize=TITLE)
    _draw_alignment(papers, {name: np.array([line]) for name, line in paper["alignment"].items()}, STYLES[1:])
    papers.set_title("the paper, figures 4b and 4c: no control", fontsize=TITLE)
    return figure


def _draw_alignment(axes: Axes, curves: Mapping[str, np.ndarray], styles: Sequence[Style]) -> None:
    layers = np.arange(max(curve_SB.shape[1] for curve_SB in curves.values()))
    axes.plot(layers, layers, ":", color="#999999", label="same layer")
    for (label, curve_SB), (color, marker) in zip(curves.items(), styles, strict=False):
        axes.plot(layers, curve_SB.mean(0), color=color, label=label)
        for curve_B in curve_SB:
            axes.plot(layers, curve_B, marker, color=color, markersize=3, alpha=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("like the baseline's layer (soft alignment)")
    plain_axes([axes])
    axes.legend(frameon=False, fontsize=SMALL)
