"""Windows, masks and rotations beyond 4,096 positions are those of short sequences: against loops in Python.

Legend: T positions of a row of several documents, some longer than 4,096 and some that begin there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import AttentionConfig, EngramConfig, OptimizerConfig, YarnConfig
from engram_jax.layers.attention import attend, causal_mask
from engram_jax.layers.rope import rope, softmax_scale
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.row_optimizers import FrozenRows
from engram_jax.memory.store import MemoryStore
from engram_jax.sharding import make_mesh, spec

pytestmark = pytest.mark.newest

T = 4608
LENGTHS = (4097, 1, 2, 508)  # documents of the first row; the second is one document


@pytest.fixture(scope="module")
def row():
    """segment ids and positions of both rows: int32 [2, T]."""
    segments = np.stack([np.repeat(np.arange(1, 5), LENGTHS), np.ones(T, int)])
    positions = np.stack([np.concatenate([np.arange(n) for n in LENGTHS]), np.arange(T)])
    return segments.astype(np.int32), positions.astype(np.int32)


def window_rows(constants, layer, tokens, segments, t):
    """The rows that position t reads, in Python integers."""
    window = [
        int(tokens[t - s]) if t >= s and segments[t - s] == segments[t] else constants.pad_id
        for s in range(len(constants.multipliers[layer]))
    ]
    heads, offset = [], 0
    for order, primes in enumerate(constants.primes[layer], start=2):
        mix = 0
        for token, multiplier in zip(window[:order], constants.multipliers[layer], strict=False):
            mix ^= token * multiplier
        for prime in primes:
            heads.append(offset + mix % prime)
            offset += prime
    return heads


@pytest.mark.parametrize("context", [1, 4])
def test_ngram_rows_at_every_position(row, context, rng):
    config = EngramConfig(engram_layer_ids=(1, 3), engram_n_heads=4, engram_vocab_size=(3001, 50_021))
    rule = FrozenRows.create(OptimizerConfig(), np.ones(1))
    mesh = make_mesh(1, devices=jax.devices()[:context], context=context)
    store = MemoryStore.create(config, TokenMap.identity(129_280), rule, shards=mesh.size)
    segments, _ = row
    tokens = rng.integers(0, 129_280, (2, T)).astype(np.int32)
    with jax.set_mesh(mesh):
        placed = jax.device_put((tokens, segments), jax.NamedSharding(mesh, spec("batch", "seq")))  # type: ignore[arg-type]
        plan = jax.jit(store.plan)(*placed)
    for i, layer in enumerate(store.layers):
        got = np.asarray(plan[layer].ids_BTH)
        for b in range(2):
            expected = [window_rows(store.constants, i, tokens[b], segments[b], t) for t in range(T)]
            np.testing.assert_array_equal(got[b], expected)


def test_the_mask_at_every_query(row):
    segments, _ = row
    mask = np.asarray(causal_mask(T, jnp.asarray(segments)))
    for b in range(2):
        begins = {s: int(np.argmax(segments[b] == s)) for s in set(segments[b].tolist())}
        for t in range(T):
            first = begins[int(segments[b, t])]
            assert mask[b, t, first : t + 1].all() and mask[b, t].sum() == t + 1 - first


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_attention_at_far_positions(row, factor, rng):
    """Queries around 4,096 and at the end: a softmax over their own document, keys rotated by complex numbers."""
    config = AttentionConfig(
        qk_nope_head_dim=0, qk_rope_head_dim=4, yarn=YarnConfig(factor, mscale=1.0, mscale_all_dim=1.0)
    )
    segments, positions = row
    q, k, v = rng.normal(size=(3, 2, T, 1, 4))
    with jax.enable_x64(True):
        q_pe, k_pe = (rope(jnp.asarray(x), jnp.asarray(positions), config) for x in (q, k))
        y = np.asarray(attend(q_pe, k_pe, jnp.asarray(v), jnp.asarray(segments), softmax_scale(config)))

    # Of two pairs, theta 1e4: the first turns once in 6.3 positions and stays, the second in 628 and lies on the ramp.
    low, high = 0, math.ceil(4 * math.log(4096 / (2 * math.pi)) / (2 * math.log(1e4)))
    slowed = (np.arange(2) - low) / (high - low)
    frequency = 1e4 ** (-np.arange(2) / 2) * (1 - slowed + slowed / factor)
    temperature = (0.1 * math.log(factor) + 1) ** 2 / math.sqrt(4)

    def rotated(x, b, t):
        return (x[b, t, 0, :2] + 1j * x[b, t, 0, 2:]) * np.exp(1j * positions[b, t] * frequency)

    for b, t in [(0, 4094), (0, 4096), (0, 4097), (0, 4099), (0, T - 1), (1, 4095), (1, 4096), (1, T - 1)]:
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        keys = np.array([rotated(k, b, s) for s in seen])
        scores = temperature * np.real(keys @ np.conj(rotated(q, b, t)))
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(y[b, t, 0], weights @ v[b, seen, 0] / weights.sum(), rtol=0, atol=1e-9)
