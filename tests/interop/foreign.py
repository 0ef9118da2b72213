"""Checkpoints of others: their files, their hash in plain Python, and our reader over what was read of them."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx

from engram_jax.config import ModelConfig, OptimizerConfig
from engram_jax.layers.engram import EngramReader
from engram_jax.memory.quantized import FrozenFP8
from engram_jax.memory.store import MemoryStore
from engram_jax.registries import ROW_OPTIMIZERS

D, M, LAYER = 48, 4, 1
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 13)).astype(np.int32)
DTYPE = {
    np.dtype(np.float32): "float32",
    np.dtype(np.int64): "int64",
    np.dtype(np.uint8): "float8_e8m0fnu",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn",
}


def write(path, tensors):
    """By the safetensors library."""
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=DTYPE[x.dtype], shape=list(x.shape), data_ptr=x.ctypes.data, data_len=x.nbytes
        )
        for name, x in tensors.items()
    }
    safetensors.serialize_file(specs, path)


# --- the published hash, in Python's own integers ---


def next_primes(start, count, used):
    found = []
    for n in itertools.count(start + 1):
        if len(found) == count:
            return found
        if n not in used and all(n % p for p in range(2, int(n**0.5) + 1)):
            found.append(n)
            used.add(n)


def row_ids(history, multipliers, primes):
    """Rows of one token; `history[i]` is the (canonical) id i positions back."""
    ids, mix, offset = [], history[0] * multipliers[0], 0
    for order, sizes in enumerate(primes):
        mix ^= history[order + 1] * multipliers[order + 1]
        for prime in sizes:
            ids.append(offset + mix % prime)
            offset += prime
    return ids


# --- ours ---


def make_store(memory, frozen, shards=1):
    if frozen:
        return MemoryStore.create(
            memory.engram, memory.token_map, FrozenFP8(), row_dtype="float8_e4m3fn", shards=shards
        )
    optimizer = ROW_OPTIMIZERS["catch_up_adam"].create(OptimizerConfig(), np.full(3, 1e-3))
    return MemoryStore.create(memory.engram, memory.token_map, optimizer, shards=shards)


def our_update(memory, store, state, tokens, x_BTMD, segments=None):
    rows = jax.jit(lambda *ids: store.fetch(state, store.plan(*ids), 0))(tokens, segments)[str(LAYER)]
    config = ModelConfig(num_hidden_layers=4, engram=memory.engram, dtype="float32", **memory.model_settings)
    reader = jax.jit(lambda: EngramReader(config, rngs=nnx.Rngs(0)))()
    weights = memory.reader(str(LAYER))
    assert set(weights) == set(nnx.to_pure_dict(nnx.state(reader, nnx.Param)))
    for name, array in weights.items():
        assert getattr(reader, name).shape == array.shape
        getattr(reader, name)[...] = jnp.asarray(array)
    return jax.jit(lambda *arrays: reader(*arrays))(x_BTMD, rows, segments)
