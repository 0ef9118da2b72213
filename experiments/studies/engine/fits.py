"""Curves through a study's losses, and what resampling makes of them.

Legend: P, Q points, S seeds (suffixes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from engram_jax.evaluation.over_seeds import LEVEL

RESAMPLES = 2000
TAIL = (100 - LEVEL) / 2
"""Percent on either side of an interval."""


@dataclass(frozen=True)
class Fit:
    """A polynomial in x (parabola) or log10(x) (line), highest power first, and its resampled coefficients."""

    shape: Literal["valley", "log_line"]
    coefficients: np.ndarray
    resampled: np.ndarray
    """[RESAMPLES, len(coefficients)]"""
    p_misfit: float
    """Chance that points on such a curve miss it as far as these do, by their scatter over seeds (an F test)."""

    @property
    def is_followed(self) -> bool:
        """Whether the points miss the curve by no more than their scatter over seeds explains."""
        return self.p_misfit >= 1 - LEVEL / 100

    def at(self, x: np.ndarray) -> np.ndarray:
        """The curve's losses."""
        return np.polyval(self.coefficients, abscissa(self.shape, x))

    def interval(self, of: Callable[[np.ndarray], float]) -> tuple[float, float]:
        """Middle LEVEL percent of a number computed from the coefficients."""
        low, high = np.percentile([of(c) for c in self.resampled], [TAIL, 100 - TAIL], method="inverted_cdf")
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
    """The points' distance from the curve against the seeds' distance from the points."""
    P, S = centred_PS.shape
    mean_P = centred_PS.mean(axis=1)
    of_seeds = np.square(centred_PS - mean_P[:, None]).sum() / ((P - 1) * (S - 1))
    of_points = S * np.square(mean_P - fitted_P).sum() / freedom
    return float(stats.f.sf(of_points / of_seeds, freedom, (P - 1) * (S - 1))) if of_seeds else float(of_points == 0)


def lowest(coefficients: np.ndarray) -> float:
    """Where a parabola turns; infinite if it opens downwards, since then no x within reach is lowest."""
    a, b, _ = coefficients
    return float(-b / (2 * a)) if a > 0 else float("inf")


def moved(ours: Fit, theirs: Fit) -> tuple[float, float, float]:
    """How far our parabola's lowest point lies from theirs: the distance and its interval, in units of x."""
    # Each was resampled by itself, so any pairing of the draws will do.
    by = [lowest(a) - lowest(b) for a, b in zip(ours.resampled, reversed(theirs.resampled), strict=True)]
    low, high = np.nanpercentile(by, [TAIL, 100 - TAIL], method="inverted_cdf")
    return lowest(ours.coefficients) - lowest(theirs.coefficients), float(low), float(high)


def offset(x_P: np.ndarray, ours_PS: np.ndarray, x_Q: np.ndarray, theirs_QS: np.ndarray) -> tuple[float, np.ndarray]:
    """How far our line lies above theirs, each fitted to the losses of one seed in log10(x).

    Returns:
      The x at which it is read, in the middle of the x that both lines cover, and the offset of every seed [S].
    """
    logs = np.log10(x_P), np.log10(x_Q)
    middle = (max(log.min() for log in logs) + min(log.max() for log in logs)) / 2
    ours, theirs = (np.polyfit(log, loss, 1) for log, loss in zip(logs, (ours_PS, theirs_QS), strict=True))
    return float(10**middle), (ours - theirs).T @ np.array([middle, 1.0])
