from functools import partial

import jax
import numpy as np
import pytest
from scipy.stats import binom

from engram_jax.config import ConfigError
from engram_jax.inference.sampling import Sampling, choose


@pytest.fixture
def draws(rng):
    return partial(drawn, rng)


def drawn(rng, logits, temperature: float, top_k: int, top_p: float = 1.0, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(rng.integers(1 << 31)), count)
    logits = jax.numpy.broadcast_to(jax.numpy.asarray(logits, "float32"), (count, len(logits)))
    return np.asarray(choose(logits, keys, temperature, top_k, top_p))


def test_top_k_restricts_the_support(rng, draws):
    logits = rng.normal(size=40)
    best = np.argsort(-logits.astype(np.float32))
    assert set(draws(logits, 5.0, 3)) == set(best[:3])
    assert set(draws(logits, 5.0, 1)) == {best[0]} == set(draws(logits, 0.0, 0))
    assert len(set(draws(logits, 100.0, 0))) == 40 == len(set(draws(logits, 100.0, 1000)))


def test_top_p_keeps_the_fewest_tokens_that_reach_it(draws):
    probability = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.64, {1, 3}), (0.66, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        assert set(draws(np.log(probability), 1.0, 0, top_p)) == kept
    # Of what top_k leaves: 0.4 and 0.25 are 0.62 and 0.38 of it.
    assert set(draws(np.log(probability), 1.0, 2, 0.6)) == {1}
    chosen = draws(np.log(probability), 1.0, 0, 0.66)
    np.testing.assert_allclose(np.mean(chosen == 1), 0.4 / 0.85, atol=5 * (0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(rng, draws, temperature):
    logits = rng.normal(size=8)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(draws(logits, temperature, 0), minlength=8)
    tails = np.minimum(binom.cdf(counts, 4000, expected), binom.sf(counts - 1, 4000, expected))
    assert (tails > 1e-9).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)
