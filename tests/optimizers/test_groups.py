from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.config import EngramConfig, ModelConfig, OptimizerConfig
from engram_jax.optimizers.groups import make_optimizer, parameter_roles
from engram_jax.optimizers.muon import scale_by_muon
from engram_jax.optimizers.roles import roles
from engram_jax.registries import ATTENTION
from engram_jax.variants.weights import WeightSpec

ROLES = roles(ModelConfig(engram=EngramConfig(engram_layer_ids=(0,))))
CONFIG = OptimizerConfig(learning_rate=2e-3, weight_decay=0.1)


def random_params(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding_vd": (32, 8),
        "head_dv": (8, 32),
        "final_norm": {"gain": (8,)},
        "blocks": {
            "00-01": {"moe": {"gate_edf": (2, 3, 8, 6)}, "attn_hc": {"phi_pre_cm": (2, 16, 2), "alpha": (2, 3)}}
        },
        "engram": {"1": {"key_value_emd": (12, 3, 8), "conv_kmd": (4, 2, 8)}},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def trajectory(config, params, gradients):
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate), params, ROLES)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw_numpy(param, gradients, weight_decay):
    param, m, v = param.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-20)
        param = param - 2e-3 * (step + weight_decay * param)
    return param


def numpy_at(tree, *path):
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


ADAMW_LEAVES = {
    ("embedding_vd",): 0.1,
    ("head_dv",): 0.1,
    ("final_norm", "gain"): 0.0,
    ("blocks", "00-01", "attn_hc", "alpha"): 0.0,
    ("engram", "1", "conv_kmd"): 0.0,
}
MATRIX_LEAVES = [
    ("blocks", "00-01", "moe", "gate_edf"),
    ("blocks", "00-01", "attn_hc", "phi_pre_cm"),
    ("engram", "1", "key_value_emd"),
]


@pytest.fixture(scope="module")
def problem():
    return random_params(0), [random_params(seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def moved(problem):
    """The parameters after three steps of Muon and AdamW."""
    return trajectory(CONFIG, *problem)


@pytest.mark.parametrize(("path", "weight_decay"), ADAMW_LEAVES.items())
def test_embeddings_and_vectors_follow_adamw(problem, moved, path, weight_decay):
    params, gradients = problem
    expected = adamw_numpy(numpy_at(params, *path), [numpy_at(g, *path) for g in gradients], weight_decay)
    np.testing.assert_allclose(numpy_at(moved, *path), expected, rtol=1e-5, atol=1e-6)


def test_without_muon_matrices_follow_adamw(problem):
    params, gradients = problem
    moved = trajectory(OptimizerConfig(learning_rate=2e-3, matrix_optimizer="adamw"), *problem)
    for path in MATRIX_LEAVES:
        expected = adamw_numpy(numpy_at(params, *path), [numpy_at(g, *path) for g in gradients], 0.1)
        np.testing.assert_allclose(numpy_at(moved, *path), expected, rtol=1e-5, atol=1e-6)


def test_matrices_follow_muon_with_decay(problem, moved):
    params, gradients = problem
    for path in MATRIX_LEAVES:
        muon = scale_by_muon(0.95, 0.18, ROLES[path[-1]])
        expected = numpy_at(params, *path)
        state = muon.init(expected)
        for gradient in gradients:
            update, state = jax.jit(muon.update)(numpy_at(gradient, *path), state)
            expected = expected - 2e-3 * (np.asarray(update) + 0.1 * expected)
        np.testing.assert_allclose(numpy_at(moved, *path), expected, rtol=1e-4, atol=1e-5)


def test_every_leaf_has_one_role():
    kinds = jax.tree.map(lambda role: role.kind, parameter_roles(random_params(0), ROLES))
    assert kinds == {
        "embedding_vd": "embedding",
        "head_dv": "embedding",
        "final_norm": {"gain": "vector"},
        "blocks": {"00-01": {"moe": {"gate_edf": "matrix"}, "attn_hc": {"phi_pre_cm": "matrix", "alpha": "vector"}}},
        "engram": {"1": {"key_value_emd": "matrix", "conv_kmd": "vector"}},
    }


def test_an_unknown_leaf_is_named():
    params = random_params(0) | {"adapter": {"gate_dff": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=r"\['adapter'\]\['gate_dff'\] has no role.*nearest: gate_"):
        make_optimizer(CONFIG, optax.constant_schedule(1e-3), params)


def test_roles_that_contradict_are_named(monkeypatch):
    weight = partial(WeightSpec, group="attention", file="x.weight")
    for declared, message in (
        (weight("w_xy", (2, 3), "x->z", layout="xy->x,y", dims=(None, None), start=0.1), r"w_xy: role='x->z' must be"),
        (weight("norm.gain", (2,), "embedding", layout="x->x"), r"norm\.gain: role='embedding' is not the role of"),
    ):
        monkeypatch.setattr(type(ATTENTION["mla"]), "weights", lambda self, config, found=declared: [found])
        with pytest.raises(ValueError, match=message):
            roles(ModelConfig())
    for changes, message in (
        ({"shape": (2,)}, r"weight w_xy: shape=\(2,\), layout='xy->x,y' and dims=\(None, None\) must agree"),
        ({"group": "attentoin"}, r"weight w_xy: group='attentoin' must be one of attention, "),
        ({"start": None}, r"weight w_xy: the layer makes it, so it needs `dims` and `start`"),
    ):
        given = {"shape": (2, 3), "role": "x->y", "layout": "xy->x,y", "dims": (None, None), "start": 0.1} | changes
        with pytest.raises(ValueError, match=message):
            weight("w_xy", **given)
