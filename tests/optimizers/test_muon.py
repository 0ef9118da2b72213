"""Muon against a plain NumPy loop over single matrices, in float64 so that ten quintic steps cannot hide a mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.config import EngramConfig, ModelConfig
from engram_jax.optimizers.muon import QUICK, SETTLE, orthogonalize, scale_by_muon
from engram_jax.optimizers.roles import Role, roles
from engram_jax.sharding import make_mesh

ROLES = roles(ModelConfig(engram=EngramConfig(engram_layer_ids=(0,))))
DEEPSEEK_V4 = (QUICK,) * 8 + (SETTLE,) * 2
# name -> (shape, rows and columns of each of its matrices, how to take matrix (index) out of the array)
WEIGHTS = {
    "q_dnh": ((3, 16, 4, 6), (16, 24), lambda x: [m.reshape(16, 24) for m in x]),
    "o_nhd": ((3, 4, 6, 16), (24, 16), lambda x: [m.reshape(24, 16) for m in x]),
    "gate_edf": ((2, 4, 16, 12), (16, 12), lambda x: list(x.reshape(8, 16, 12))),
    "down_efd": ((2, 4, 12, 16), (12, 16), lambda x: list(x.reshape(8, 12, 16))),
    "key_value_emd": ((20, 3, 16), (20, 16), lambda x: [x[:, m] for m in range(3)]),
    "router_de": ((16, 4), (16, 4), lambda x: [x]),
}


def orthogonal_numpy(x):
    x = x / np.linalg.norm(x)
    for i in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if i < 8 else (2, -1.5, 0.5)
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def random(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, (shape, _, _) in WEIGHTS.items()}


def roles_of_weights():
    return {name: ROLES[name] for name in WEIGHTS}


def test_three_steps_equal_numpy():
    gradients = [random(seed) for seed in range(3)]
    momenta = {name: [0.0] * len(split(gradients[0][name])) for name, (_, _, split) in WEIGHTS.items()}
    with jax.enable_x64(True):
        muon = scale_by_muon(0.95, 0.18, roles_of_weights())
        state = muon.init(gradients[0])
        for gradient in gradients:
            updates, state = jax.jit(muon.update)(gradient, state)
            for name, (_, (rows, columns), split) in WEIGHTS.items():
                for i, (g, update) in enumerate(zip(split(gradient[name]), split(updates[name]), strict=True)):
                    # momentum as an average, Nesterov's look-ahead, as DeepSeek-V4 writes it
                    momenta[name][i] = 0.95 * momenta[name][i] + 0.05 * g
                    look_ahead = 0.95 * momenta[name][i] + 0.05 * g
                    expected = orthogonal_numpy(look_ahead) * 0.18 * max(rows, columns) ** 0.5
                    np.testing.assert_allclose(update, expected, rtol=1e-8, atol=1e-10, err_msg=f"{name} {i}")


def test_updates_are_semi_orthogonal_with_the_asked_rms(key):
    x = jax.random.normal(key, (5, 48, 32))
    y = jax.jit(lambda x: orthogonalize(x, ROLES["gate_edf"], DEEPSEEK_V4))(x)
    np.testing.assert_allclose(np.linalg.svd(y, compute_uv=False), 1, atol=2e-2)
    muon = scale_by_muon(0.95, 0.18, ROLES["gate_edf"])
    updates, _ = jax.jit(muon.update)(x, muon.init(x))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates**2, axis=(1, 2))), 0.18, rtol=1e-2)


def test_any_gradient_scale_works(key):
    scales = jnp.array([0.0, 1e-30, 1e-8, 1e8])[:, None, None]
    y = orthogonalize(scales * jax.random.normal(key, (4, 8, 6)), ROLES["gate_edf"], DEEPSEEK_V4)
    assert jnp.isfinite(y).all() and not y[0].any()
    np.testing.assert_allclose(np.linalg.svd(y[2:], compute_uv=False), 1, atol=2e-2)


def test_chunks_do_not_mix_matrices(key):
    """A stack too large for one chunk equals its matrices one by one."""
    x = jax.random.normal(key, (6, 2, 512, 300))
    role = ROLES["gate_edf"]
    one = jax.jit(lambda m: orthogonalize(m, Role("matrix", (-2,), (-1,)), DEEPSEEK_V4[:1]))
    together = jax.jit(lambda m: orthogonalize(m, role, DEEPSEEK_V4[:1]))(x)
    for layer, expert in ((0, 0), (3, 1), (5, 0)):
        np.testing.assert_allclose(together[layer, expert], one(x[layer, expert]), atol=1e-5)


@pytest.mark.parametrize("axes", [(1, 1), (2, 4)])
def test_sharded_weights_get_the_same_updates(axes):
    gradients = random(7, np.float32)
    muon = scale_by_muon(0.95, 0.18, roles_of_weights())
    expected, _ = jax.jit(muon.update)(gradients, muon.init(gradients))
    mesh = make_mesh(*axes, devices=jax.devices()[: axes[0] * axes[1]])
    with jax.set_mesh(mesh):
        # the hidden_size dim lies over fsdp, as sharding.py has it
        specs = {
            "q_dnh": P(None, "fsdp"),
            "o_nhd": P(None, None, None, "fsdp"),
            "gate_edf": P(None, None, "fsdp"),
            "down_efd": P(None, None, None, "fsdp"),
            "key_value_emd": P(None, None, "fsdp"),
            "router_de": P("fsdp"),
        }
        sharded = {name: jax.device_put(g, NamedSharding(mesh, specs[name])) for name, g in gradients.items()}
        state = jax.jit(muon.init)(sharded)
        updates, state = jax.jit(muon.update)(sharded, state)
    for tree in (updates, optax.tree.get(state, "trace")):
        assert {name: jax.typeof(x).sharding for name, x in tree.items()} == {
            name: jax.typeof(x).sharding for name, x in sharded.items()
        }
    for name in WEIGHTS:
        np.testing.assert_allclose(updates[name], expected[name], atol=2e-5, err_msg=name)


def test_it_is_deterministic():
    gradients = random(3, np.float32)
    muon = scale_by_muon(0.95, 0.18, roles_of_weights())
    first, second = (jax.jit(muon.update)(gradients, muon.init(gradients))[0] for _ in range(2))
    assert all((first[name] == second[name]).all() for name in WEIGHTS)
