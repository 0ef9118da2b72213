"""The picture of `knock_out`: horizontal bars by kind of token, the paper's beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.analysis.groups import OverSeeds
from engram_jax.comparison.picture import STYLES
from experiments.studies.analyses.trained_runs import KIND, OFF, TRAINED, TWIN, save_figure

if TYPE_CHECKING:
    from experiments.studies.analyses.knock_out.measure import Measured


def draw(measured: Measured, paper: Mapping[str, float], path: Path) -> None:
    """Saves the picture as a PNG, atomically. `paper`: by benchmark, percent retained."""
    cost, twin, kept = {}, {}, {}
    for grouping in measured.groupings:
        by = measured.losses(OFF, TRAINED, grouping)
        labels = sorted(by, key=lambda label: -by[label].mean) if grouping.name == KIND else list(by)
        cost |= {label: by[label] for label in labels}
        twin |= measured.losses(TWIN, TRAINED, grouping)
        kept |= measured.retained(grouping)
    figure = Figure(figsize=(16, 1.6 + 0.34 * len(cost)), dpi=150, layout="constrained")
    losses, shares, papers = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    figure.suptitle("The memory switched off in a trained model", fontweight="bold", fontsize=12)

    y = np.arange(len(cost))
    color, _ = STYLES[1]
    losses.barh(y, [by.mean for by in cost.values()], 0.7, color=color, alpha=0.75, label=f"{OFF} - {TRAINED}")
    _errors(losses, y, list(cost.values()))
    color, marker = STYLES[2]
    losses.plot([twin[label].mean for label in cost], y, marker, color=color, label=f"{TWIN} - {TRAINED}")
    losses.axvline(0, color="black", linewidth=0.8)
    losses.set(xlabel="nats per token", yticks=y, yticklabels=list(cost))
    losses.set_title("Loss above the model as trained (line: ± standard error by documents; dots: seeds)", fontsize=9)
    losses.legend(frameon=False, fontsize=8)

    shown = [label for label in cost if label in kept]
    y = np.arange(len(shown))
    shares.barh(y, [kept[label].mean for label in shown], 0.7, color=STYLES[3][0], alpha=0.75)
    _errors(shares, y, [kept[label] for label in shown])
    shares.set(xlabel="%", yticks=y, yticklabels=shown)
    shares.set_title("Next tokens right, in % of those right as trained", fontsize=9)

    retained = sorted(paper.items(), key=lambda entry: entry[1])
    y = np.arange(len(retained))
    papers.barh(y, [share for _, share in retained], 0.7, color="#999999")
    papers.set(xlabel="%", yticks=y, yticklabels=[name for name, _ in retained])
    papers.set_title("The paper's 27B (fig. 6): scores retained", fontsize=9)

    limit = max(105.0, *(value for by in kept.values() for value in by.values))
    for axes in (shares, papers):
        axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, limit)
    for axes in (losses, shares, papers):
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    save_figure(figure, path)


def _errors(axes: Axes, y: np.ndarray, numbers: list[OverSeeds]) -> None:
    """Standard errors as lines, and each seed's value as a dot where there are several."""
    axes.errorbar([n.mean for n in numbers], y, xerr=[n.stderr or 0 for n in numbers], fmt="none", ecolor="black")
    for at, number in zip(y, numbers, strict=True):
        if len(number.values) > 1:
            axes.plot(number.values, [at] * len(number.values), ".", color="black", markersize=4)
