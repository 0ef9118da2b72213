"""Means and standard errors against resampling and against what is known in closed form."""

import math

import numpy as np
import pytest

from engram_jax.evaluation.statistics import Metric, difference, mean, ratio


def clusters(rng, count: int):
    """Documents of very different length whose tokens share their document's level."""
    sizes = rng.integers(1, 200, count)
    levels = rng.normal(4, 1, count)
    return np.array([rng.normal(level, 1, size).sum() for level, size in zip(levels, sizes, strict=True)]), sizes


def test_ratio_is_the_mean_over_all_tokens(rng):
    sums, sizes = clusters(rng, 50)
    metric = ratio(sums, sizes, unit="nats")
    assert metric.value == pytest.approx(sums.sum() / sizes.sum(), rel=1e-12)
    assert (metric.count, metric.clusters, metric.unit) == (sizes.sum(), 50, "nats")


def test_its_standard_error_is_the_spread_over_resampled_documents(rng):
    sums, sizes = clusters(rng, 400)
    chosen = rng.integers(0, 400, (4000, 400))
    resampled = sums[chosen].sum(1) / sizes[chosen].sum(1)
    # 4,000 resamples know their own spread to 1.1 %; the linearisation is off by some 1/sqrt(400).
    assert ratio(sums, sizes).stderr == pytest.approx(resampled.std(), rel=0.15)


def test_tokens_of_a_document_are_not_independent(rng):
    sums, sizes = clusters(rng, 100)
    as_if_independent = math.sqrt(2) / math.sqrt(sizes.sum())
    assert ratio(sums, sizes).stderr > 3 * as_if_independent


def test_equal_sizes_give_the_ordinary_standard_error(rng):
    values = rng.normal(size=30)
    metric = mean(values, higher_is_better=True)
    assert metric.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(30), rel=1e-12)
    assert ratio(7 * values, np.full(30, 7)).stderr == pytest.approx(metric.stderr, rel=1e-12)
    assert metric.higher_is_better and metric.count == 30


def test_pairing_removes_what_both_share(rng):
    ours, sizes = clusters(rng, 100)
    theirs = ours + 0.1 * sizes + rng.normal(0, 0.01, 100)
    paired = difference(ours, theirs, sizes)
    assert paired.value == pytest.approx(-0.1, abs=1e-3)
    assert paired.stderr is not None and paired.stderr < 1e-3 < ratio(ours, sizes).stderr


def test_empty_clusters_do_not_count(rng):
    sums, sizes = clusters(rng, 20)
    assert ratio([*sums, 0, 0], [*sizes, 0, 0]) == ratio(sums, sizes)


def test_what_cannot_be_known_is_not_made_up():
    assert ratio([3.0], [2]).stderr is None
    nothing = ratio([], [])
    assert math.isnan(nothing.value) and nothing.stderr is None and nothing.clusters == 0


def test_a_perplexity_moves_as_its_loss_does():
    loss, step = Metric(3.0, 0.01), 1e-6
    slope = (Metric(3.0 + step).exp().value - Metric(3.0 - step).exp().value) / (2 * step)
    assert loss.exp().value == pytest.approx(math.exp(3))
    assert loss.exp().stderr == pytest.approx(0.01 * slope, rel=1e-6)
    assert Metric(2.0, 0.5).scaled(100, "%") == Metric(200.0, 50.0, unit="%")
