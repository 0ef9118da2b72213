"""Where the extra tpu is installed and no TPU is there, libtpu stays unloaded and silent."""

import importlib.util
import os
import subprocess
import sys

import pytest

from engram_jax.aot.child import ENVIRONMENT
from engram_jax.commands import platforms


def card(root, number, vendor, device):
    folder = root / "sys/bus/pci/devices" / f"0000:00:0{number}.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def test_a_tpu_is_a_device_file_or_an_unknown_card_of_googles(tmp_path):
    assert not platforms.has_tpu(tmp_path)
    card(tmp_path, 1, "0x8086", "0x0063")  # another vendor's
    card(tmp_path, 2, "0x1ae0", "0x0042")  # the network card of Google's virtual machines
    assert not platforms.has_tpu(tmp_path)
    card(tmp_path, 3, "0x1ae0", "0x0063")
    assert platforms.has_tpu(tmp_path)


@pytest.mark.parametrize("file", ["dev/accel0", "dev/vfio/0"])
def test_device_files_count(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert platforms.has_tpu(tmp_path)


@pytest.mark.parametrize(
    ("libtpu", "tpu", "gpus", "set_by_user", "chosen"),
    [
        (True, False, (), None, "cpu"),
        (False, False, (), None, None),
        (True, True, (), None, None),
        (True, False, ("xla_cuda13",), None, None),
        (True, False, (), "tpu,cpu", "tpu,cpu"),
    ],
)
def test_the_cpu_is_chosen_only_where_libtpu_is_the_only_accelerator_and_useless(
    monkeypatch, libtpu, tpu, gpus, set_by_user, chosen
):
    monkeypatch.setattr(platforms, "find_spec", lambda name: object() if libtpu else None)
    monkeypatch.setattr(platforms, "entry_points", lambda group: gpus)
    monkeypatch.setattr(platforms, "has_tpu", lambda root: tpu)
    monkeypatch.setenv("JAX_PLATFORMS", set_by_user or "")
    if set_by_user is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    platforms.leave_out_libtpu()
    assert os.environ.get("JAX_PLATFORMS") == chosen


COMMAND = """
from engram_jax.commands.command_line import exit_status
def devices():
    import jax
    print(jax.devices()[0].platform)
    return 0
exit_status(devices)
"""
DESCRIBE = """
from jax.experimental import topologies
print(len(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra dev --extra tpu")
@pytest.mark.parametrize(("program", "variables", "said"), [(COMMAND, {}, "cpu\n"), (DESCRIBE, ENVIRONMENT, "16\n")])
def test_libtpu_says_nothing_on_a_machine_without_a_tpu(program, variables, said):
    own = ("JAX_", "XLA_", "TPU_", "TF_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)} | variables
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
