"""The whole training step, compiled for real TPU topologies: where the tables lie and what else is as large as they."""

import importlib.util

import pytest
from train_step_aot import compiled_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra dev --extra tpu"
    ),
]


@pytest.mark.parametrize("topology", ["v5p:2x2x2", "v6e:2x4"])
def test_host_tables_never_visit_the_chip(topology):
    step = compiled_step(topology, "host")
    assert step["table"] > 26e9
    assert 0 <= step["host_argument"] - step["table"] < 1e6
    assert step["host_alias"] == step["host_output"] == step["host_argument"]  # updated in place
    assert step["host_temp"] == 0 and step["tiled"] == []
    assert step["device_temp"] < 0.01 * step["table"]  # activations included
    assert step["collectives"]["ragged-all-to-all"] == 2  # rows out, gradients back


def test_tables_on_the_chip_fill_whole_lines_and_are_not_copied():
    step = compiled_step("v5p:2x2x2", "device")
    assert step["device_argument"] < 1.01 * step["table"] * 256 / (3 * 64 + 2)  # the words of a record
    assert step["device_alias"] > 0.99 * step["device_argument"]
    assert step["device_temp"] < 0.01 * step["table"]
