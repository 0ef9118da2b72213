"""Means with standard errors that are clustered by document.

Tokens of one document, or questions of one passage, are not independent. So the standard error comes from the documents
(the sandwich estimate for a ratio of sums, with clusters as its terms), not from the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    value: float
    stderr: float | None = None
    """Standard error; None with fewer than two clusters."""
    count: int = 0
    """Number of observations: tokens, questions."""
    clusters: int = 0
    """Number of independent groups of observations: documents."""
    unit: str = ""
    higher_is_better: bool = False

    def scaled(self, factor: float, unit: str) -> Metric:
        """The number in another unit: `factor` times as large."""
        stderr = None if self.stderr is None else self.stderr * abs(factor)
        return Metric(self.value * factor, stderr, self.count, self.clusters, unit, self.higher_is_better)

    def exp(self, unit: str = "") -> Metric:
        """exp of the number, with the standard error to first order: a perplexity from a loss."""
        value = math.exp(min(self.value, 700.0))
        stderr = None if self.stderr is None else self.stderr * value
        return Metric(value, stderr, self.count, self.clusters, unit, self.higher_is_better)


def ratio(sums: Sequence[float] | np.ndarray, sizes: Sequence[float] | np.ndarray, **about) -> Metric:
    """sum(sums) / sum(sizes) over clusters: the mean loss, from the summed loss and the number of tokens by document.

    stderr = sqrt(C / (C - 1) * sum_c (sums_c - value * sizes_c)^2) / sum(sizes), for C clusters of positive size
    (Cochran 1977, 6.9: linearised ratio; also what `vce(cluster)` of a mean reports).

    Args:
      about: `unit`, `higher_is_better`, `count` (default: the summed sizes).
    """
    sums, sizes = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    total, clusters = float(sizes.sum()), len(sizes)
    about = {"count": round(total), **about}
    if not clusters:
        return Metric(math.nan, None, clusters=0, **about)
    value = float(sums.sum() / total)
    stderr = None
    if clusters > 1:
        stderr = math.sqrt(clusters / (clusters - 1) * float(np.sum((sums - value * sizes) ** 2))) / total
    return Metric(value, stderr, clusters=clusters, **about)


def mean(values: Sequence[float] | np.ndarray, **about) -> Metric:
    """The mean of independent observations and its standard error (sample standard deviation / sqrt n)."""
    return ratio(values, np.ones(len(values)), **about)


def difference(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, sizes: Sequence[float] | np.ndarray
) -> Metric:
    """The mean of ours minus theirs, paired by cluster: what makes a document hard for both drops out.

    Args:
      ours, theirs: sums by cluster.
      sizes: observations by cluster.
    """
    return ratio(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64), sizes)
