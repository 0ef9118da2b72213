"""A layer's parameters, made from their declarations."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from engram_jax.sharding import spec
from engram_jax.variants.weights import WeightSpec


def add_parameters(module: nnx.Module, weights: Iterable[WeightSpec], rngs: nnx.Rngs) -> None:
    """Gives `module` a float32 `nnx.Param` for each weight but those of sub-modules, cut as the mesh in use says.

    Each takes one key of `rngs.params`, in the order of `weights`, whether its start is random or not.
    """
    for weight in weights:
        if "." in weight.name:
            continue
        assert weight.dims is not None and weight.start is not None  # WeightSpec checks it
        start = _START[weight.start] if isinstance(weight.start, str) else initializers.normal(weight.start)
        value = start(rngs.params(), weight.shape, jnp.float32, out_sharding=spec(*weight.dims))
        setattr(module, weight.name, nnx.Param(value))


_START = {"zeros": initializers.zeros, "ones": initializers.ones}
