"""Compiler flags (LIBTPU_INIT_ARGS) that may make a run faster, by TPU generation.

No flag is set without `launch --libtpu-flags`. This project has timed none of them on a TPU: measure a step with and
without.

Most flags in old recipes are defaults by now. Some end the process: libtpu 0.0.50 refuses async-collective fusion of
all-gathers on every chip except v5e, and an unknown flag is fatal too. So a flag stands here only if the TPU compiler
accepts it (tests/tpu/test_flags.py compiles with each set, without a TPU).
"""

from __future__ import annotations

from tpu.accelerators import Generation

# generation -> flag -> why
FLAGS: dict[str, dict[str, str]] = {
    "v4": {},
    "v5e": {},
    "v5p": {},
    "v6e": {
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true": "gathers of sharded parameters run on the "
        "SparseCores, beside the matrix units",
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true": "likewise the sums of gradients",
    },
}


def libtpu_init_args(generation: Generation) -> str:
    return " ".join(FLAGS[generation.name])
