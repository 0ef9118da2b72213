"""LIBTPU_INIT_ARGS worth a try, by TPU generation. None is set unless `launch --libtpu-flags` asks.

Most flags in old recipes are defaults by now, and some end the process: async-collective fusion of all-gathers, for
one, is refused by libtpu 0.0.50 on anything but v5e, and an unknown flag is fatal too. So a set stands here only if the
TPU compiler takes it (tests/tpu/test_flags.py compiles with each, without a TPU). None has been timed on a TPU by this
project: measure a step with and without.
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
