import jax
import numpy as np
import pytest

from engram_jax.config import ConfigError, OptimizerConfig
from engram_jax.optimizers.schedules import learning_rate, learning_rates

STEP = OptimizerConfig(learning_rate=4e-4, warmup_steps=20)
COSINE = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, schedule="cosine")


def test_step_schedule_by_hand():
    rates = learning_rates(STEP, 100)
    expected = np.concatenate([np.arange(1, 21) / 20, np.ones(60), np.full(10, 0.316), np.full(11, 0.1)]) * 4e-4
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_cosine_by_hand():
    rates = learning_rates(COSINE, 110)
    np.testing.assert_allclose(rates[[0, 9, 10, 60, 110]], np.array([0.1, 1, 1, 0.55, 0.1]) * 1e-3, rtol=1e-12)
    assert (np.diff(rates[10:]) < 0).all()


def test_the_paper_drops_after_40000_and_45000_steps():
    rates = learning_rates(OptimizerConfig(), 50_000)
    assert rates.dtype == np.float64 and rates.shape == (50_001,)
    np.testing.assert_allclose(
        rates[[1999, 39_999, 40_000, 44_999, 45_000, 50_000]] / 4e-4, [1, 1, 0.316, 0.316, 0.1, 0.1]
    )


@pytest.mark.parametrize("config", [STEP, COSINE, OptimizerConfig(warmup_steps=0, decay_at=(), decay_to=())])
def test_traced_schedule_equals_the_vector(config):
    schedule = learning_rate(config, 150)
    traced = jax.jit(jax.vmap(schedule))(np.arange(151))
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, learning_rates(config, 150), rtol=3e-6)
    assert float(schedule(7)) == traced[7]


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=20 .* train\.steps=20"):
        learning_rate(STEP, 20)
    with pytest.raises(ConfigError, match=r"optimizer\.decay_to"):
        learning_rates(OptimizerConfig(schedule="cosine", warmup_steps=0, decay_at=(), decay_to=()), 20)
