"""N-gram hashing on the device against NumPy, for the published sizes. Run: python -m benchmarks.hashing [SEED]"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import header, time_median
from engram_jax.config import EngramConfig
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import hash_constants, ngram_row_ids, ngram_row_ids_numpy

CONFIGS = {
    "engram_27b, 16 heads": EngramConfig(engram_layer_ids=(1,)),
    "deepseek_v41, 24 heads": EngramConfig(
        engram_layer_ids=(1,), engram_variant="deepseek_v41", engram_max_ngram_size=4, engram_vocab_size=16_000_000
    ),
}


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    header()
    print(f"seed      {seed}")
    print(f"{'':24}{'tokens':>8}{'numpy ms':>10}{'jax ms':>8}{'numpy / jax':>13}")
    on_device = jax.jit(ngram_row_ids, static_argnums=(0, 1))
    token_map = TokenMap.identity(99_092)
    for name, config in CONFIGS.items():
        constants = hash_constants(config, token_map)
        for batch, length in ((1, 128), (8, 512), (16, 4096)):
            ids = np.random.default_rng(seed).integers(0, token_map.size, (batch, length), np.int32)
            host = time_median(partial(ngram_row_ids_numpy, constants, 1, ids))
            device = time_median(partial(on_device, constants, 1, jnp.asarray(ids)))
            print(f"{name:24}{ids.size:8}{1e3 * host:10.2f}{1e3 * device:8.2f}{host / device:12.1f}x")


if __name__ == "__main__":
    main()
