"""The three forms of the routed experts against each other and a NumPy loop; routing, balance, and meshes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import ModelConfig, MoEConfig
from engram_jax.layers.moe import (
    Buffer,
    MoE,
    balance_stats,
    blocked,
    every_expert,
    ragged,
    route,
    stored_specs,
    updated_bias,
)
from engram_jax.sharding import make_mesh, spec

pytestmark = pytest.mark.newest

IMPL = "rbg"  # its initializers compile in a fifth of the time


def make(**moe):
    settings = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 10}
    config = ModelConfig(hidden_size=16, moe=MoEConfig(**(settings | moe)), initializer_range=0.4)
    return jax.jit(lambda: MoE(config, rngs=nnx.Rngs(jax.random.key(3, impl=IMPL))))()


call = jax.jit(lambda layer, *args: layer(*args))


def silu(x):
    return x / (1 + np.exp(-x))


def routings(rng, tokens, experts, k):
    """Expert ids that a router could give: random, all tokens to the same k, and as skewed as text makes them."""
    scores = rng.random((tokens, experts))
    yield np.argsort(scores)[:, :k]
    yield np.tile(rng.permutation(experts)[None, :k], (tokens, 1))
    yield np.argsort(scores * np.arange(1, experts + 1) ** 2.0)[:, :k]


@partial(jax.jit, static_argnums=0)
def value_and_gradients(f, g, ids, *args):
    y, vjp = jax.vjp(lambda x, *rest: f(x, ids, *rest), *args)
    return y, *vjp(g)


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [
        (37, 6, 2),
        (50, 5, 1),
        (3, 7, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, 8, 4), (200, 3, 3))),
    ],
)
@pytest.mark.parametrize("form", [ragged, blocked])
def test_forms_equal_every_expert_in_value_and_all_gradients(form, tokens, experts, k, rng):
    D, F, forms = 8, 6, (form, every_expert)
    shapes = (tokens, D), (tokens, k), (experts, D, F), (experts, D, F), (experts, F, D)

    for ids in routings(rng, tokens, experts, k):
        with jax.enable_x64(True):
            args = [jnp.asarray(rng.normal(size=s)) for s in ((tokens, D), *shapes)]
            results = [value_and_gradients(f, args[0], jnp.asarray(ids, jnp.int32), *args[1:]) for f in forms]
        for got, want in zip(*results, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


def test_every_expert_equals_a_loop(rng):
    ids = np.argsort(rng.random((9, 5)))[:, :3]
    x, weights, gate, up, down = (rng.normal(size=s) for s in ((9, 4), (9, 3), (5, 4, 6), (5, 4, 6), (5, 6, 4)))
    expected = np.zeros((9, 4))
    for n, j in np.ndindex(9, 3):
        e = ids[n, j]
        expected[n] += weights[n, j] * (silu(x[n] @ gate[e]) * (x[n] @ up[e])) @ down[e]
    with jax.enable_x64(True):
        y = every_expert(*(jnp.asarray(a) for a in (x, ids, weights, gate, up, down)))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_bias_selects_but_does_not_weigh(scoring_func, norm_topk_prob, rng):
    config = MoEConfig(
        n_routed_experts=6,
        num_experts_per_tok=2,
        scoring_func=scoring_func,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )
    x, router, bias = rng.normal(size=(2, 7, 4)), rng.normal(size=(4, 6)), rng.normal(size=6)
    bias[4] = 10
    with jax.enable_x64(True):
        ids, weights, scores = route(jnp.asarray(x), jnp.asarray(router), jnp.asarray(bias), config)
    logits = x @ router
    expected = 1 / (1 + np.exp(-logits))
    if scoring_func == "softmax":
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert (ids == 4).any(-1).all()
    for b, t in np.ndindex(2, 7):
        top = np.argsort(-(expected[b, t] + bias))[:2]
        assert set(top) == set(np.asarray(ids[b, t]))
        want = expected[b, t][np.asarray(ids[b, t])]
        np.testing.assert_allclose(weights[b, t], 2.5 * (want / want.sum() if norm_topk_prob else want), rtol=1e-9)


def test_the_bias_is_state_not_a_parameter_and_gets_no_gradient():
    layer, x = make(), jax.random.normal(jax.random.key(1), (2, 5, 16))
    graphdef, params, buffers = nnx.split(layer, nnx.Param, Buffer)
    assert list(nnx.to_pure_dict(buffers)) == ["balance_bias"]
    assert "balance_bias" not in nnx.to_pure_dict(params)
    gradient = jax.jit(jax.grad(lambda b: nnx.merge(graphdef, params, b)(x)[0].sum()))(buffers)
    np.testing.assert_array_equal(jax.tree.leaves(gradient)[0], 0)


@pytest.mark.parametrize("implementation", ["every_expert", "ragged", "blocked"])
def test_layer_is_shared_plus_routed_and_differentiable_in_the_router(implementation):
    layer, reference = make(implementation=implementation), make(implementation="every_expert")
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))

    @jax.jit
    def shared_plus_routed(layer, x):
        routing = route(x, layer.router_de[...], layer.balance_bias[...], layer.config)
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, routing.expert_ids_BTK, routing.weights_BTK))
        experts = layer.gate_edf[...], layer.up_edf[...], layer.down_efd[...]
        return every_expert(*flat, *experts).reshape(x.shape) + layer.shared(x)

    np.testing.assert_allclose(call(layer, x)[0], shared_plus_routed(layer, x), atol=2e-6)
    grads = [jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(x)[0]))))(m) for m in (layer, reference)]
    assert np.abs(grads[0].router_de[...]).max() > 1e-3
    for got, want in zip(*(jax.tree.leaves(g) for g in grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_stats_equal_a_loop_and_leave_padding_out(rng):
    layer = make()
    layer.balance_bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 7, 16)), jnp.float32)
    segments = jnp.asarray([[1] * 7, [1, 1, 2, 2, 0, 0, 0], [3] + [0] * 6, [0] * 7])
    stats = call(layer, x, segments)[1]
    routing = route(x, layer.router_de[...], layer.balance_bias[...], layer.config)
    scores, count, losses = np.asarray(routing.scores_BTE, np.float64), np.zeros(6), []
    for b in range(3):
        real = [t for t in range(7) if segments[b, t]]
        frequency, probability = np.zeros(6), np.zeros(6)
        for t in real:
            count[np.asarray(routing.expert_ids_BTK[b, t])] += 1
            frequency[np.argsort(-scores[b, t])[:2]] += 6 / (2 * len(real))
            probability += scores[b, t] / scores[b, t].sum() / len(real)
        losses.append((frequency * probability).sum())
    np.testing.assert_allclose(stats.load_E, count / count.sum(), rtol=1e-6)
    np.testing.assert_allclose(stats.seq_aux, np.mean(losses), rtol=1e-5)
    changed = jnp.where(segments[..., None] == 0, -x, x)
    for got, want in zip(jax.tree.leaves(call(layer, changed, segments)[1]), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(got, want)


def test_padding_tokens_do_not_change_real_ones():
    layer, x = make(), jax.random.normal(jax.random.key(1), (2, 9, 16))
    segments = jnp.asarray([[1] * 6 + [0] * 3] * 2)
    y, other = (call(layer, a, segments)[0] for a in (x, jnp.where(segments[..., None] == 0, 5.0, x)))
    np.testing.assert_allclose(y[:, :6], other[:, :6], atol=1e-6)


def test_all_padding_gives_finite_stats():
    stats = call(make(), jnp.ones((1, 4, 16)), jnp.zeros((1, 4), jnp.int32))[1]
    np.testing.assert_array_equal(stats.load_E, 0)
    assert stats.seq_aux == 0


def test_the_bias_balances_a_skewed_router():
    layer, rng = make(), np.random.default_rng(0)
    layer.router_de[...] = (layer.router_de[...] / 4).at[0].set(jnp.arange(6.0) / 4)
    x = jnp.asarray(rng.normal(size=(4, 64, 16)), jnp.float32).at[..., 0].set(1.0)
    run = jax.jit(lambda bias: balance_stats(route(x, layer.router_de[...], bias, layer.config), None).load_E)
    first, bias = run(jnp.zeros(6)), jnp.zeros(6)
    for _ in range(300):
        bias = updated_bias(bias, run(bias), 0.002)
    assert first.max() > 0.3
    np.testing.assert_allclose(run(bias), 1 / 6, atol=0.02)


def test_updated_bias_moves_by_the_sign():
    bias = updated_bias(jnp.asarray([0.5, 0.0, 0.0]), jnp.asarray([0.7, 0.1, 0.2]), 0.25)
    np.testing.assert_allclose(bias, [0.25, 0.25, 0.25])
    np.testing.assert_array_equal(updated_bias(bias, jnp.full(3, 0.25), 0.1), bias)


def test_no_shared_expert():
    layer, x = make(n_shared_experts=0), jax.random.normal(jax.random.key(1), (1, 5, 16))
    assert layer.shared is None
    assert np.abs(call(layer, x)[0]).max() > 0


def run_sharded(mesh, make_layer, x, segments):
    """Output, statistics, and gradients of parameters and input: on one device, and on the mesh."""

    @jax.jit
    def run(layer, x, segments):
        def loss(layer, x):
            y, stats = layer(x, segments)
            return jnp.mean(y**2) + stats.seq_aux, (y, stats)

        (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return aux, nnx.to_pure_dict(nnx.state(grads[0], nnx.Param)), grads[1]

    expected = run(make_layer(), x, segments)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, spec("batch", "seq", "act")))
        segments = jax.device_put(segments, jax.NamedSharding(mesh, spec("batch", "seq")))
        got = run(make_layer(), x, segments)
        assert jax.typeof(got[1]["gate_edf"]).sharding.spec == stored_specs(len(got[1]["gate_edf"]))[0]
    return expected, got


def assert_equal(expected, got):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())


@pytest.mark.parametrize("implementation", ["blocked", pytest.param("ragged", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_single_device_output_stats_and_gradients(mesh, implementation):
    x = jax.random.normal(jax.random.key(1), (8, 6, 16))
    segments = jnp.asarray([[1, 1, 1, 0, 0, 0]] * 3 + [[1] * 6] * 5)
    expected, got = run_sharded(
        mesh, lambda: make(implementation=implementation, n_routed_experts=8, capacity_factor=9.0), x, segments
    )
    assert_equal(expected, got)


@pytest.mark.parametrize(
    "axes",
    [
        {"expert": 2, "context": 2, "tensor": 2},
        pytest.param({"fsdp": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"expert": 8}, marks=pytest.mark.slow),
    ],
)
def test_experts_that_do_not_divide_are_the_single_devices(axes):
    """7 of them: the last owner has one less than the others."""
    x = jax.random.normal(jax.random.key(1), (8, 6, 16))
    segments = jnp.asarray([[1, 1, 1, 0, 0, 0]] * 3 + [[1] * 6] * 5)
    mesh = make_mesh(1, **{"fsdp": 1} | axes)
    expected, got = run_sharded(mesh, lambda: make(n_routed_experts=7, capacity_factor=0.7), x, segments)
    with jax.set_mesh(mesh):
        assert stored_specs(7) == (spec(None, "embed", "ffn"), spec(None, "ffn", "embed")) != stored_specs(8)
    (_, grads, _) = got
    assert jax.typeof(grads["gate_edf"]).shape[0] == 7
    stats = dataclasses.replace(got[0][1], carried=expected[0][1].carried)
    assert_equal(expected, ((got[0][0], stats), *got[1:]))


@pytest.mark.parametrize("favourite", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_what_does_not_fit_is_carried_in_further_rounds(favourite):
    """All tokens want the same expert, and blocks have room for a third of an even share."""

    def make_layer():
        layer = make(n_routed_experts=8, num_experts_per_tok=2, capacity_factor=0.3)
        layer.balance_bias[...] = 10 * jax.nn.one_hot(favourite, 8)
        return layer

    x, segments = jax.random.normal(jax.random.key(1), (8, 48, 16)), jnp.ones((8, 48), jnp.int32)
    expected, got = run_sharded(make_mesh(1, 2, expert=4), make_layer, x, segments)
    (y, stats), grads, d_x = got
    assert stats.carried > 0.2
    assert expected[0][1].carried == 0
    stats = dataclasses.replace(stats, carried=jnp.zeros(()))
    assert_equal(expected, ((y, stats), grads, d_x))


@pytest.mark.parametrize("implementation", ["blocked", pytest.param("ragged", marks=pytest.mark.slow), "every_expert"])
def test_stacks_scans_and_rematerialises(implementation):
    config = ModelConfig(
        hidden_size=16,
        moe=MoEConfig(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, implementation=implementation
        ),
    )
    stacked = jax.jit(jax.vmap(lambda key: MoE(config, rngs=nnx.Rngs(key))))(
        jax.random.split(jax.random.key(0, impl=IMPL), 3)
    )
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))

    def scanned(layers, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, layer: (x + layer(x)[0], None)), x, layers)[0] ** 2)

    def looped(layers, x):
        for i in range(3):
            x = x + jax.tree.map(lambda a, i=i: a[i], layers)(x)[0]
        return jnp.sum(x**2)

    for got, want in zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(stacked, x)) for f in (scanned, looped)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [every_expert, ragged, blocked])
def test_bfloat16_accumulates_in_float32(form):
    rng = np.random.default_rng(1)
    ids = jnp.asarray(np.argsort(rng.random((64, 4)))[:, :2], jnp.int32)
    shapes = (64, 512), (64, 2), (4, 512, 32), (4, 512, 32), (4, 32, 512)
    x, weights, *experts = (jnp.asarray(rng.normal(size=s), jnp.float32) / 8 for s in shapes)
    y = jax.jit(form)(x.astype(jnp.bfloat16), ids, weights, *experts)
    rounded = [w.astype(jnp.bfloat16).astype(jnp.float32) for w in (x, *experts)]
    exact = jax.jit(every_expert)(rounded[0], ids, weights, *rounded[1:])
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(y.astype(jnp.float32) - exact) < 0.006 * np.linalg.norm(exact)
