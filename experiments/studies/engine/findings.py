"""What a study's losses say, as values. `sentences` (sentences.py) says them in words.

Legend: P, Q points, S seeds (suffixes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engram_jax.evaluation.over_seeds import OverSeeds
from experiments.studies.engine import fits
from experiments.studies.engine.declared import Point, Study, by_series
from experiments.studies.engine.differences import Differences, compare
from experiments.studies.engine.results import complete


@dataclass(frozen=True)
class Unfinished:
    """Some runs of the study are not there yet."""

    missing: int
    runs: int


@dataclass(frozen=True)
class Difference:
    """One point's loss minus another's, nats per token, seed by seed."""

    ours: str
    theirs: str
    by: OverSeeds

    @property
    def spread(self) -> Literal["unknown", "within", "more"]:
        """Whether the mean is more than the spread over seeds; unknown with one seed."""
        if self.by.interval() is None:
            return "unknown"
        return "more" if self.by.differs_from() else "within"


@dataclass(frozen=True)
class NotFitted:
    """A series without a curve, and what it lacks."""

    series: str
    lacks: Literal["a whole seed", "two seeds", "more points"]


@dataclass(frozen=True)
class Valley:
    """Where a series' fitted parabola is lowest, on the axis of x."""

    series: str
    x_label: str
    lowest: float
    low: float
    high: float
    """The interval of the lowest point."""
    first: float
    last: float
    """The points' smallest and largest x."""
    p_misfit: float
    is_followed: bool

    @property
    def is_found(self) -> bool:
        """Whether the interval lies within the points."""
        return self.first < self.low and self.high < self.last


@dataclass(frozen=True)
class Line:
    """The slope of a series' fitted line, nats per decade of x."""

    series: str
    slope: float
    low: float
    high: float
    p_misfit: float
    is_followed: bool

    @property
    def is_found(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Best:
    """A series' best point against its baseline; None: the baseline is the best."""

    series: str
    baseline: str
    difference: Difference | None
    points: int
    """How many points the best was chosen from."""


@dataclass(frozen=True)
class LowestMoved:
    """How far one series' lowest point lies from another's, on the axis of x."""

    ours: str
    theirs: str
    x_label: str
    by: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    lacks: Literal["", "points that follow their parabolas", "a lowest point"] = ""
    """Why it is not compared."""

    @property
    def is_found(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.lacks and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class LinesApart:
    """How far one series' line lies above another's."""

    difference: Difference | None
    """None: the two have no x in common."""
    ours: str
    theirs: str
    x: float = float("nan")
    """Where the lines are compared."""
    times: float | None = None
    """How many times the x their line needs for our loss; None: the difference is not found, or it does not fall."""
    missed: tuple[str, ...] = ()
    """Series whose points do not follow a line."""


Finding = Unfinished | Differences | NotFitted | Valley | Line | Best | LowestMoved | LinesApart


def findings(study: Study, points: Sequence[Point], seeds: int, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Everything that the report's verdict says."""
    found: list[Finding] = []
    if missing := len(points) * seeds - len(rows):
        found.append(Unfinished(missing, len(points) * seeds))
    if study.shape == "differences":
        return [*found, compare(study, points, rows)]
    groups = by_series(points)
    for series, group in groups.items():
        found += of_series(study, series, group, rows)
    if study.shape == "log_line" and len(groups) == 2:
        found += between_lines(groups, rows)
    if study.shape == "valley":
        found += between_valleys(study, groups, rows)
    return found


def of_series(study: Study, series: str, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """One series' curve, and its best point."""
    assert study.shape != "differences"
    which, loss_PS = complete(points, rows)
    if not which:
        return [NotFitted(series, "a whole seed")]
    x_P = np.array([point.x for point in points])
    curve = fits.fit(study.shape, x_P, loss_PS)
    if curve is None:
        found: list[Finding] = [NotFitted(series, "two seeds" if len(which) < 2 else "more points")]
    elif study.shape == "valley":
        low, high = curve.interval(fits.lowest)
        where, x = fits.lowest(curve.coefficients), (float(min(x_P)), float(max(x_P)))
        found = [Valley(series, study.x_label, where, low, high, *x, curve.p_misfit, curve.is_followed)]
    else:
        low, high = curve.interval(lambda c: float(c[0]))
        found = [Line(series, float(curve.coefficients[0]), low, high, curve.p_misfit, curve.is_followed)]
    names = [point.name for point in points]
    best, baseline = int(loss_PS.mean(axis=1).argmin()), points.index(study.baseline_of(points))
    difference = difference_of(loss_PS[best] - loss_PS[baseline], names[best], names[baseline])
    return [*found, Best(series, names[baseline], difference if best != baseline else None, len(names))]


def difference_of(by_S: np.ndarray, ours: str, theirs: str) -> Difference:
    return Difference(ours, theirs, OverSeeds(tuple(map(float, by_S))))


def between_lines(groups: Mapping[str, Sequence[Point]], rows: Sequence[Mapping[str, Any]]) -> list[LinesApart]:
    """How far apart two series' lines lie, seed by seed, and by how much their x differs at equal loss."""
    (ours, theirs), (a, b) = groups, groups.values()
    which, loss_PS = complete([*a, *b], rows)
    if not which or min(len(a), len(b)) < 2:
        return []
    x_P, x_Q = (np.array([point.x for point in group]) for group in (a, b))
    if max(x_P.min(), x_Q.min()) > min(x_P.max(), x_Q.max()):
        return [LinesApart(None, ours, theirs)]
    ours_PS, theirs_QS = loss_PS[: len(a)], loss_PS[len(a) :]
    middle, by_S = fits.offset(x_P, ours_PS, x_Q, theirs_QS)
    difference = difference_of(by_S, ours, theirs)
    slope = float(np.polyfit(np.log10(x_Q), theirs_QS.mean(axis=1), 1)[0])
    times = 10 ** (difference.by.mean / slope) if slope < 0 and difference.spread == "more" else None
    curves = {ours: fits.fit("log_line", x_P, ours_PS), theirs: fits.fit("log_line", x_Q, theirs_QS)}
    missed = tuple(series for series, curve in curves.items() if curve and not curve.is_followed)
    return [LinesApart(difference, ours, theirs, middle, times, missed)]


def between_valleys(
    study: Study, groups: Mapping[str, Sequence[Point]], rows: Sequence[Mapping[str, Any]]
) -> list[LowestMoved]:
    """Whether the later series' lowest points lie elsewhere than the first one's."""
    curves: dict[str, fits.Fit] = {}
    for series, group in groups.items():
        x_P, (_, loss_PS) = np.array([point.x for point in group]), complete(group, rows)
        if loss_PS.size and (curve := fits.fit("valley", x_P, loss_PS)):
            curves[series] = curve
    first, *others = curves or [""]
    found = []
    for other in others:
        both = curves[other], curves[first]
        if not all(curve.is_followed for curve in both):
            found.append(LowestMoved(other, first, study.x_label, lacks="points that follow their parabolas"))
        elif not np.isfinite([fits.lowest(curve.coefficients) for curve in both]).all():
            found.append(LowestMoved(other, first, study.x_label, lacks="a lowest point"))
        else:
            found.append(LowestMoved(other, first, study.x_label, *fits.moved(*both)))
    return found
