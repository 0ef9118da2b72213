"""Points without an order, each against the baseline: which differences are more than the spread over seeds.

Of twenty comparisons, chance puts one beyond a 95 % interval. Probabilities are therefore Holm's: each is the chance of
so clear a difference anywhere in the study, if there were no difference at all. Every point has two of them.

The first takes the point's own scatter over seeds. It assumes nothing more, and with three seeds it can hardly find
anything among twenty. The second takes the scatter of all points together (Student's test in a randomised block design
with seeds as blocks, which has many more degrees of freedom). It holds if all points scatter alike.

Legend: P points, S seeds (suffixes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from engram_jax.evaluation.over_seeds import LEVEL, OverSeeds
from engram_jax.markdown import table
from experiments.studies.engine.declared import Point, Study
from experiments.studies.engine.results import complete, losses_by_seed

DOUBT = 1 - LEVEL / 100
"""A difference that chance makes with less probability than this is found."""


@dataclass(frozen=True)
class Comparison:
    """A point against the baseline."""

    name: str
    by: OverSeeds
    """Its loss minus the baseline's, for every seed that both have; nats per token."""
    p_own: float
    """Probability by its own scatter, after Holm's correction; NaN with one seed."""
    p_pooled: float
    """Probability by the scatter of all points, after Holm's correction; NaN below two seeds with all points."""
    paper: float | None = None
    """The paper's difference, where it has one."""

    @property
    def spread(self) -> Literal["unknown", "within", "more", "more if all points scatter alike"]:
        """Whether the difference is more than the spread among all comparisons; unknown with one seed."""
        if len(self.by.values) < 2:
            return "unknown"
        if self.p_own < DOUBT:
            return "more"
        return "more if all points scatter alike" if self.p_pooled < DOUBT else "within"


@dataclass(frozen=True)
class Differences:
    """All points against the baseline."""

    baseline: str
    comparisons: tuple[Comparison, ...]
    """Of the points that share a finished seed with the baseline."""

    def found(self, spread: str) -> dict[str, list[str]]:
        """Names of the points with this `spread` that are "better" and that are "worse" than the baseline."""
        of_kind = [each for each in self.comparisons if each.spread == spread]
        return {
            "better": [each.name for each in of_kind if each.by.mean < 0],
            "worse": [each.name for each in of_kind if each.by.mean > 0],
        }


def compare(study: Study, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> Differences:
    """Every other point that shares a finished seed with the baseline."""
    losses, baseline = losses_by_seed(rows), study.baseline_of(points).name
    theirs, paper = losses.get(baseline, {}), papers_differences(study)
    by = {}
    for point in points:
        ours = losses.get(point.name, {})
        if shared := [seed for seed in ours if seed in theirs and point.name != baseline]:
            by[point.name] = np.array([ours[seed] - theirs[seed] for seed in sorted(shared)])
    own = holm({name: own_p(by_S) for name, by_S in by.items()})
    _, loss_PS = complete([point for point in points if point.name in by or point.name == baseline], rows)
    pooled = holm({name: pooled_p(loss_PS, by_S) for name, by_S in by.items()})
    return Differences(
        baseline,
        tuple(
            Comparison(name, OverSeeds(tuple(map(float, by_S))), own[name], pooled[name], paper.get(name))
            for name, by_S in by.items()
        ),
    )


def own_p(by_S: np.ndarray) -> float:
    """Student's test of one difference, two-sided."""
    if len(by_S) < 2:
        return np.nan
    error = by_S.std(ddof=1) / np.sqrt(len(by_S))
    return _two_sided(by_S.mean(), error, len(by_S) - 1)


def pooled_p(loss_PS: np.ndarray, by_S: np.ndarray) -> float:
    """The same with the scatter of all points about the means of points and seeds; nan without two whole seeds."""
    P, S = loss_PS.shape
    if S < 2 or P < 3:
        return np.nan
    residuals = loss_PS - loss_PS.mean(axis=1, keepdims=True) - loss_PS.mean(axis=0) + loss_PS.mean()
    freedom = (P - 1) * (S - 1)
    variance = float(np.square(residuals).sum()) / freedom
    return _two_sided(by_S.mean(), np.sqrt(2 * variance / len(by_S)), freedom)


def _two_sided(mean: float, error: float, freedom: int) -> float:
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: the smallest of n times n, the next times n - 1, never less than one before it."""
    known = sorted((name for name in p if not np.isnan(p[name])), key=lambda name: p[name])
    corrected, at_least = dict(p), 0.0
    for rank, name in enumerate(known):
        at_least = max(at_least, min(1.0, p[name] * (len(known) - rank)))
        corrected[name] = at_least
    return corrected


def differences_table(found: Differences) -> list[str]:
    """One row a point."""
    header = ["point", "seeds", "difference", f"{LEVEL} % interval", "p, own scatter", "p, pooled scatter", "the paper"]
    body = []
    for each in found.comparisons:
        interval = each.by.interval()
        body.append(
            [
                each.name,
                str(len(each.by.values)),
                f"{each.by.mean:+.4f}",
                "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
                *("-" if np.isnan(p) else f"{p:.2g}" for p in (each.p_own, each.p_pooled)),
                "-" if each.paper is None else f"{each.paper:+.4f}",
            ]
        )
    return [
        *table(header, body),
        "",
        "Differences are paired by seed, in nats per token; below 0 is better. Intervals are Student's, of each point "
        "by itself. Probabilities are corrected for the number of comparisons (Holm).",
    ]


def papers_differences(study: Study) -> dict[str, float]:
    """The paper's losses minus its baseline's, by point."""
    if not study.paper:
        return {}
    paper = json.loads((Path(__file__).parents[1] / "paper" / study.paper).read_text())
    baseline = paper["losses"][paper["baseline"]]
    return {name: loss - baseline for name, loss in paper["losses"].items() if name != paper["baseline"]}
