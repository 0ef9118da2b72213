"""Muon: momentum whose matrices are orthogonalized, so that every direction of a weight moves equally far.

`optax.contrib.scale_by_muon` is the same arithmetic, but fuses momentum and orthogonalization, which leaves no place to
share matrices out between them, and orthogonalizes a whole stack of experts at once.

    B separate matrices, I input dims, O output dims of a weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from engram_jax.optimizers.roles import Role
from engram_jax.sharding import sharding_of

# a x + b (x xT) x + c (x xT)^2 x: the first grows small singular values fast but leaves them in about 0.7..1.2 (Jordan
# 2024), the second settles them at 1.
QUICK = (3.4445, -4.7750, 2.0315)
SETTLE = (2.0, -1.5, 0.5)

# Matrices orthogonalized together hold at most this many entries (2 MB). Ten steps one by one, in such chunks, and all
# at once cost two CPU cores 61, 67, 98 ms of processor time for 72 matrices of 128 x 192 and 1.30, 1.25, 1.76 s for 60
# of 512 x 384. An accelerator would spend its time launching small matrices one by one.
MAX_ENTRIES = 2**19

Coefficients = tuple[tuple[float, float, float], ...]


def newton_schulz(x_IO: jax.Array, coefficients: Coefficients) -> jax.Array:
    """The nearest semi-orthogonal matrix to `x_IO` [I, O], approximately: one quintic step per row of coefficients."""
    rows, columns = x_IO.shape
    x = x_IO.T if rows > columns else x_IO
    x = x / (jnp.linalg.norm(x) + 1e-20)

    def quintic(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        gram = x @ x.T
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    x, _ = jax.lax.scan(quintic, x, jnp.asarray(coefficients, x.dtype))
    return x.T if rows > columns else x


def orthogonalize(x: jax.Array, role: Role, coefficients: Coefficients) -> jax.Array:
    """`newton_schulz` of every matrix in `x`: dims `role.inputs` x `role.outputs`, one matrix per index of the others.

    Where matrices are cut over devices, the devices that hold the parts of some matrices share them out: each receives
    its share whole, orthogonalizes it and sends the parts back. None has more than its share of a stack.
    """
    sharding = sharding_of(x)
    if sharding is None:
        return _orthogonalize_here(x, role, coefficients, [])
    cut = [(dim, axes) for dim, axes in zip(range(-x.ndim, 0), _dims(sharding.spec, x.ndim), strict=True) if axes]
    cut = [(dim, axes) for dim, axes in cut if dim in role.inputs + role.outputs]
    local = partial(_orthogonalize_here, role=role, coefficients=coefficients, cut=cut)
    return jax.shard_map(local, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False)(x)


def _orthogonalize_here(x: jax.Array, role: Role, coefficients: Coefficients, cut: list[tuple[int, Any]]) -> jax.Array:
    """This device's part of x; `cut`: the dims of the matrices that are cut, and over which mesh axes."""
    batch = [dim for dim in range(-x.ndim, 0) if dim not in role.inputs + role.outputs]
    order = [*batch, *role.inputs, *role.outputs]
    stacked = x.transpose(order)
    x_BIO = stacked.reshape(-1, *stacked.shape[len(batch) :])
    places = [(1 + order.index(dim) - len(batch), axes) for dim, axes in cut]
    number, sharers = len(x_BIO), math.prod(jax.lax.axis_size(axes) for _, axes in places)
    x_BIO = jnp.pad(x_BIO, [(0, -number % sharers)] + [(0, 0)] * (x_BIO.ndim - 1))
    for place, axes in places:
        x_BIO = jax.lax.all_to_all(x_BIO, axes, split_axis=0, concat_axis=place, tiled=True)

    def one(x_IO: jax.Array) -> jax.Array:
        rows = math.prod(x_IO.shape[: len(role.inputs)])
        return newton_schulz(x_IO.reshape(rows, -1), coefficients).reshape(x_IO.shape)

    together = _divisor(len(x_BIO), at_most=MAX_ENTRIES // math.prod(x_BIO.shape[1:]))
    if together == len(x_BIO):
        y_BIO = jax.vmap(one)(x_BIO)
    else:
        y_BIO = jax.lax.map(one, x_BIO, batch_size=together)
    for place, axes in reversed(places):
        y_BIO = jax.lax.all_to_all(y_BIO, axes, split_axis=place, concat_axis=0, tiled=True)
    return y_BIO[:number].reshape(stacked.shape).transpose([order.index(dim) for dim in range(-x.ndim, 0)])


def _dims(spec: P, ndim: int) -> list[Any]:
    return [*spec, *[None] * (ndim - len(spec))]


def _divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, max(min(number, at_most), 1) + 1) if number % d == 0)


def scale_by_muon(
    momentum: float, update_rms: float, roles: Any, steps: tuple[int, int] = (8, 2)
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized and rescaled to a root mean square of `update_rms` per entry.

    Args:
      roles: tree of `Role` shaped like the updates.
      steps: how many quick and how many settling Newton-Schulz steps.
    """
    coefficients = (QUICK,) * steps[0] + (SETTLE,) * steps[1]

    def rescaled(x: jax.Array, role: Role) -> jax.Array:
        rows, columns = (math.prod(x.shape[dim] for dim in dims) for dims in (role.inputs, role.outputs))
        return orthogonalize(x, role, coefficients) * (update_rms * math.sqrt(max(rows, columns)))

    def update(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(rescaled, updates, roles)

    # The scale of a momentum (sum here, average elsewhere) drops out: newton_schulz begins by normalizing.
    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(update))
