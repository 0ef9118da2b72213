"""What a study's losses say: a curve through them, its interval over seeds, and the sentence that follows.

P points, S seeds (suffixes)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 95
"""Of the intervals, in percent."""


@dataclass(frozen=True)
class Fit:
    """A polynomial in x (parabola) or log10(x) (line), highest power first, with what resampling made of it."""

    shape: Literal["valley", "log_line"]
    coefficients: np.ndarray
    resampled: np.ndarray
    """[RESAMPLES, len(coefficients)]"""
    p_misfit: float
    """Chance that points on such a curve miss it as far as these do, by their scatter over seeds (an F test)."""

    @property
    def is_followed(self) -> bool:
        return self.p_misfit >= 1 - LEVEL / 100

    def at(self, x: np.ndarray) -> np.ndarray:
        return np.polyval(self.coefficients, abscissa(self.shape, x))

    def interval(self, of: Callable[[np.ndarray], float]) -> tuple[float, float]:
        """Middle LEVEL percent of a number computed from the coefficients."""
        tail = (100 - LEVEL) / 2
        low, high = np.percentile([of(c) for c in self.resampled], [tail, 100 - tail], method="inverted_cdf")
        return float(low), float(high)


def abscissa(shape: Literal["valley", "log_line"], x: np.ndarray) -> np.ndarray:
    return np.log10(x) if shape == "log_line" else x


def fit(shape: Literal["valley", "log_line"], x_P: np.ndarray, loss_PS: np.ndarray) -> Fit | None:
    """Least squares through the losses, seeds paired; None with fewer than two seeds or no point to spare.

    A seed makes its runs better or worse together (the same batches in the same order), so its mean is taken out
    first. The residuals are then drawn anew: they hold the seeds' scatter and also what the curve does not follow. They
    are widened by the degrees of freedom that means and curve took, and by Student's t over the normal's: sums of many
    draws are nearly normal, and without it intervals of 95 % hold 86 to 93 % at these sizes.
    """
    degree = 2 if shape == "valley" else 1
    P, S = loss_PS.shape
    if S < 2 or degree + 2 > P:
        return None
    centred_PS = loss_PS - loss_PS.mean(axis=0) + loss_PS.mean()
    x = np.repeat(abscissa(shape, x_P), S)
    y = centred_PS.reshape(-1)
    coefficients = np.polyfit(x, y, degree)
    fitted = np.polyval(coefficients, x)
    freedom, tail = P * S - S - degree, 0.5 + LEVEL / 200
    residuals = (y - fitted) * np.sqrt(P * S / freedom) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    # polyfit takes many right-hand sides at once, one a column.
    draws = np.random.default_rng(0).choice(residuals, (P * S, RESAMPLES))
    resampled = np.polyfit(x, fitted[:, None] + draws, degree).T
    return Fit(shape, coefficients, resampled, _misfit(centred_PS, fitted.reshape(P, S)[:, 0], P - degree - 1))


def _misfit(centred_PS: np.ndarray, fitted_P: np.ndarray, freedom: int) -> float:
    """The points' distance from the curve against the seeds' from the points."""
    P, S = centred_PS.shape
    mean_P = centred_PS.mean(axis=1)
    of_seeds = np.square(centred_PS - mean_P[:, None]).sum() / ((P - 1) * (S - 1))
    of_points = S * np.square(mean_P - fitted_P).sum() / freedom
    return float(stats.f.sf(of_points / of_seeds, freedom, (P - 1) * (S - 1))) if of_seeds else float(of_points == 0)


def lowest(coefficients: np.ndarray) -> float:
    """Where a parabola turns; infinite if it opens downwards, since then no x within reach is lowest."""
    a, b, _ = coefficients
    return float(-b / (2 * a)) if a > 0 else float("inf")


def moved(ours: Fit, theirs: Fit, x_label: str) -> str:
    """How far our parabola's lowest point lies from theirs; nothing if either has none, or is missed by its points."""
    if not (ours.is_followed and theirs.is_followed):
        return "not compared, since the points do not follow their parabolas."
    if not np.isfinite([lowest(ours.coefficients), lowest(theirs.coefficients)]).all():
        return "not compared, since one of the parabolas has none."
    # Drawn anew by themselves, so that any pairing of the draws will do.
    by = [lowest(a) - lowest(b) for a, b in zip(ours.resampled, reversed(theirs.resampled), strict=True)]
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(by, [tail, 100 - tail], method="inverted_cdf")
    mean = lowest(ours.coefficients) - lowest(theirs.coefficients)
    numbers = f"{mean:+.1f} ({LEVEL} % interval {low:+.1f} to {high:+.1f}) on the axis of {x_label!r}"
    return f"{numbers}: {'nothing found beyond the spread' if low <= 0 <= high else 'more than the spread'}."


