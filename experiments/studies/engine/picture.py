"""A study's picture: losses with error bars over seeds and the fitted curves; the paper's numbers beside them.

Legend: P points, S seeds (suffixes).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.evaluation.over_seeds import LEVEL, OverSeeds
from engram_jax.pictures import HEADING, SMALL, STYLES, TEXT, TITLE, plain_axes, save
from experiments.studies.engine import fits
from experiments.studies.engine.declared import Point, Study, by_series
from experiments.studies.engine.differences import compare, papers_differences
from experiments.studies.engine.results import complete, losses_by_seed

LOSS = "validation loss (nats per token)"
ABOVE = "loss above the lowest point (nats per token)"
FEW = 3
"""Comparisons, at most, whose numbers are written beside them."""
WIDEST = 3
"""An interval is drawn whole up to so many times the range of all single differences; a wider one ends in an arrow."""


def draw(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture as a PNG."""
    save(figure(study, points, rows), path)


def figure(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> Figure:
    is_list = study.shape == "differences"
    compared = len(compare(study, points, rows).comparisons) if is_list else 0
    papers = len(papers_differences(study)) if is_list else 0
    height = 1.7 + 0.3 * max(compared, papers, 2) if is_list else 5.0
    made = Figure(figsize=(13 if study.paper else 8, height), dpi=150, layout="constrained")
    panels = made.subplots(1, 2 if study.paper else 1, squeeze=False)[0]
    made.suptitle(study.question, fontsize=HEADING - 1, wrap=True)
    if is_list:
        _list_ours(panels[0], study, points, rows)
    else:
        _draw_ours(panels[0], study, points, rows)
    if study.paper:
        paper = json.loads((Path(__file__).parents[1] / "paper" / study.paper).read_text())
        panels[1].set_title(paper["source"].split(";")[0], fontsize=TEXT)
        if is_list:
            _list_papers(panels[1], paper["baseline"], papers_differences(study))
        else:
            _draw_papers(panels[1], study, paper)
    plain_axes(panels, grid="x" if is_list else "y")
    for axes in panels if not is_list else ():
        axes.set_xlabel(study.x_label)
        axes.legend(frameon=False, fontsize=SMALL)
        if study.shape == "log_line":
            axes.set_xscale("log")
    return made


# --- curves ---


def _draw_ours(axes: Axes, study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> None:
    """Losses over x. Of valleys the loss above each one's lowest point, as in the paper's panel: budgets lie far apart
    and would flatten each other."""
    assert study.shape != "differences"
    groups, losses = by_series(points), losses_by_seed(rows)
    is_valley = study.shape == "valley"
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
        ground = means.min() if is_valley else 0.0
        head = f"{series}: " if series else ""
        name = f"mean ± std over {spread}" if any(deviations) else "one seed"
        label = f"{head}{name}" + (f", lowest {ground:.4f}" if is_valley else "")
        axes.errorbar(list(finished), means - ground, deviations, fmt=marker, color=color, capsize=3, label=label)
        for x, values in finished.items():
            axes.plot([x] * len(values), np.array(values) - ground, ".", color=color, alpha=0.3, markersize=4)
        curve = fits.fit(study.shape, x_P, loss_PS)
        if curve is not None:
            x = (np.geomspace if study.shape == "log_line" else np.linspace)(x_P.min(), x_P.max(), 200)
            axes.plot(x, curve.at(x) - ground, "--", color=color, label=f"{head}fit, seeds paired")
    axes.set_title("this study", fontsize=TITLE)
    axes.set_ylabel(ABOVE if is_valley else LOSS)


def _draw_papers(axes: Axes, study: Study, paper: Mapping[str, Any]) -> None:
    for (name, curve), (color, marker) in zip(paper["curves"].items(), STYLES[1:], strict=False):
        x, loss = np.array(curve).T
        if study.shape == "valley":
            name, loss = f"{name}: lowest {loss.min():.4f} at {x[loss.argmin()]:g}", loss - loss.min()
        axes.plot(x, loss, marker, color=color, linestyle=":", label=name)
    axes.set_ylabel(ABOVE if study.shape == "valley" else LOSS)


# --- lists of differences ---


def _list_ours(axes: Axes, study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> None:
    """A line for every point, in the study's order: each seed's difference, their mean, and its interval."""
    compared = compare(study, points, rows).comparisons
    _draw_list(axes, {each.name: each.by for each in compared}, study.baseline_of(points).name, STYLES[1])
    several = any(len(each.by.values) > 1 for each in compared)
    marks = f"mean, {LEVEL} % interval, seeds" if several else "one seed"
    axes.set_title(f"this study: {marks}", fontsize=TITLE)


def _list_papers(axes: Axes, baseline: str, by: Mapping[str, float]) -> None:
    _draw_list(axes, {name: OverSeeds((mean,)) for name, mean in by.items()}, baseline, STYLES[2])


def _draw_list(axes: Axes, by: Mapping[str, OverSeeds], baseline: str, style: tuple[str, str]) -> None:
    color, marker = style
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(by)), list(by))
    axes.set_ylim(max(len(by), 1) - 0.5, -0.5)
    axes.set_xlabel(f"loss minus that of {baseline} (nats per token; left is better)")
    if not by:
        return
    far = _outlier(by)
    low, high = _limits([each for name, each in by.items() if name != far])
    axes.set_xlim(low, high)
    for y, (name, each) in enumerate(by.items()):
        if name == far:  # it would flatten the others: its number is written at the edge
            right = each.mean > 0
            text = f"{each.mean:+.4f} \u2192" if right else f"\u2190 {each.mean:+.4f}"
            axes.annotate(
                text,
                (high if right else low, y),
                xytext=(-4 if right else 4, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=TEXT,
            )
            continue
        if interval := each.interval():
            ends = max(interval[0], low), min(interval[1], high)
            axes.plot(ends, [y, y], "-", color=color, linewidth=1.5)
            for end, whole, arrow in zip(ends, interval, "<>", strict=True):
                if end != whole:
                    axes.plot([end], [y], arrow, color=color, clip_on=False)
            axes.plot(each.values, [y] * len(each.values), "|", color=STYLES[0][0], alpha=0.6)
        axes.plot([each.mean], [y], marker, color=color)
        if len(by) <= FEW:
            numbers = f"{each.mean:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "")
            axes.annotate(
                numbers, (each.mean, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=TEXT
            )


def _limits(shown: Sequence[OverSeeds]) -> tuple[float, float]:
    """Ends of an axis that shows 0, all single differences, and their intervals up to WIDEST times their range."""
    values = [0.0, *(value for each in shown for value in each.values)]
    low, high = min(values), max(values)
    reach = WIDEST * (high - low)
    intervals = [interval for each in shown if (interval := each.interval())]
    low = min([low, *(max(ends[0], low - reach) for ends in intervals)])
    high = max([high, *(min(ends[1], high + reach) for ends in intervals)])
    margin = 0.12 * (high - low) or 0.01
    return low - margin, high + margin


def _outlier(by: Mapping[str, OverSeeds]) -> str:
    """The point three times as far from the baseline as any other; empty if there is none."""
    ordered = sorted(by, key=lambda name: abs(by[name].mean))
    if len(ordered) < 3:
        return ""
    furthest, next_one = (abs(by[name].mean) for name in (ordered[-1], ordered[-2]))
    return ordered[-1] if furthest > 3 * next_one else ""
