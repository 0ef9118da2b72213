"""The learning rate as a function of the step: linear warm-up, then drops (arXiv 2601.07372, table 5) or a cosine.

One formula serves the traced schedule of optax and the float64 vector that catch-up Adam sums over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import OptimizerConfig, require


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """An optax schedule: step (0 at the first update; int, array or traced) -> float32 rate.

    Update `warmup_steps - 1` is the first at the full rate, and the first update already moves: 1 / warmup_steps of it.

    Raises:
      ConfigError: the warm-up does not end within the run, or a cosine has no final rate.
    """
    _check(config, total_steps)
    return lambda step: _rate(config, total_steps, jnp.asarray(step), jnp).astype(jnp.float32)


def learning_rates(config: OptimizerConfig, total_steps: int) -> np.ndarray:
    """The same rates for steps 0..total_steps, float64 [total_steps + 1]. Raises as `learning_rate` does."""
    _check(config, total_steps)
    return _rate(config, total_steps, np.arange(total_steps + 1), np)


def _check(config: OptimizerConfig, total_steps: int) -> None:
    require(
        0 <= config.warmup_steps < total_steps,
        f"optimizer.warmup_steps={config.warmup_steps} must lie in 0..{total_steps - 1} for train.steps={total_steps}: "
        "shorten the warm-up or train longer.",
    )
    require(
        config.schedule != "cosine" or bool(config.decay_to),
        "optimizer.decay_to=() leaves a cosine without a final rate: give one, such as decay_at 0.9, decay_to 0.1.",
    )


def _rate(config: OptimizerConfig, total_steps: int, step: Any, xp: Any) -> Any:
    warmup = config.warmup_steps
    ramp = xp.minimum((step + 1) / max(warmup, 1), 1.0)
    if config.schedule == "cosine":
        progress = xp.clip((step - warmup) / (total_steps - warmup), 0.0, 1.0)
        final = config.decay_to[-1]
        factor = final + (1 - final) * 0.5 * (1 + xp.cos(math.pi * progress))
    else:
        drops = [round(fraction * total_steps) for fraction in config.decay_at]
        factor = xp.ones_like(ramp)
        for drop, relative in zip(drops, config.decay_to, strict=True):
            factor = xp.where(step >= drop, relative, factor)
    return config.learning_rate * ramp * factor
