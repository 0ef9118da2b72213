"""Points without an order, each against the baseline: what of the differences is more than the spread over seeds.

Of twenty comparisons one is beyond a 95 % interval by chance, so probabilities are Holm's: each is the chance of so
clear a difference anywhere in the study, were there none at all. Two of them for every point. One takes the point's own
scatter over seeds, the only one that assumes nothing; with three seeds it can hardly find anything among twenty. The
other takes the scatter of all points together (Student's test in a randomised block design, a seed being a block:
points times seeds less means make many more degrees of freedom), and holds if all points scatter alike.

P points, S seeds (suffixes)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.studies.engine.declared import Point, Study
from experiments.studies.engine.fits import LEVEL, interval, measured
from experiments.studies.engine.results import complete, losses_by_seed

DOUBT = 1 - LEVEL / 100
"""What is less probable than this by chance is called found."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A point against the baseline."""

    name: str
    by_S: np.ndarray
    """Its loss less the baseline's, for every seed that both have."""
    p_own: float
    """By its own scatter, after Holm; nan: one seed."""
    p_pooled: float
    """By that of all points, after Holm; nan: fewer than two seeds have all points."""

    @property
    def mean(self) -> float:
        return float(self.by_S.mean())


def compare(study: Study, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Every other point that shares a finished seed with the baseline."""
    losses, baseline = losses_by_seed(rows), study.baseline_of(points).name
    theirs = losses.get(baseline, {})
    by = {}
    for point in points:
        ours = losses.get(point.name, {})
        if shared := [seed for seed in ours if seed in theirs and point.name != baseline]:
            by[point.name] = np.array([ours[seed] - theirs[seed] for seed in sorted(shared)])
    own = holm({name: own_p(by_S) for name, by_S in by.items()})
    _, loss_PS = complete([point for point in points if point.name in by or point.name == baseline], rows)
    pooled = holm({name: pooled_p(loss_PS, by_S) for name, by_S in by.items()})
    return [Comparison(name, by_S, own[name], pooled[name]) for name, by_S in by.items()]


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


def verdict(comparisons: Sequence[Comparison], baseline: str, paper: Mapping[str, float]) -> list[str]:
    """A summary, then a sentence for every point."""
    if not comparisons:
        return [f"Nothing is compared: no seed has both {baseline} and another point finished."]
    sentences = [_summary(comparisons, baseline)]
    for each in comparisons:
        by = f" (The paper: {paper[each.name]:+.4f}.)" if each.name in paper else ""
        sentences.append(f"{measured(each.by_S, each.name, baseline)}: {_judged(each, len(comparisons))}.{by}")
    return sentences


def _judged(each: Comparison, number: int) -> str:
    among = f"among {number} comparisons" if number > 1 else "over seeds"
    own, pooled = f"p = {each.p_own:.2g}", f"p = {each.p_pooled:.2g}"
    if len(each.by_S) < 2:
        return "with one seed its spread is unknown"
    if each.p_own < DOUBT:
        return f"more than the spread {among} ({own})"
    if each.p_pooled < DOUBT:
        return f"more than the spread {among} if all points scatter alike ({pooled}; by its own scatter {own})"
    together = "" if np.isnan(each.p_pooled) else f"; by the scatter of all {pooled}"
    return f"nothing found beyond the spread {among} ({own}{together})"


def _summary(comparisons: Sequence[Comparison], baseline: str) -> str:
    by_own = [each for each in comparisons if each.p_own < DOUBT]
    by_all = [each for each in comparisons if each.p_pooled < DOUBT and each not in by_own]
    sentence = f"Of {len(comparisons)} compared with {baseline}, more than the spread: {_sides(by_own)}."
    return sentence + (f" And if all points scatter alike: {_sides(by_all)}." if by_all else "")


def _sides(found: Sequence[Comparison]) -> str:
    sides = {
        "better": [each.name for each in found if each.mean < 0],
        "worse": [each.name for each in found if each.mean > 0],
    }
    return "; ".join(f"{', '.join(names)} {side}" for side, names in sides.items() if names) or "none"


def differences_table(comparisons: Sequence[Comparison], paper: Mapping[str, float]) -> list[str]:
    """One row a point."""
    lines = [
        f"| point | seeds | difference | {LEVEL} % interval | p, own scatter | p, pooled scatter | the paper |",
        "|---" * 7 + "|",
    ]
    for each in comparisons:
        low, high = interval(each.by_S)
        around = f"{low:+.4f} to {high:+.4f}" if len(each.by_S) > 1 else "-"
        theirs = f"{paper[each.name]:+.4f}" if each.name in paper else "-"
        cells = [each.name, str(len(each.by_S)), f"{each.mean:+.4f}", around, _p(each.p_own), _p(each.p_pooled), theirs]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Differences are paired by seed, in nats per token; below 0 is better. Intervals are Student's, for each point "
        "alone; probabilities are corrected for the number of comparisons (Holm).",
    ]


def _p(p: float) -> str:
    return "-" if np.isnan(p) else f"{p:.2g}"


def papers_differences(study: Study) -> dict[str, float]:
    """The paper's losses less its baseline's, by point."""
    if not study.paper:
        return {}
    paper = json.loads((Path(__file__).parents[1] / "paper" / study.paper).read_text())
    baseline = paper["losses"][paper["baseline"]]
    return {name: loss - baseline for name, loss in paper["losses"].items() if name != paper["baseline"]}
