"""Stochastic rounding: unbiased, exact where it can be, blind to where rows lie, and good enough to train with."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engram_jax.memory.rounding import row_noise, stochastic_round
from engram_jax.memory.table import TableLayout

pytestmark = pytest.mark.newest

row_noise = jax.jit(row_noise, static_argnums=2)
stochastic_round = jax.jit(stochastic_round)
LARGEST = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def noise(key, shape):
    return jax.random.bits(key, shape, jnp.uint16)


def bits_of(x):
    return np.asarray(x).view(np.uint16)


def neighbours(x):
    """The bfloat16 at or below and at or above |x| in magnitude, as float64: by truncation of the float32."""
    below = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    above = (below.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    return below.astype(np.float64), np.where(below == x, below, above).astype(np.float64)


def test_every_bfloat16_is_kept_whatever_the_noise(key):
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    x = jnp.asarray(every.astype(np.float32))
    for n in (noise(key, x.shape), *(np.full(x.shape, bits, np.uint16) for bits in (0, 0xFFFF))):
        rounded = np.asarray(stochastic_round(x, n))
        finite_or_infinite = ~np.isnan(every.astype(np.float32))
        np.testing.assert_array_equal(bits_of(rounded)[finite_or_infinite], bits_of(every)[finite_or_infinite])
        assert np.all(np.isnan(rounded[~finite_or_infinite].astype(np.float32)))


def test_the_result_is_one_of_the_two_neighbours_up_with_the_noise():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=4000) * np.exp(rng.normal(size=4000) * 20)).astype(np.float32)
    x = x[np.abs(x) < 1e38]
    below, above = neighbours(x)
    for n, expected in ((0, below), (0xFFFF, above)):
        rounded = np.asarray(stochastic_round(x, np.full(x.shape, n, np.uint16)), np.float64)
        np.testing.assert_array_equal(rounded, expected)


def test_all_noise_together_has_the_mean_exactly():
    """Over each of the 2^16 values of the noise once, the mean of the results is x: no sampling error to allow for."""
    every = np.arange(2**16, dtype=np.uint16)
    for x in np.float32([1.001, -3.14159, 0.02, 1e-30, 255.3, -0.0123456]):
        rounded = stochastic_round(np.full(every.shape, x), every)
        assert np.asarray(rounded, np.float64).mean() == np.float64(x)


def test_the_mean_over_keys_lies_within_the_central_limit(key):
    x = np.linspace(1, 2, 64, endpoint=False).astype(np.float32) + np.float32(0.001)
    draws, ulp = 4000, 2.0**-7
    n = jax.jit(jax.vmap(lambda i: row_noise(jax.random.fold_in(key, i), jnp.arange(1), 64)[0]))(np.arange(draws))
    rounded = np.asarray(stochastic_round(np.broadcast_to(x, n.shape), n), np.float64)
    assert np.abs(rounded - x).max() < ulp
    np.testing.assert_array_less(np.abs(rounded.mean(0) - x), 5 * ulp / 2 / draws**0.5)


def test_infinities_nan_and_the_largest_numbers():
    nans = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF]).view(np.float32)
    x = np.float32([np.inf, -np.inf, LARGEST, -LARGEST, np.nextafter(LARGEST, np.float32(np.inf)), 3.4e38, -3.4e38])
    for n in (0, 1, 0x8000, 0xFFFF):
        rounded = np.asarray(stochastic_round(x, np.full(x.shape, n, np.uint16)), np.float32)
        np.testing.assert_array_equal(rounded, [np.inf, -np.inf, LARGEST, -LARGEST, LARGEST, LARGEST, -LARGEST])
        assert np.all(np.isnan(np.asarray(stochastic_round(nans, np.full(4, n, np.uint16)), np.float32)))


def test_noise_belongs_to_the_logical_row(key):
    """Sharded and padded, alone or in any company: the same row has the same noise; other rows and keys do not."""
    layout, width = TableLayout((11, 13), shards=4), 10
    whole = np.asarray(row_noise(key, np.arange(layout.num_rows), width))
    logical = jax.jit(layout.logical)
    sharded = [
        row_noise(key, logical(np.int32(shard), np.arange(layout.rows_per_shard)), width)
        for shard in range(layout.shards)
    ]
    np.testing.assert_array_equal(layout.to_logical(np.concatenate(sharded)), whole)
    np.testing.assert_array_equal(row_noise(key, np.int32([7]), width)[0], whole[7])
    assert len({row.tobytes() for row in whole}) == layout.num_rows
    other = np.asarray(row_noise(jax.random.fold_in(key, 1), np.arange(layout.num_rows), width))
    assert np.mean(other == whole) < 0.02


def test_small_steps_add_up_within_the_stated_bound(key):
    """2,000 steps down a quadratic, each 1/32 ulp or less: to the nearest nothing moves, at random all of it does."""
    steps, width, rate, target, ulp = 2000, 512, 2.0**-12, 1.99, 2.0**-7

    def train(round_to_storage):
        def one_step(row_D, step):
            row = row_D.astype(jnp.float32)
            return round_to_storage(row - rate * (row - target), step), None

        start = round_to_storage(jnp.ones(width), 0)
        return np.asarray(jax.jit(lambda x: jax.lax.scan(one_step, x, jnp.arange(steps))[0])(start), np.float64)

    def at_random(row, step):
        return stochastic_round(row, row_noise(jax.random.fold_in(key, step), jnp.arange(1), width)[0])

    exact, nearest, rounded = (train(f) for f in (lambda x, _: x, lambda x, _: x.astype(jnp.bfloat16), at_random))
    np.testing.assert_array_equal(nearest, 1)
    distance = exact[0] - 1
    assert 0.35 < distance < 0.45
    errors = rounded - exact
    # Azuma, at a probability of 1e-6 that any entry is beyond; the deviation; the sharper one for small steps; the mean
    assert np.abs(errors).max() < ulp * np.sqrt(steps * np.log(2 * width / 1e-6) / 2)
    spread = 1 + 5 / np.sqrt(2 * width)  # 5 deviations of a deviation estimated from `width` entries
    assert errors.std() < spread * ulp * steps**0.5 / 2
    assert errors.std() < spread * (distance * ulp) ** 0.5
    assert abs(errors.mean()) < 5 * (distance * ulp / width) ** 0.5
