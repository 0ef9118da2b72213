"""Means of tokens' numbers by groups of tokens, with standard errors that are clustered by document.

Legend: N tokens, C clusters (documents), G groups, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.evaluation.statistics import ratio

PARTS = 25
"""Parts of the documents, for the standard error of a rank correlation."""


@dataclass(frozen=True)
class Grouping:
    """One division of tokens into groups."""

    name: str
    labels: tuple[str, ...]
    group_N: np.ndarray
    """int [N]: index into labels; negative: the token is in no group."""

    def of(self, label: str) -> np.ndarray:
        """bool [N], whether a token is in the group."""
        return self.group_N == self.labels.index(label)


def tabulate(
    value_N: np.ndarray, group_N: np.ndarray, cluster_N: np.ndarray, num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values, and numbers of tokens: float64 [C, G] both. Tokens with NaN are left out."""
    clusters, cluster_N = np.unique(cluster_N, return_inverse=True)
    counted_N = (group_N >= 0) & ~np.isnan(value_N)
    cell_N = (cluster_N * num_groups + group_N)[counted_N]
    shape = (len(clusters), num_groups)
    sums = np.bincount(cell_N, value_N[counted_N].astype(np.float64), shape[0] * shape[1]).reshape(shape)
    return sums, np.bincount(cell_N, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def means(values_SN: Sequence[np.ndarray], grouping: Grouping, cluster_N: np.ndarray) -> dict[str, OverSeeds]:
    """By group, the mean over its tokens of each seed's values. Groups without tokens are left out."""
    tables = [tabulate(value_N, grouping.group_N, cluster_N, len(grouping.labels)) for value_N in values_SN]
    return _ratios(tables, grouping.labels)


def quotients(
    over_SN: Sequence[np.ndarray], under_SN: Sequence[np.ndarray], grouping: Grouping, cluster_N: np.ndarray
) -> dict[str, OverSeeds]:
    """By group, the sum of one number over its tokens divided by the sum of another; groups with a sum of 0 are
    left out.
    """
    count = len(grouping.labels)
    over, under = (
        [tabulate(value_N, grouping.group_N, cluster_N, count)[0] for value_N in values]
        for values in (over_SN, under_SN)
    )
    return _ratios(list(zip(over, under, strict=True)), grouping.labels)


def _ratios(tables: Sequence[tuple[np.ndarray, np.ndarray]], labels: Sequence[str]) -> dict[str, OverSeeds]:
    sums, sizes = np.mean([sums for sums, _ in tables], axis=0), np.mean([sizes for _, sizes in tables], axis=0)
    found = {}
    for g, label in enumerate(labels):
        if all(size[:, g].sum() > 0 for _, size in tables):
            values = tuple(float(one[:, g].sum() / size[:, g].sum()) for one, size in tables)
            found[label] = OverSeeds(values, ratio(sums[:, g], sizes[:, g]).stderr)
    return found


def joined(by_seed: Sequence[dict[str, OverSeeds]]) -> dict[str, OverSeeds]:
    """Results of single seeds, each on its own text, as one result. Groups that a seed lacks are left out.

    The texts may share documents, so the squares of the standard errors are averaged, and the error does not shrink.
    """
    found = {}
    for label in by_seed[0]:
        if all(label in one for one in by_seed):
            errors = [one[label].stderr for one in by_seed]
            known = [error for error in errors if error is not None]
            stderr = math.sqrt(np.mean(np.square(known))) if len(known) == len(errors) else None
            found[label] = OverSeeds(tuple(value for one in by_seed for value in one[label].values), stderr)
    return found


def minus(ours: OverSeeds, theirs: OverSeeds) -> OverSeeds:
    """Ours minus theirs, seed by seed, on different texts. Squares of errors add: too much for shared documents."""
    values = tuple(a - b for a, b in zip(ours.values, theirs.values, strict=True))
    known = ours.stderr is not None and theirs.stderr is not None
    return OverSeeds(values, math.hypot(ours.stderr, theirs.stderr) if known else None)  # type: ignore[arg-type]


def rank_correlation(x_N: np.ndarray, y_N: np.ndarray, cluster_N: np.ndarray) -> OverSeeds:
    """Spearman's rank correlation over the tokens where both are numbers; NaN if one of them does not vary.

    The standard error is the jackknife's: each cluster is left out in turn, or each of PARTS parts of the clusters.
    """
    counted_N = ~(np.isnan(x_N) | np.isnan(y_N))
    x_N, y_N, cluster_N = x_N[counted_N], y_N[counted_N], cluster_N[counted_N]
    clusters, part_N = np.unique(cluster_N, return_inverse=True)
    parts = min(len(clusters), PARTS)
    if parts < 2:
        return OverSeeds((_spearman(x_N, y_N),))
    part_N = part_N * parts // len(clusters)
    without = np.array([_spearman(x_N[part_N != part], y_N[part_N != part]) for part in range(parts)])
    stderr = math.sqrt((parts - 1) * np.var(without))
    return OverSeeds((_spearman(x_N, y_N),), None if math.isnan(stderr) else stderr)


def _spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    if len(x_N) < 2 or np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(x_N), stats.rankdata(y_N))[0, 1])
