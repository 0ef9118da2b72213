"""The mesh and the one table from logical names to its axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.sharding import BATCH, LOGICAL_TO_MESH, MESH_AXES, make_mesh, spec


def test_the_tests_have_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1, 1, 1)),
        ({"fsdp": 2, "expert": 2}, (2, 2, 2, 1, 1)),
        ({"context": 2, "tensor": 4}, (1, 1, 1, 2, 4)),
    ],
)
def test_a_mesh_uses_every_device(arguments, shape):
    mesh = make_mesh(**arguments)
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, shape, strict=True))
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    assert make_mesh(devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"expert": 3},
        {"tensor": 0},
        {"fsdp": 3},
        {"fsdp": 16},
        {"data": 4},
        {"data": 2, "fsdp": 2},
        {"data": 0, "fsdp": 8},
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(arguments):
    with pytest.raises(ValueError, match=r"does not use all 8 devices: set train\.mesh_fsdp .* to factors of 8"):
        make_mesh(**arguments)


def test_spec_is_none_outside_a_mesh():
    assert spec("batch", "seq") is None
    assert jnp.ones((3,), out_sharding=spec("embed")).shape == (3,)


def test_spec_names_mesh_axes():
    with jax.set_mesh(make_mesh(fsdp=4)):
        assert spec("batch", "seq", "act") == P(BATCH, "context", None)
        assert spec("embed", None) == P(("fsdp", "context", "expert"), None)
        with pytest.raises(KeyError):
            spec("embedding")


def test_the_table_names_mesh_axes_only():
    axes = {
        axis for value in LOGICAL_TO_MESH.values() if value for axis in ([value] if isinstance(value, str) else value)
    }
    assert axes == set(MESH_AXES)


def test_a_contraction_says_where_its_result_lies():
    """Without a mesh the same line runs unsharded; on it, the sharded dim is gathered or summed as the spec says."""

    def project(x_bd, weight_df):
        return jnp.einsum("bd,df->bf", x_bd, weight_df, out_sharding=spec("batch", "act"))

    x, weight = jax.random.normal(jax.random.key(0), (16, 8)), jax.random.normal(jax.random.key(1), (8, 4))
    expected = project(x, weight)
    mesh = make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        sharded = jax.jit(project)(jax.device_put(x, P(BATCH)), jax.device_put(weight, P("fsdp")))
    assert sharded.sharding == NamedSharding(mesh, P(BATCH, None))
    assert jnp.allclose(jax.device_get(sharded), expected, atol=1e-6)
