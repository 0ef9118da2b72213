"""The fused loss against optax's, forward and gradient, with unscored positions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.layers.cross_entropy import NO_LOSS, chunked_token_losses, token_losses
from engram_jax.sharding import make_mesh, spec

pytestmark = pytest.mark.newest


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(8, 6, 16)), dtype), jnp.asarray(rng.normal(size=(16, 38)), jnp.float32)
    targets = rng.integers(0, 38, (8, 6)).astype(np.int32)
    targets[0, 2:], targets[3] = NO_LOSS, NO_LOSS
    return hidden, head, jnp.asarray(targets), jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)


def placed(mesh, hidden, head, targets, weights):
    """The inputs on the devices of the current mesh."""
    tokens, whole = (jax.NamedSharding(mesh, spec(*dims) or jax.P()) for dims in (("batch", "seq"), ("embed", "vocab")))
    hidden, targets, weights = jax.device_put((hidden, targets, weights), tokens)
    return hidden, jax.device_put(head, whole), targets, weights


def reference(hidden, head, targets):
    logits = jnp.einsum("btd,dv->btv", hidden.astype(jnp.float32), head)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets == NO_LOSS, 0, losses)


def weighted(losses, weights):
    return lambda hidden, head, targets: jnp.sum(weights * losses(hidden, head, targets))


def gradients(losses, hidden, head, targets, weights):
    return jax.jit(jax.grad(weighted(losses, weights), argnums=(0, 1)))(hidden, head, targets)


def test_equals_optax_forward_and_gradient():
    hidden, head, targets, weights = inputs()
    np.testing.assert_allclose(
        jax.jit(token_losses)(hidden, head, targets), jax.jit(reference)(hidden, head, targets), rtol=1e-5, atol=1e-5
    )
    ours, theirs = (gradients(losses, hidden, head, targets, weights) for losses in (token_losses, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


@pytest.mark.parametrize(
    "losses", [token_losses, lambda *inputs: chunked_token_losses(*inputs, 8)], ids=["whole", "cut"]
)
def test_no_negative_target_counts(losses):
    """Other libraries' -100 among them."""
    hidden, head, targets, weights = inputs()
    others = np.where(targets == NO_LOSS, -100, targets)
    assert (others != targets).any()
    run = jax.jit(jax.value_and_grad(weighted(losses, weights), argnums=(0, 1)))
    jax.tree.map(np.testing.assert_array_equal, *(run(hidden, head, given) for given in (others, targets)))


def test_bfloat16_states_give_float32_losses_and_head_gradients():
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    losses = jax.jit(token_losses)(hidden, head, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, jax.jit(reference)(hidden, head, targets), atol=0.1)
    d_hidden, d_head = gradients(token_losses, hidden, head, targets, weights)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)


def test_equal_on_a_mesh(mesh):
    hidden, head, targets, weights = inputs()
    expected = gradients(token_losses, hidden, head, targets, weights)
    with jax.set_mesh(mesh):
        hidden, head, targets, weights = placed(mesh, hidden, head, targets, weights)
        got = gradients(token_losses, hidden, head, targets, weights)
        assert got[1].sharding.spec == spec("embed", "vocab")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def in_chunks(chunk_len):
    return lambda hidden, head, targets: chunked_token_losses(hidden, head, targets, chunk_len)


@pytest.mark.parametrize("chunk_len", [1, 4, 6, 9])
def test_chunks_equal_optax_forward_and_gradient(chunk_len):
    """6 positions: as many chunks, one that is not full, one, and one with room left."""
    hidden, head, targets, weights = inputs()
    losses = in_chunks(chunk_len)
    np.testing.assert_allclose(
        jax.jit(losses)(hidden, head, targets), jax.jit(reference)(hidden, head, targets), rtol=1e-5, atol=1e-5
    )
    ours, theirs = (gradients(each, hidden, head, targets, weights) for each in (losses, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_chunks_in_bfloat16_give_float32_losses_and_head_gradients():
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    d_hidden, d_head = gradients(in_chunks(4), hidden, head, targets, weights)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    whole_hidden, whole_head = gradients(token_losses, hidden, head, targets, weights)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (d_hidden, whole_hidden)), rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(d_head, whole_head, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"expert": 2, "context": 2, "tensor": 2}, {"fsdp": 2, "expert": 4}],
    ids=str,
)
def test_chunks_are_equal_on_a_mesh(axes):
    hidden, head, targets, weights = inputs()
    mesh, losses = make_mesh(-1, axes.pop("fsdp", 1), **axes), in_chunks(2)
    expected = jax.jit(jax.value_and_grad(weighted(token_losses, weights), argnums=(0, 1)))(hidden, head, targets)
    with jax.set_mesh(mesh):
        hidden, head, targets, weights = placed(mesh, hidden, head, targets, weights)
        got = jax.jit(jax.value_and_grad(weighted(losses, weights), argnums=(0, 1)))(hidden, head, targets)
        assert got[1][1].sharding.spec == spec("embed", "vocab")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_no_more_logits_than_a_chunk_has_and_one_exchange_of_the_head():
    """Of 8 sequences of 6, over 8 devices, in chunks of 2: [1, 2, 38] at a time, never [1, 6, 38]."""
    hidden, head, targets, weights = inputs()
    mesh = make_mesh(-1, 8)
    with jax.set_mesh(mesh):
        hidden, head, targets, weights = placed(mesh, hidden, head, targets, weights)

        def program(losses):
            step = jax.jit(jax.grad(weighted(losses, weights), argnums=(0, 1)))
            return step.lower(hidden, head, targets).compile().as_text() or ""

        whole, chunked = program(token_losses), program(in_chunks(2))
    assert "f32[1,6,38]" in whole and "f32[1,6,38]" not in chunked and "f32[1,2,38]" in chunked
    assert chunked.count(" reduce-scatter(") == 1
