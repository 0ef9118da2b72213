"""Names of slices, and what a wrong one gets."""

import pytest

from engram_jax.aot.chips import CHIPS, topology
from engram_jax.config import ConfigError


@pytest.mark.parametrize(
    ("name", "libtpu", "chips", "devices", "hosts"),
    [
        ("v5p-64", "v5p:4x4x4", 64, 64, 16),
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64, 16),
        ("v5p-128", "v5p:4x4x8", 128, 128, 32),
        ("v4-32", "v4:2x4x4", 32, 32, 8),
        ("v5e-256", "v5e:16x16", 256, 256, 64),
        ("v6e-8", "v6e:2x4", 8, 8, 2),
        ("7x-64", "tpu7x:4x4x4", 64, 128, 16),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8, 1),
        ("V5P:2x2", "v5p:2x2x1", 4, 4, 1),
        ("v5p:4x8x12", "v5p:4x8x12", 384, 384, 96),
    ],
)
def test_names_mean_chips(name, libtpu, chips, devices, hosts):
    where = topology(name)
    assert (where.libtpu, where.chips, where.devices, where.hosts) == (libtpu, chips, devices, hosts)


def test_slices_multiply():
    where = topology("v6e-16", slices=4)
    assert (where.chips, where.hosts, where.name) == (64, 16, "v6e-16-x4")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9-64", "v4, v5e, v5p, v6e, 7x"),
        ("v5p", "v5p-64 or v5p:4x4x4"),
        ("v5p-96", "v5p-128 = 4x4x8"),
        ("v5p:4x4x6", "multiples of 4"),
        ("v5p:8x4x4", "4x4x8"),
        ("v5e:4x4x4", "v5e-16 = 4x4"),
        ("v5e:32x8", "v5e-256 = 16x16"),
        ("v6e-512", "v6e-256"),
        ("v5p:24x24x24", "6144"),
        ("v4:16x16x20", "4096"),
    ],
)
def test_a_name_that_is_no_slice_gets_the_slices_there_are(name, said):
    with pytest.raises(ConfigError, match=said):
        topology(name)


def test_slices_are_positive():
    with pytest.raises(ConfigError, match="--slices 0"):
        topology("v5e-4", slices=0)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_usual_slice_has_both_names(chip):
    for shape in chip.usual:
        where = topology(f"{chip.name}:{shape}")
        assert topology(where.name) == where
        assert where.chips <= chip.max_chips
