"""The TPU compiler takes every set of flags; an unknown one would end the run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpu.accelerators import GENERATIONS
from tpu.flags import FLAGS, libtpu_init_args

TOPOLOGIES = {"v4": "v4:2x2x4", "v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:2x4"}


def test_every_flag_has_a_reason():
    assert FLAGS.keys() == GENERATIONS.keys()
    assert all(flag.startswith("--xla_") and why for flags in FLAGS.values() for flag, why in flags.items())


def compile_with(flags: str, generation: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"TPU_LOG_DIR": "disabled", "LIBTPU_INIT_ARGS": flags}
    command = [sys.executable, str(Path(__file__).with_name("tpu_flags_aot.py")), TOPOLOGIES[generation]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: jax[tpu]")
@pytest.mark.parametrize("generation", [name for name, flags in FLAGS.items() if flags])
def test_the_compiler_takes_the_flags(generation):
    done = compile_with(libtpu_init_args(GENERATIONS[generation]), generation)
    assert done.returncode == 0 and int(done.stdout.splitlines()[-1]) > 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: jax[tpu]")
def test_the_test_would_notice_an_unknown_flag():
    assert "Unknown command line flag" in compile_with("--xla_no_such_flag=1", "v6e").stderr