def sentence(curve: Fit, x_P: np.ndarray, x_label: str) -> str:
    """The verdict on the curve, from its numbers alone."""
    said = _on_valley(curve, x_P, x_label) if curve.shape == "valley" else _on_line(curve)
    if curve.is_followed:
        return said
    return (
        f"{said} But the points do not follow the curve: they miss it by more than the spread over seeds "
        f"(p = {curve.p_misfit:.2g}), so this says where the curve lies, not where the losses do."
    )


def _on_valley(curve: Fit, x_P: np.ndarray, x_label: str) -> str:
    where, (low, high) = lowest(curve.coefficients), curve.interval(lowest)
    if min(x_P) < low and high < max(x_P):
        numbers = f"{where:.1f} ({LEVEL} % interval {low:.1f} to {high:.1f})"
        return f"The fitted parabola is lowest at {numbers}, on the axis of {x_label!r}."
    return (
        "Nothing found beyond the spread about where the loss is lowest: "
        f"the {LEVEL} % interval of the fitted parabola's lowest point, {low:.1f} to {high:.1f}, reaches past the "
        f"points, {min(x_P):g} to {max(x_P):g}."
    )


def _on_line(curve: Fit) -> str:
    slope, (low, high) = float(curve.coefficients[0]), curve.interval(lambda c: float(c[0]))
    numbers = f"{slope:+.4f} nats per decade ({LEVEL} % interval {low:+.4f} to {high:+.4f})"
    if low <= 0 <= high:
        return f"Nothing found beyond the spread: the fitted line's slope is {numbers}."
    return f"The loss {'falls' if slope < 0 else 'rises'} along the fitted line by {numbers}."


def difference(ours_S: np.ndarray, theirs_S: np.ndarray, ours: str, theirs: str) -> str:
    """One point against another, by Student's interval of the mean difference over the seeds that both have.

    Seed by seed, since equal seeds see equal batches: what a seed does to both is no reason to doubt the difference.
    """
    by_S = ours_S - theirs_S
    head = measured(by_S, ours, theirs)
    if len(by_S) < 2:
        return f"{head}. With one seed the spread over seeds is unknown."
    low, high = interval(by_S)
    if low <= 0 <= high:
        return f"{head}: nothing found beyond the spread over seeds."
    return f"{head}: more than the spread over seeds."


def measured(by_S: np.ndarray, ours: str, theirs: str) -> str:
    """The difference and its interval, without a verdict."""
    listed = ", ".join(f"{by:+.4f}" for by in by_S)
    head = f"{ours} against {theirs}: {by_S.mean():+.4f} nats per token (seed by seed {listed}"
    if len(by_S) < 2:
        return f"{head})"
    low, high = interval(by_S)
    return f"{head}; {LEVEL} % interval {low:+.4f} to {high:+.4f})"


def interval(by_S: np.ndarray) -> tuple[float, float]:
    """Student's, of the mean; infinite with one seed."""
    if len(by_S) < 2:
        return -np.inf, np.inf
    half = stats.t.ppf(0.5 + LEVEL / 200, len(by_S) - 1) * by_S.std(ddof=1) / np.sqrt(len(by_S))
    return float(by_S.mean() - half), float(by_S.mean() + half)


def offset(x_P: np.ndarray, ours_PS: np.ndarray, x_Q: np.ndarray, theirs_QS: np.ndarray) -> tuple[float, np.ndarray]:
    """How far our line lies above theirs, each fitted to the losses of one seed in log10(x).

    Returns:
      The x it is read at, in the middle of those that both lines cover, and the offset of every seed [S].
    """
    logs = np.log10(x_P), np.log10(x_Q)
    middle = (max(log.min() for log in logs) + min(log.max() for log in logs)) / 2
    ours, theirs = (np.polyfit(log, loss, 1) for log, loss in zip(logs, (ours_PS, theirs_QS), strict=True))
    return float(10**middle), (ours - theirs).T @ np.array([middle, 1.0])
