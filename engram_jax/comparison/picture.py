"""The picture of a comparison: training curves with validation losses, and losses by n-gram frequency."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from engram_jax.comparison.run_groups import LOSS, Group, Run, baseline_of, has_equal_buckets
from engram_jax.data.ngram_frequency import bucket_names
from engram_jax.pictures import HEADING, SMALL, STYLES, TITLE, Style, plain_axes, save

STEEP_START = 0.2
"""First part of a run that the axis need not show: its steep fall would flatten all that follows."""
LONGEST = 40
"""Characters of a group's label in legends and titles."""


def draw(groups: Sequence[Group], title: str, path: Path) -> None:
    """Writes the picture as a PNG. Raises `OSError`."""
    save(comparison_figure(groups, title), path)


def comparison_figure(groups: Sequence[Group], title: str) -> Figure:
    baseline = baseline_of(groups)
    finished = [group for group in groups if (group.runs[0].result or {}).get("buckets")]
    compared = [g for g in finished if baseline and has_equal_buckets(g, baseline)]
    styles = {group.label: STYLES[i % len(STYLES)] for i, group in enumerate(groups)}

    figure = Figure(figsize=(13 if finished else 8, 6), dpi=150, layout="constrained")
    panels = figure.subplot_mosaic("CB;CD" if compared else "CB" if finished else "C")
    figure.suptitle(title, fontweight="bold", fontsize=HEADING, wrap=True)
    _draw_curves(panels["C"], groups, styles)
    if finished:
        _draw_buckets(panels["B"], finished, styles)
    if baseline and compared:
        _draw_differences(panels["D"], compared, baseline, styles)
    plain_axes(panels.values())
    return figure


def shortened(label: str) -> str:
    """The label with at most LONGEST characters: its beginning and its end, where a path differs from another."""
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[:half]}\u2026{label[-half + 1 :]}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred mean over a fifteenth of the points, over fewer at the ends."""
    half = len(values) // 30
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def _series(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens seen, and the metric there."""
    steps_and_values = np.array(run.series(metric), float).reshape(-1, 2)
    return steps_and_values[:, 0] * run.tokens_per_step, steps_and_values[:, 1]


def _draw_curves(axes: Axes, groups: Sequence[Group], styles: dict[str, Style]) -> None:
    shown = []
    for group in groups:
        color, marker = styles[group.label]
        for run in group.runs:
            tokens, losses = _series(run, "loss")
            axes.plot(tokens, losses, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(tokens, smoothed(losses), color=color, linewidth=1.4)
            at, validation = _series(run, LOSS)
            axes.plot(at, validation, marker, color=color, markersize=7, markeredgecolor="white")
            after_start = tokens >= STEEP_START * tokens.max(initial=0)  # no line yet: a run before its first step
            shown += [*smoothed(losses)[after_start], *losses[after_start], *validation]
        finals = group.values(lambda run: run.last(LOSS))
        final = f": {statistics.mean(finals):.3f}" if finals else ""
        final += f" ± {statistics.stdev(finals):.3f} ({len(finals)} seeds)" if len(finals) > 1 else ""
        axes.plot([], [], f"{marker}-", color=color, markeredgecolor="white", label=shortened(group.label) + final)
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel="training tokens", ylabel="nats per token")
    axes.set_title("Training loss (lines) and validation loss (markers; the last in the legend)", fontsize=TITLE)
    axes.legend(frameon=False)


def _draw_buckets(axes: Axes, groups: Sequence[Group], styles: dict[str, Style]) -> None:
    for i, group in enumerate(groups):
        color, marker = styles[group.label]
        for x, name in enumerate(bucket_names()):
            losses = group.values(lambda run, name=name: run.bucket(name, "loss"))
            axes.plot(
                [x + 0.4 * _offset(i, len(groups))] * len(losses), losses, marker, color=color, markeredgecolor="white"
            )
    _label_buckets(axes, groups[0])
    axes.set_ylabel("nats per token")
    axes.set_title("Validation loss by how often the last n-gram occurs in the training text", fontsize=TITLE)


def _draw_differences(axes: Axes, groups: Sequence[Group], baseline: Group, styles: dict[str, Style]) -> None:
    for i, group in enumerate(groups):
        color, _ = styles[group.label]
        for x, name in enumerate(bucket_names()):
            ours, theirs = (g.values(lambda run, name=name: run.bucket(name, "loss")) for g in (group, baseline))
            if not ours:
                continue
            at, difference = x + _offset(i, len(groups)), statistics.mean(ours) - statistics.mean(theirs)
            axes.bar(at, difference, 0.7 / len(groups), color=color, alpha=0.75)
            pairs = group.pairs(baseline)
            for run, other in pairs if len(pairs) > 1 else ():
                pair = (run.bucket(name, "loss") or 0) - (other.bucket(name, "loss") or 0)
                axes.plot(at, pair, ".", color="black", markersize=4)
            axes.annotate(
                f"{difference:+.3f}",
                (at, 0),  # on the free side of the axis, where neither bar nor dots are
                textcoords="offset points",
                xytext=(0, -4 if difference > 0 else 4),
                ha="center",
                va="top" if difference > 0 else "bottom",
                fontsize=SMALL,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.use_sticky_edges = False  # room for the numbers on the axis
    axes.margins(y=0.2)
    _label_buckets(axes, baseline)
    axes.set(xlabel="occurrences in training (share of the validation tokens)", ylabel="nats per token")
    several = any(len(group.pairs(baseline)) > 1 for group in groups)
    dots = " (dots: seed by seed)" if several else ""
    axes.set_title(f"Difference from {shortened(baseline.label)}: below 0 is better{dots}", fontsize=TITLE)


def _offset(index: int, count: int) -> float:
    """Where the group's mark stands beside the middle of its bucket."""
    return 0.7 * ((index + 0.5) / count - 0.5)


def _label_buckets(axes: Axes, group: Group) -> None:
    shares = [group.runs[0].bucket(name, "share") or 0 for name in bucket_names()]
    axes.set_xlim(-0.5, len(shares) - 0.5)
    axes.set_xticks(
        range(len(shares)), [f"{name}\n({share:.0%})" for name, share in zip(bucket_names(), shares, strict=True)]
    )
