"""Grouped means, quotients and correlations against loops and scipy, on fresh random numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from engram_jax.analysis.groups import (
    Grouping,
    joined,
    means,
    minus,
    quotients,
    rank_correlation,
    tabulate,
)
from engram_jax.evaluation.over_seeds import OverSeeds, student_interval
from engram_jax.evaluation.statistics import ratio

N, CLUSTERS, LABELS = 600, 7, ("a", "b", "never", "c")


@pytest.fixture
def cluster_N(rng):
    return rng.integers(0, CLUSTERS, N) * 10


@pytest.fixture
def grouping(rng):
    return Grouping("letters", LABELS, rng.choice([-1, 0, 1, 3], N))


def test_tables_are_loops(rng, cluster_N, grouping):
    value_N = rng.normal(size=N)
    value_N[rng.random(N) < 0.1] = np.nan
    sums, sizes = tabulate(value_N, grouping.group_N, cluster_N, len(LABELS))
    for c, cluster in enumerate(np.unique(cluster_N)):
        for g in range(len(LABELS)):
            chosen = [v for v, x, y in zip(value_N, cluster_N, grouping.group_N, strict=True) if (x, y) == (cluster, g)]
            chosen = [v for v in chosen if not math.isnan(v)]
            assert sums[c, g] == pytest.approx(sum(chosen)) and sizes[c, g] == len(chosen)


def test_one_document_and_one_seed_show_nothing(rng):
    (by,) = means([rng.normal(1, 1, N)], Grouping("all", ("all",), np.zeros(N, int)), np.zeros(N, int)).values()
    assert by.mean > 0.5 and by.stderr is None and not by.differs_from()
    (two,) = means(2 * [rng.normal(1, 1e-3, N)], Grouping("all", ("all",), np.zeros(N, int)), np.zeros(N, int)).values()
    assert two.differs_from()


def test_means_and_their_errors(rng, cluster_N, grouping):
    values = [rng.normal(size=N) + cluster_N * 0.1 for _ in range(3)]
    found = means(values, grouping, cluster_N)
    assert list(found) == ["a", "b", "c"]
    for label, by in found.items():
        inside = grouping.of(label)
        assert by.values == pytest.approx([value_N[inside].mean() for value_N in values])
        mean_N = np.mean(values, axis=0)
        per_cluster = [mean_N[inside & (cluster_N == c)] for c in np.unique(cluster_N)]
        expected = ratio([x.sum() for x in per_cluster], [len(x) for x in per_cluster])
        assert (by.mean, by.stderr) == pytest.approx((expected.value, expected.stderr))


def test_quotients_are_of_sums(rng, cluster_N, grouping):
    over, under = rng.random(N), (rng.random(N) < 0.5).astype(float)
    under[grouping.of("b")] = 0
    found = quotients([over], [under], grouping, cluster_N)
    assert list(found) == ["a", "c"]
    inside = grouping.of("c")
    assert found["c"].values[0] == pytest.approx(over[inside].sum() / under[inside].sum())


def test_students_interval_and_what_it_decides(rng):
    values = tuple(rng.normal(3, 1, 5))
    by = OverSeeds(values, 0.01)
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert by.interval() == student_interval(values) == pytest.approx(expected)
    assert student_interval(values, level=99) == pytest.approx(
        stats.t.interval(0.99, 4, np.mean(values), stats.sem(values))
    )
    assert student_interval(values[:1]) == (-math.inf, math.inf) and OverSeeds(values[:1]).interval() is None
    assert by.differs_from(expected[1] + 0.1) and not by.differs_from(float(np.mean(values)) + 0.05)
    assert not OverSeeds(values, 100.0).differs_from()
    assert not OverSeeds((1.0, -1.0, 1.1, -0.9), 0.001).differs_from()
    assert OverSeeds((1.0,), 0.2).differs_from() and not OverSeeds((1.0,), 0.6).differs_from()
    assert not OverSeeds((math.nan,)).differs_from()


def test_written():
    assert OverSeeds((1.0, 2.0), 0.25).text() == "+1.500 ± 0.250 (seeds 0.707)"
    assert OverSeeds((50.0,), None).text(".1f") == "50.0" and OverSeeds((math.nan,)).text() == "-"


def test_seeds_with_texts_of_their_own():
    a, b = {"x": OverSeeds((1.0,), 3.0), "y": OverSeeds((5.0,), 1.0)}, {"x": OverSeeds((2.0,), 4.0)}
    assert joined([a, b]) == {"x": OverSeeds((1.0, 2.0), pytest.approx(math.sqrt(12.5)))}
    assert joined([a, {"x": OverSeeds((2.0,))}])["x"].stderr is None
    assert minus(OverSeeds((5.0, 6.0), 3.0), OverSeeds((1.0, 4.0), 4.0)) == OverSeeds((4.0, 2.0), 5.0)


def test_rank_correlation_is_spearmans(rng, cluster_N):
    x = rng.integers(0, 20, N).astype(float)
    y = x**3 + 2000 * rng.normal(size=N)
    y[rng.random(N) < 0.1] = np.nan
    known = ~np.isnan(y)
    by = rank_correlation(x, y, cluster_N)
    assert by.mean == pytest.approx(stats.spearmanr(x[known], y[known]).statistic)
    without = [
        stats.spearmanr(x[known & (cluster_N != c)], y[known & (cluster_N != c)]).statistic
        for c in np.unique(cluster_N)
    ]
    expected = math.sqrt((CLUSTERS - 1) / CLUSTERS * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert by.stderr == pytest.approx(expected)
    assert math.isnan(rank_correlation(x, np.ones(N), cluster_N).mean)


def test_many_clusters_are_left_out_in_parts():
    """The jackknife's error of independent tokens is that of Spearman's under independence, 1 / sqrt(N)."""
    rng = np.random.default_rng(0)  # fixed: 25 parts know their spread to 14 %, and one draw of 25,000 is further off
    x, y = rng.normal(size=(2, 20_000))
    by = rank_correlation(x, y, np.arange(20_000))
    assert by.stderr == pytest.approx(20_000**-0.5, rel=0.6)
