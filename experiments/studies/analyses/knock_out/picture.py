"""The picture of `knock_out`: bars by group of tokens, and the paper's benchmarks beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.pictures import HEADING, SMALL, STYLES, TEXT, plain_axes, save
from experiments.studies.analyses.knock_out.measure import KIND, OFF, TRAINED, TWIN, Measured
from experiments.studies.analyses.knock_out.report import paper_retained
from experiments.studies.analyses.raw_numbers import mark_note


def draw(measured: Measured, folder: Path) -> None:
    """Writes knock_out.png."""
    save(figure(measured, paper_retained()), folder / "knock_out.png")


def figure(measured: Measured, paper: Mapping[str, float]) -> Figure:
    """Args: `paper`: percent retained, by benchmark."""
    cost_by, twin_by = (measured.differences[variant, TRAINED] for variant in (OFF, TWIN))
    shown: list[str] = []
    for grouping, labels in measured.labels.items():
        known = [label for label in labels if label in cost_by]
        shown += sorted(known, key=lambda label: -cost_by[label].mean) if grouping == KIND else known
    made = Figure(figsize=(16, 1.9 + 0.34 * len(shown)), dpi=150, layout="constrained")
    losses, shares, papers = made.subplots(1, 3, width_ratios=(1.25, 1, 1))
    made.suptitle("The memory switched off in a trained model", fontweight="bold", fontsize=HEADING)
    marks = mark_note([cost_by[label] for label in shown])

    y = _bars(losses, shown, [cost_by[label].mean for label in shown], STYLES[1][0], f"{OFF} - {TRAINED}")
    _errors(losses, y, [cost_by[label] for label in shown])
    color, marker = STYLES[2]
    losses.plot([twin_by[label].mean for label in shown], y, marker, color=color, label=f"{TWIN} - {TRAINED}")
    losses.axvline(0, color="black", linewidth=0.8)
    losses.use_sticky_edges = False  # a mark at 0 is drawn whole
    losses.set_xlabel("nats per token", fontsize=TEXT)
    losses.set_title(f"Loss above the model as trained\n{marks}", fontsize=TEXT, loc="left")
    losses.legend(frameon=False, fontsize=SMALL)

    kept = {label: measured.retained[label] for label in shown if label in measured.retained}
    y = _bars(shares, list(kept), [by.mean for by in kept.values()], STYLES[3][0])
    _errors(shares, y, list(kept.values()))
    shares.set_title(
        f"Next tokens right, in % of those right as trained\n{mark_note(list(kept.values()))}",
        fontsize=TEXT,
        loc="left",
    )

    retained = dict(sorted(paper.items(), key=lambda entry: entry[1]))
    _bars(papers, list(retained), list(retained.values()), "#999999")
    papers.set_title("The paper's 27B model (figure 6):\nbenchmark scores retained, in %", fontsize=TEXT, loc="left")

    limit = max(105.0, *(value for by in kept.values() for value in by.values))
    for axes in (shares, papers):
        axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, limit)
        axes.set_xlabel("%", fontsize=TEXT)
    for axes in (losses, shares, papers):
        axes.invert_yaxis()
        axes.tick_params(labelsize=SMALL)
    plain_axes((losses, shares, papers), grid="x")
    return made


def _bars(axes: Axes, labels: Sequence[str], means: Sequence[float], color: str, name: str = "") -> np.ndarray:
    y = np.arange(len(labels))
    axes.barh(y, means, 0.7, color=color, alpha=0.75, label=name or None)
    axes.set_yticks(y, labels)
    return y


def _errors(axes: Axes, y: np.ndarray, numbers: Sequence[OverSeeds]) -> None:
    """Standard errors as lines, and each seed's value as a dot where there are several."""
    known = [(at, by) for at, by in zip(y, numbers, strict=True) if by.stderr is not None]
    if known:
        means, errors = [by.mean for _, by in known], [by.stderr or 0 for _, by in known]
        axes.errorbar(means, [at for at, _ in known], xerr=errors, fmt="none", ecolor="black")
    for at, by in zip(y, numbers, strict=True):
        if len(by.values) > 1:
            axes.plot(by.values, [at] * len(by.values), ".", color="black", markersize=4)
