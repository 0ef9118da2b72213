"""Which transport a slice gets; what they move is tested with the store and with routed experts."""

import pytest

from engram_jax.transports import default_transport


@pytest.mark.parametrize(
    ("kind", "devices", "ragged"),
    [
        ("TPU v5", 64, True),
        ("TPU v5 lite", 16, True),
        ("TPU v5 lite", 64, False),
        ("TPU v6 lite", 256, True),
        ("cpu", 8, False),
        ("NVIDIA H100 80GB HBM3", 8, False),
    ],
)
def test_ragged_where_the_network_can(kind, devices, ragged):
    assert default_transport(kind, devices) == ("ragged_all_to_all" if ragged else "all_to_all")
