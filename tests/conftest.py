"""The pod in small: eight CPU devices, strict rank promotion, warnings are errors (pyproject.toml)."""

import gc
import os
import sys
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import pytest

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

KEPT = Path(__file__).parents[1] / ".pytest_cache"
PROGRAMS = KEPT / "programs"

if sys.dont_write_bytecode:
    # Every worker and every program that a test starts would compile the sources of jax anew, for some four seconds.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(KEPT / "bytecode")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}

pytest_plugins = "seeds"
MOST_MAPS = 20_000
MOST_KEPT = 2**30
"""Bytes of compiled programs. Those of code that has changed are never used again: the oldest are deleted."""


def pytest_sessionstart(session):
    """The process that only hands tests to workers does not import jax: they begin a second earlier."""
    if not hasattr(session.config, "workerinput"):
        forget_old_programs()
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        import jax

        jax.config.update("jax_numpy_rank_promotion", "raise")
        # Equal programs are compiled once, in this session and the next ones. Two processes may write and read the
        # same file at once: the reader then compiles for itself (the warning that pyproject.toml ignores).
        if jax.config.values["jax_compilation_cache_dir"] is None:
            jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def forget_old_programs():
    newest_first = sorted(PROGRAMS.glob("*"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file, size in zip(newest_first, accumulate(file.stat().st_size for file in newest_first), strict=True):
        if size > MOST_KEPT:
            file.unlink()


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """A compiled program holds some 13 memory maps. Linux gives a process 65,530, and beyond them XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


MESHES = {
    "expert, tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp, context, tensor": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "data, fsdp": {"data": 2, "fsdp": 4},
    "fsdp, expert": {"data": 1, "fsdp": 2, "expert": 4},
}
"""The first two cut every axis. The others, which cut one of them further, belong to the slow part."""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if i > 1 else ()) for i, name in enumerate(MESHES)])
def mesh(request):
    """Eight devices in different shapes."""
    from engram_jax.sharding import make_mesh

    return make_mesh(**MESHES[request.param])


@pytest.fixture
def key():
    import jax

    return jax.random.key(0)
