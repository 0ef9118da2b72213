"""The pod in small: eight CPU devices, strict rank promotion, warnings are errors (pyproject.toml)."""

import os
from importlib.metadata import version

# Most of the suite's time is compiling small programs once. Level 0 saves a third of it, one piece of code per program
# and jax 0.10's other emitters (later versions have none) half of the rest.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
pytest_plugins = "seeds"

MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """A compiled program holds some 13 memory maps. Linux gives a process 65,530, and beyond them XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


MESHES = {
    "data, fsdp": {"data": 2, "fsdp": 4},
    "fsdp, expert": {"data": 1, "fsdp": 2, "expert": 4},
    "expert, tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp, context, tensor": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


@pytest.fixture(params=MESHES)
def mesh(request):
    """Eight devices in different shapes, every axis but `data` cut in one of them at least."""
    from engram_jax.sharding import make_mesh

    return make_mesh(**MESHES[request.param])


@pytest.fixture
def key():
    return jax.random.key(0)
