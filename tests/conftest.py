"""The pod in small: eight CPU devices, strict rank promotion, warnings are errors (pyproject.toml)."""

import os

# Most of the suite's time is compiling small programs once: level 0 saves a third of it.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)
