"""The fused loss against optax's, forward and gradient, with unscored positions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.layers.cross_entropy import NO_LOSS, token_losses
from engram_jax.sharding import spec

pytestmark = pytest.mark.newest


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(8, 6, 16)), dtype), jnp.asarray(rng.normal(size=(16, 38)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 38, (8, 6)), jnp.int32).at[0, 2:].set(NO_LOSS).at[3].set(NO_LOSS)
    return hidden, head, targets, jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)


def reference(hidden, head, targets):
    logits = jnp.einsum("btd,dv->btv", hidden.astype(jnp.float32), head)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets == NO_LOSS, 0, losses)


def weighted(losses, weights):
    return lambda hidden, head, targets: jnp.sum(weights * losses(hidden, head, targets))


def test_equals_optax_forward_and_gradient():
    hidden, head, targets, weights = inputs()
    np.testing.assert_allclose(
        token_losses(hidden, head, targets), reference(hidden, head, targets), rtol=1e-5, atol=1e-5
    )
    ours = jax.grad(weighted(token_losses, weights), argnums=(0, 1))(hidden, head, targets)
    theirs = jax.grad(weighted(reference, weights), argnums=(0, 1))(hidden, head, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_bfloat16_states_give_float32_losses_and_head_gradients():
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    losses = token_losses(hidden, head, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, reference(hidden, head, targets), atol=0.1)
    d_hidden, d_head = jax.grad(weighted(token_losses, weights), argnums=(0, 1))(hidden, head, targets)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)


def test_equal_on_a_mesh(mesh):
    hidden, head, targets, weights = inputs()
    grad = jax.jit(jax.grad(weighted(token_losses, weights), argnums=(0, 1)))
    expected = grad(hidden, head, targets)
    with jax.set_mesh(mesh):
        tokens = jax.NamedSharding(mesh, spec("batch", "seq"))
        hidden, targets, weights = jax.device_put((hidden, targets, weights), tokens)
        head = jax.device_put(head, jax.NamedSharding(mesh, spec("embed", "vocab")))
        got = jax.jit(jax.grad(weighted(token_losses, weights), argnums=(0, 1)))(hidden, head, targets)
        assert got[1].sharding.spec == spec("embed", "vocab")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
