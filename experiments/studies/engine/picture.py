"""A study's picture: losses with error bars over seeds and the fitted curves; the paper's beside them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.comparison.picture import STYLES
from experiments.studies.engine import differences, fits
from experiments.studies.engine.declared import Point, Study, by_series
from experiments.studies.engine.files import whole
from experiments.studies.engine.results import complete, losses_by_seed

LABEL = "validation loss (nats per token)"
LOWEST = "loss above the curve's lowest point"


def draw(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Saves the picture as a PNG, atomically."""
    is_list = study.shape == "differences"
    height = max(5.0, 0.3 * len(points) + 1.5) if is_list else 5.0
    figure = Figure(figsize=(13 if study.paper else 7, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if study.paper else 1, squeeze=False)[0]
    figure.suptitle(study.question, fontsize=11, wrap=True)
    if is_list:
        _list_ours(panels[0], study, points, rows)
    else:
        _draw_ours(panels[0], study, points, rows)
    if study.paper:
        paper = json.loads((Path(__file__).parents[1] / "paper" / study.paper).read_text())
        panels[1].set_title(paper["source"].split(";")[0], fontsize=9)
        if is_list:
            _list_papers(panels[1], paper["baseline"], differences.papers_differences(study))
        else:
            _draw_papers(panels[1], study, paper)
    for axes in panels:
        axes.grid(axis="x" if is_list else "y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if is_list:
            continue
        axes.set_xlabel(study.x_label)
        axes.legend(frameon=False, fontsize=8)
        if study.shape == "log_line":
            axes.set_xscale("log")
    with whole(path) as own:
        figure.savefig(own, format="png")


def _draw_ours(axes: Axes, study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> None:
    groups, losses = by_series(points), losses_by_seed(rows)
    lifts = study.shape == "valley" and len(groups) > 1  # budgets lie far apart, and would flatten each other
    for (series, group), (color, marker) in zip(groups.items(), STYLES[1:], strict=False):
        finished = {point.x: list(losses[point.name].values()) for point in group if point.name in losses}
        if not finished:
            continue
        x_P, (seeds, loss_PS) = np.array([point.x for point in group]), complete(group, rows)
        spread = "seeds"
        if len(seeds) > 1:  # what a seed does to all points is no doubt about any of them
            centred_PS, spread = loss_PS - loss_PS.mean(axis=0) + loss_PS.mean(), "seeds, paired"
            finished = dict(zip(x_P.tolist(), centred_PS.tolist(), strict=True))
        means = np.array([statistics.mean(values) for values in finished.values()])
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in finished.values()]
        ground = means.min() if lifts else 0.0
        head = f"{series}: " if series else ""
        label = f"{head}mean ± std over {spread}" + (f", lowest {ground:.4f}" if lifts else "")
        axes.errorbar(list(finished), means - ground, deviations, fmt=marker, color=color, capsize=3, label=label)
        for x, values in finished.items():
            axes.plot([x] * len(values), np.array(values) - ground, ".", color=color, alpha=0.3, markersize=4)
        curve = None if study.shape == "differences" else fits.fit(study.shape, x_P, loss_PS)
        if curve is not None:
            x = (np.geomspace if study.shape == "log_line" else np.linspace)(x_P.min(), x_P.max(), 200)
            axes.plot(x, curve.at(x) - ground, "--", color=color, label=f"{head}fit, seeds paired")
    axes.set_title("this study", fontsize=10)
    axes.set_ylabel(LOWEST if lifts else LABEL)


def _draw_papers(axes: Axes, study: Study, paper: Mapping[str, Any]) -> None:
    for (name, curve), (color, marker) in zip(paper["curves"].items(), STYLES[1:], strict=False):
        x, loss = np.array(curve).T
        if study.shape == "valley":
            name, loss = f"{name}: lowest {loss.min():.4f} at {x[loss.argmin()]:g}", loss - loss.min()
        axes.plot(x, loss, marker, color=color, linestyle=":", label=name)
    axes.set_ylabel(LOWEST if study.shape == "valley" else LABEL)


def _list_ours(axes: Axes, study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> None:
    """A line for every point, in the study's order: each seed's difference, their mean, and its interval."""
    compared, color = differences.compare(study, points, rows), STYLES[1][0]
    for y, each in enumerate(compared):
        if len(each.by_S) > 1:
            axes.plot(fits.interval(each.by_S), [y, y], "-", color=color, linewidth=1.5)
        axes.plot(each.by_S, [y] * len(each.by_S), "|", color=STYLES[0][0], alpha=0.6)
        axes.plot([each.mean], [y], STYLES[1][1], color=color)
    _finish_list(axes, {each.name: each.by_S for each in compared}, study.baseline_of(points).name)
    axes.set_title(f"this study: mean, {fits.LEVEL} % interval, seeds", fontsize=10)


def _list_papers(axes: Axes, baseline: str, by: Mapping[str, float]) -> None:
    axes.plot(list(by.values()), range(len(by)), STYLES[2][1], color=STYLES[2][0])
    _finish_list(axes, {name: np.array([mean]) for name, mean in by.items()}, baseline)


def _finish_list(axes: Axes, by: Mapping[str, np.ndarray], baseline: str) -> None:
    """Axes that show all differences, but neither whole intervals, which of two seeds are six times as wide as of
    five, nor one point so far away that it would flatten the others: that one is written at the edge."""
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(by)), list(by))
    axes.set_ylim(max(len(by), 1) - 0.5, -0.5)
    axes.set_xlabel(f"loss less that of {baseline} (nats per token; left is better)")
    if not by:
        return
    far = _outlier(by)
    seen = np.concatenate([values for name, values in by.items() if name != far] + [np.zeros(1)])
    margin = 0.3 * float(np.ptp(seen)) or 0.01
    axes.set_xlim(seen.min() - margin, seen.max() + margin)
    if far:
        mean = float(by[far].mean())
        edge, side = (seen.max() + margin, "right") if mean > 0 else (seen.min() - margin, "left")
        text = f"{mean:+.4f} \u2192 " if mean > 0 else f" \u2190 {mean:+.4f}"
        axes.text(edge, list(by).index(far), text, ha=side, va="center", fontsize=9)


def _outlier(by: Mapping[str, np.ndarray]) -> str:
    """The point three times as far from the baseline as any other; empty if there is none."""
    ordered = sorted(by, key=lambda name: abs(float(by[name].mean())))
    if len(ordered) < 3:
        return ""
    furthest, next_one = (abs(float(by[name].mean())) for name in (ordered[-1], ordered[-2]))
    return ordered[-1] if furthest > 3 * next_one else ""
