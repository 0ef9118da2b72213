"""CKA against its definition as a sum over quadruples of tokens, and what must not change it."""

import itertools

import numpy as np
import pytest

from engram_jax.analysis.cka import cka, minibatches, plot_cka, soft_alignment
from engram_jax.config import ConfigError


def brute_hsic(k_NN, l_NN):
    """The mean of k_ij (l_ij + l_qr - 2 l_iq) over all ordered quadruples of different tokens."""
    terms = [
        k_NN[i, j] * (l_NN[i, j] + l_NN[q, r] - 2 * l_NN[i, q]) for i, j, q, r in itertools.permutations(range(7), 4)
    ]
    return np.mean(terms)


def test_cka_is_a_ratio_of_means_of_hsic_over_quadruples(rng):
    batches = [(rng.normal(size=(2, 7, 3)), rng.normal(size=(3, 7, 5)) + 2) for _ in range(2)]
    for x_AND, y_BND in batches:
        y_BND[:, :, :3] += x_AND[:1]  # something in common
    grams = [([x @ x.T for x in x_AND], [y @ y.T for y in y_BND]) for x_AND, y_BND in batches]
    expected = np.zeros((2, 3))
    for a, b in np.ndindex(2, 3):
        pairs = [(k[a], k[a]) for k, _ in grams], [(m[b], m[b]) for _, m in grams], [(k[a], m[b]) for k, m in grams]
        ours, theirs, both = (np.mean([brute_hsic(*pair) for pair in of]) for of in pairs)
        expected[a, b] = both / np.sqrt(ours * theirs)
    np.testing.assert_allclose(cka(batches), expected, rtol=1e-9)


def test_equal_states_are_alike_in_any_basis(rng):
    x_AND = rng.normal(size=(3, 40, 6))
    x_AND[1:] += x_AND[:1]  # something in common
    turn_DD, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    wider_DE = np.linalg.qr(rng.normal(size=(9, 6)))[0].T  # into a model of another size
    plain = cka([(x_AND, x_AND)])
    np.testing.assert_allclose(np.diag(plain), 1, rtol=1e-12)
    assert np.abs(plain - np.eye(3)).max() > 0.01
    for moved in (x_AND @ turn_DD, 3 * x_AND + rng.normal(size=6), x_AND @ wider_DE):
        np.testing.assert_allclose(cka([(x_AND, moved)]), plain, rtol=1e-9, atol=1e-12)
    stretched = cka([(x_AND, x_AND * np.array([9, 1, 1, 1, 1, 1]))])
    assert np.diag(stretched).max() < 0.95  # one direction more is another similarity


def test_fewer_tokens_than_dimensions_do_not_look_alike(rng):
    """The biased estimate is near 1 here."""
    values = [cka([(rng.normal(size=(1, 20, 400)), rng.normal(size=(1, 20, 400)))])[0, 0] for _ in range(20)]
    assert abs(np.mean(values)) < 0.1


def test_minibatches_pair_tokens_and_take_each_once(rng):
    x_AND = rng.normal(size=(2, 22, 3))
    found = list(minibatches(x_AND, -x_AND, size=5))
    assert [x.shape for x, _ in found] == [(2, 5, 3)] * 4
    for x, y in found:
        np.testing.assert_array_equal(x, -y)
    rows = {tuple(row) for x, _ in found for row in x[0]}
    assert len(rows) == 20 and rows < {tuple(row) for row in x_AND[0]}
    [(x, _)] = minibatches(x_AND, x_AND, size=100)
    assert sorted(map(tuple, x[0])) == sorted(map(tuple, x_AND[0]))


def test_too_few_tokens(rng):
    three = rng.normal(size=(1, 3, 2))
    with pytest.raises(ConfigError, match="3 tokens"):
        cka([(three, three)])
    with pytest.raises(ConfigError, match="at least one batch"):
        cka([])
    with pytest.raises(ConfigError, match="size=3"):
        cka(minibatches(three, three, size=3))
    with pytest.raises(ConfigError, match="0 tokens"):
        cka(minibatches(three[:, :0], three[:, :0]))
    with pytest.raises(ConfigError, match="3 and 5"):
        cka([(three, rng.normal(size=(1, 5, 2)))])


def test_soft_alignment_is_the_weighted_mean_of_the_nearest_layers():
    similarity_AB = np.array([[0.9, 0.1, 0.0], [0.5, 0.2, 0.0], [0.1, 0.8, 0.3], [0.0, 0.6, 0.6]])
    expected = [(0.9 * 0 + 0.5 * 1) / 1.4, (0.8 * 2 + 0.6 * 3) / 1.4, (0.3 * 2 + 0.6 * 3) / 0.9]
    np.testing.assert_allclose(soft_alignment(similarity_AB, 2), expected)
    np.testing.assert_array_equal(soft_alignment(similarity_AB, 1), [0, 2, 3])
    for k in (0, 5):
        with pytest.raises(ConfigError, match=rf"k={k} must lie in 1\.\.4"):
            soft_alignment(similarity_AB, k)


def test_the_heat_map_shows_similarities_and_the_line(rng, tmp_path):
    similarity_AB = rng.random((6, 4))
    figure = plot_cka(similarity_AB, 2, "the baseline", "the other")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), similarity_AB)
    assert axes.images[0].get_clim() == (0, 1)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer of the other", "layer of the baseline")
    np.testing.assert_allclose(
        np.asarray(axes.lines[-1].get_xydata()), np.c_[range(4), soft_alignment(similarity_AB, 2)]
    )
    figure.savefig(tmp_path / "cka.png")
    assert (tmp_path / "cka.png").stat().st_size > 5000
