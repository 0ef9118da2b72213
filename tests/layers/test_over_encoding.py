"""OverEncoding against the average written out from tokens and tables, through the store's own look-up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, ConfigError, EngramConfig, ModelConfig
from engram_jax.layers.reader import RecordingReader, reader_class
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.row_optimizers import FrozenRows
from engram_jax.memory.store import MemoryStore
from engram_jax.model import Model, split
from engram_jax.sharding import make_mesh, spec

pytestmark = pytest.mark.newest

CONFIG = ModelConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=1,
    intermediate_size=8,
    attention=AttentionConfig(
        num_attention_heads=1, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2, kv_lora_rank=2
    ),
    engram=EngramConfig(
        engram_variant="over_encoding",
        engram_layer_ids=(0,),
        engram_kernel_size=0,
        engram_n_heads=2,
        engram_head_dim=3,
        engram_vocab_size=40,
        engram_amplification=3.0,
    ),
    hc_mult=2,
    dtype="float32",
)
SIZES = (41, 43, 47, 53)  # primes from 40 on: two slices of 2-grams, then two of 3-grams


def average(tokens, segments, embedding, table, projections):
    """3 (E[t] + the four projected rows) / 5 at every position, token by token in NumPy."""
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    out = np.zeros((*tokens.shape, embedding.shape[1]))
    for b, t in np.ndindex(*tokens.shape):
        total = embedding[tokens[b, t]].copy()
        for i in range(4):
            number = 0
            for back in range(2 if i < 2 else 3):
                inside = t - back >= 0 and segments[b, t - back] == segments[b, t]
                number += int(tokens[b, t - back]) * 30**back if inside else 0
            total += table[offsets[i] + number % SIZES[i]] @ projections[i]
        out[b, t] = 3 * total / 5
    return out


def test_the_input_is_the_average_of_the_vocabulary_and_the_slices(rng):
    store = MemoryStore.create(CONFIG.engram, TokenMap.identity(30), FrozenRows(), init_std=1.0)
    memory = store.init(jax.random.key(rng.integers(1 << 30)))
    graphdef, params, buffers = split(jax.jit(lambda key: Model(CONFIG, key))(jax.random.key(rng.integers(1 << 30))))
    model = nnx.merge(graphdef, params, buffers)
    tokens = rng.integers(0, 30, (2, 7)).astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    rows = jax.jit(lambda *ids: store.fetch(memory, store.plan(*ids), 0))(tokens, segments)["0"]
    table = np.asarray(store.materialize(memory, 0)["0"])
    assert table.shape == (sum(SIZES), 3)
    read = jax.jit(lambda x, rows: model.engram["0"](x, rows))
    x = jax.jit(model.embed)(tokens)
    got = np.asarray(x) + np.asarray(read(x, rows))
    arrays = (np.asarray(params["embedding_vd"]), table, np.asarray(params["engram"]["0"]["slice_hed"]))
    expected = average(tokens, segments, *arrays)
    for stream in range(2):
        np.testing.assert_allclose(got[:, :, stream], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(read(x, jnp.zeros_like(rows)))
    assert np.std(arrays[2]) == pytest.approx(3**-0.5, rel=0.3)


def test_gradients_reach_rows_projections_and_embeddings(rng):
    """The average is linear in each, so its gradient is the other factor."""
    graphdef, params, buffers = split(jax.jit(lambda key: Model(CONFIG, key))(jax.random.key(0)))
    tokens, rows = jnp.array([[4, 9]], jnp.int32), jnp.asarray(rng.normal(size=(1, 2, 4, 3)), jnp.float32)
    weight = rng.normal(size=(1, 2, 2, 16)).astype(np.float32)

    def output(params, rows):
        model = nnx.merge(graphdef, params, buffers)
        x = model.embed(tokens)
        return jnp.sum(weight * (x + model.engram["0"](x, rows)))

    grads, d_rows = jax.jit(jax.grad(output, argnums=(0, 1)))(params, rows)
    d_input = 3 * weight.sum(2)[0] / 5  # [T, D]
    projections = np.asarray(params["engram"]["0"]["slice_hed"])
    np.testing.assert_allclose(d_rows[0], np.einsum("td,hed->the", d_input, projections), rtol=1e-4, atol=1e-5)
    expected = np.einsum("td,the->hed", d_input, rows[0])
    np.testing.assert_allclose(grads["engram"]["0"]["slice_hed"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(grads["embedding_vd"])[[4, 9]], d_input, rtol=1e-5, atol=1e-6)


def test_a_mesh_gives_the_single_device_update(rng):
    x, rows = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 8, 2, 16), (4, 8, 4, 3)))

    def update(x, rows):
        return jax.jit(lambda reader, x, rows: reader(x, rows))(
            reader_class(CONFIG.engram)(CONFIG, rngs=nnx.Rngs(0)), x, rows
        )

    expected = update(jnp.asarray(x), jnp.asarray(rows))
    mesh = make_mesh(data=1, fsdp=2, context=2, tensor=2)
    with jax.set_mesh(mesh):
        arrays = jax.device_put((x, rows), jax.NamedSharding(mesh, spec("batch", "seq")))
        np.testing.assert_allclose(update(*arrays), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"engram_layer_ids": (1,)},
        {"engram_layer_ids": (0, 1)},
        {"engram_kernel_size": 4},
        {"engram_bias": True},
        {"engram_without": ("gate",)},
    ],
    ids=str,
)
def test_what_it_does_not_have_is_refused(change):
    (name, value), *_ = change.items()
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(CONFIG.engram, **change)
    assert f"{name}={value}" in str(error.value) and "over_encoding" in str(error.value)


def test_it_has_no_gates_to_record():
    assert not CONFIG.engram.has_gates
    with pytest.raises(ConfigError, match="OverEncoding has no gates"):
        RecordingReader(reader_class(CONFIG.engram)(CONFIG, rngs=nnx.Rngs(0)))


def test_published_is_the_plain_average():
    published = dataclasses.replace(CONFIG.engram, engram_amplification=1.0)
    assert published.vocab_share == pytest.approx(1 / 5)
    with pytest.raises(ConfigError, match=r"engram_amplification=3.0 has no effect with engram_variant='paper'"):
        EngramConfig(engram_amplification=3.0)
    with pytest.raises(ConfigError, match=r"engram_amplification=0.0 must be positive"):
        dataclasses.replace(CONFIG.engram, engram_amplification=0.0)
