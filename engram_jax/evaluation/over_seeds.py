"""A number measured in runs of several seeds, and the one rule for calling it more than the spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 95
"""Confidence level of every interval, in percent."""


def student_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of `values`; from -inf to inf for a single value.

    Args:
      level: percent.
    """
    from scipy.special import stdtrit  # here, because it takes a while

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return -math.inf, math.inf
    quantile = float(stdtrit(len(values) - 1, 0.5 + level / 200))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


@dataclass(frozen=True)
class OverSeeds:
    """A number measured once for each seed; a difference is paired: the same seed, the same batches."""

    values: tuple[float, ...]
    """One per seed."""
    stderr: float | None = None
    """Standard error of the mean over seeds by the choice of documents; None if fewer than two documents are known."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def interval(self) -> tuple[float, float] | None:
        """Student's LEVEL % interval of the mean over seeds; None for one seed."""
        return student_interval(self.values) if len(self.values) > 1 else None

    def differs_from(self, number: float = 0.0) -> bool:
        """Whether the mean differs from `number` by more than the spread: the only place that decides it.

        The interval over seeds must exclude `number`, and so must 1.96 standard errors by documents. What is unknown
        (the spread of one seed, the error of one document) is not asked; if both are unknown, the answer is no.
        """
        if math.isnan(self.mean) or (self.stderr is None and self.std is None):
            return False
        by_documents = self.stderr is None or abs(self.mean - number) > 1.96 * self.stderr
        low, high = self.interval() or (math.inf, math.inf)
        return by_documents and not low <= number <= high

    def text(self, form: str = "+.3f") -> str:
        """`+0.479 ± 0.096 (seeds 0.031)`: standard error by documents, standard deviation over seeds."""
        if math.isnan(self.mean):
            return "-"
        plain = form.lstrip("+")
        error = "" if self.stderr is None else f" ± {self.stderr:{plain}}"
        return f"{self.mean:{form}}{error}" + ("" if self.std is None else f" (seeds {self.std:{plain}})")
