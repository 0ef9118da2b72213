"""Small checkpoints in the layouts of DeepSeek-V4.1 and Qwen, against the published equations in NumPy."""

import functools
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax import nnx
from tokenizers import Tokenizer

from engram_jax.config import ConfigError, ModelConfig, OptimizerConfig
from engram_jax.interop import deepseek_v41, qwen_ple, shards, table_sources
from engram_jax.layers.engram import EngramReader
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.quantized import FrozenFP8
from engram_jax.memory.row_optimizers import ROW_OPTIMIZERS
from engram_jax.memory.store import MemoryStore
from engram_jax.training.errors import RunError

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


# --- DeepSeek-V4.1 ---

V41 = {
    "engram_layer_ids": [LAYER, 3],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_vocab_size": 60,
    "engram_pad_token_id": 2,
    "hidden_size": D,
    "hc_mult": M,
    "rms_norm_eps": 1e-20,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def v41(tmp_path_factory, tokenizer_file):
    """The folder and what was written to it."""
    folder, rng = tmp_path_factory.mktemp("v41"), np.random.default_rng(1)
    canonical = TokenMap.from_tokenizer(Tokenizer.from_file(str(tokenizer_file))).canonical_ids
    size, used, primes, multipliers = int(canonical.max()) + 1, set(), {}, {}
    for layer in V41["engram_layer_ids"]:
        primes[layer] = [next_primes(59, 2, used) for _ in range(3)]
        bound = (2**63 - 1) // size // 2
        draw = np.random.default_rng(10007 * layer).integers(0, bound, 4, dtype=np.int64)
        multipliers[layer] = [2 * int(r) + 1 for r in draw]
    width, memory = V41["engram_head_dim"], 3 * 2 * 64
    tensors, tables = {}, {}
    for layer in V41["engram_layer_ids"]:
        rows = sum(sum(sizes) for sizes in primes[layer])
        codes = rng.normal(0, 40, (rows, width)).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.integers(115, 122, (rows, width // 32)).astype(np.uint8)
        wkv = rng.normal(0, 40, ((M + 1) * D, memory)).astype(ml_dtypes.float8_e4m3fn)
        wkv_scales = rng.integers(112, 118, (-(-wkv.shape[0] // 32), memory // 32)).astype(np.uint8)
        names = f"model.language_model.layers.{layer}.engram"
        tensors |= {
            f"{names}.embed.weight": codes,
            f"{names}.embed.scale": scales,
            f"{names}.wkv.weight": wkv,
            f"{names}.wkv.scale": wkv_scales,
            f"{names}.q_weight": rng.normal(1, 0.2, (M, D)).astype(np.float32),
            f"{names}.k_weight": rng.normal(1, 0.2, (M, D)).astype(ml_dtypes.bfloat16),
            f"model.language_model.layers.{layer}.self_attn.wq_a.weight": np.zeros((2, 2), np.float32),
        }
        factors = 2.0 ** (scales.astype(np.float64) - 127)
        tables[layer] = codes.astype(np.float64) * factors.repeat(32, 1)
        spread = (2.0 ** (wkv_scales.astype(np.float64) - 127)).repeat(32, 0).repeat(32, 1)[: len(wkv)]
        tables[layer, "wkv"] = wkv.astype(np.float64) * spread
    # Two files, the table of layer 1 in the second.
    late = [name for name in tensors if name.endswith("1.engram.embed.weight")]
    files = {
        "model-00001-of-00002.safetensors": [name for name in tensors if name not in late],
        "model-00002-of-00002.safetensors": late,
    }
    for file, names in files.items():
        write(folder / file, {name: tensors[name] for name in names})
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / shards.INDEX).write_text(json.dumps(index))
    totals = [sum(map(sum, primes[layer])) for layer in V41["engram_layer_ids"]]
    text = V41 | {"engram_num_embeddings": totals, "engram_compressed_vocab_size": size}
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    return SimpleNamespace(
        folder=folder, tensors=tensors, tables=tables, primes=primes, multipliers=multipliers, canonical=canonical
    )


def v41_update(v41, x_BTMD):
    """gate * value for every stream, as field notes give the released code, in float64."""
    tokens, name = v41.canonical[TOKENS], f"model.language_model.layers.{LAYER}.engram"
    pad = int(v41.canonical[2])
    update = np.zeros(x_BTMD.shape)
    gains = v41.tensors[f"{name}.q_weight"].astype(np.float64) * v41.tensors[f"{name}.k_weight"].astype(np.float64)
    for b, t in np.ndindex(*tokens.shape):
        history = [int(tokens[b, t - i]) if t >= i else pad for i in range(4)]
        rows = v41.tables[LAYER][row_ids(history, v41.multipliers[LAYER], v41.primes[LAYER])]
        projected = (v41.tables[LAYER, "wkv"] @ rows.ravel()).reshape(M + 1, D)
        for m in range(M):
            x, key, value = x_BTMD[b, t, m].astype(np.float64), projected[m], projected[-1]
            rstd = ((x**2).mean() + 1e-20) ** -0.5 * ((key**2).mean() + 1e-20) ** -0.5
            dot = (x * key * gains[m]).sum() * rstd * D**-0.5
            score = np.copysign(np.sqrt(max(abs(dot), 1e-6)), dot)
            update[b, t, m] = value / (1 + np.exp(-score))
    return update


def make_store(memory, frozen, shards=1):
    if frozen:
        return MemoryStore.create(
            memory.engram, memory.token_map, FrozenFP8(), row_dtype="float8_e4m3fn", shards=shards
        )
    optimizer = ROW_OPTIMIZERS["catch_up_adam"].create(OptimizerConfig(), np.full(3, 1e-3))
    return MemoryStore.create(memory.engram, memory.token_map, optimizer, shards=shards)


def our_update(memory, store, state, tokens, x_BTMD, segments=None):
    rows = store.fetch(state, store.plan(jnp.asarray(tokens), segments), 0)[str(LAYER)]
    config = ModelConfig(num_hidden_layers=4, engram=memory.engram, dtype="float32", **memory.model_settings)
    reader = EngramReader(config, rngs=nnx.Rngs(0))
    weights = memory.reader(str(LAYER))
    assert set(weights) == set(nnx.to_pure_dict(nnx.state(reader, nnx.Param)))
    for name, array in weights.items():
        assert getattr(reader, name).shape == array.shape
        getattr(reader, name)[...] = jnp.asarray(array)
    return reader(jnp.asarray(x_BTMD), rows, segments)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen FP8", "trainable"])
def test_v41_reads_as_published(v41, frozen):
    memory = deepseek_v41.open_memory(v41.folder)
    store = make_store(memory, frozen)
    state = memory.load(store)
    x_BTMD = np.random.default_rng(2).normal(size=(*TOKENS.shape, M, D)).astype(np.float32)
    ours = our_update(memory, store, state, TOKENS, x_BTMD)
    expected = v41_update(v41, x_BTMD)
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())
    for layer, rows in store.materialize(state, 0).items():
        np.testing.assert_array_equal(rows, v41.tables[int(layer)])


def test_v41_bytes_are_kept_and_read_once(v41, monkeypatch):
    """On two by four devices, in chunks smaller than a table: the file's bytes, each read once."""
    read, rows_of = [], shards.Tensor.rows

    def rows(self, start, count):
        read.append((self.name, count))
        return rows_of(self, start, count)

    monkeypatch.setattr(shards.Tensor, "rows", rows)
    monkeypatch.setattr(table_sources, "filled", functools.partial(table_sources.filled, count=8))
    memory = deepseek_v41.open_memory(v41.folder)
    store = make_store(memory, True, shards=8)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        state = memory.load(store)
    for layer, table in state.tables.items():
        name = f"model.language_model.layers.{layer}.engram.embed"
        order = store.layouts[layer].logical_order()
        for array, file in ((table.rows, f"{name}.weight"), (table.slots["scale"], f"{name}.scale")):
            expected = v41.tensors[file]
            np.testing.assert_array_equal(np.asarray(array)[order].view(np.uint8), expected.view(np.uint8))
            assert sum(count for tensor, count in read if tensor == file) == len(expected)
    assert max(count for _, count in read) <= 8


@pytest.fixture
def changed(v41, tmp_path):
    """`changed(edit, settings)`: a copy in one file, with tensors and text settings changed."""

    def copy(edit=lambda tensors: None, **settings):
        tensors = dict(v41.tensors)
        edit(tensors)
        write(tmp_path / "model.safetensors", tensors)
        config = json.loads((v41.folder / "config.json").read_text())
        config["text_config"] |= settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        shutil.copyfile(v41.folder / "tokenizer.json", tmp_path / "tokenizer.json")
        return tmp_path

    return copy


NAME = f"model.language_model.layers.{LAYER}.engram"
WRONG_V41 = {
    "another number of rows": (
        dict(edit=lambda t: t.update({f"{NAME}.embed.weight": t[f"{NAME}.embed.weight"][:-3]})),
        ConfigError,
        r"model\.safetensors: .*1\.engram\.embed\.weight has [\d,]+ rows .* config\.json makes it",
    ),
    "another total": (
        dict(engram_num_embeddings=[1, 2]),
        ConfigError,
        r"engram_num_embeddings differs .*\[1, 2\]",
    ),
    "another base": (dict(engram_vocab_size=70), ConfigError, r"engram_num_embeddings differs"),
    "another vocabulary": (dict(engram_compressed_vocab_size=5), ConfigError, r"engram_compressed_vocab_size=5"),
    "no scales": (
        dict(edit=lambda t: t.pop(f"{NAME}.embed.scale")),
        RunError,
        r"no tensor layers\.1\.engram\.embed\.scale",
    ),
    "scales of other blocks": (
        dict(edit=lambda t: t.update({f"{NAME}.embed.scale": t[f"{NAME}.embed.scale"][:, :1]})),
        ConfigError,
        r"embed\.scale is F8_E8M0",
    ),
    "no wkv scales": (
        dict(edit=lambda t: t.pop(f"{NAME}.wkv.scale")),
        RunError,
        r"no tensor layers\.1\.engram\.wkv\.scale or",
    ),
    "a convolution": (
        dict(edit=lambda t: t.update({f"{NAME}.conv1d.weight": np.zeros((4, 1, 4), np.float32)})),
        ConfigError,
        r"no biases and no convolution",
    ),
    "gains of another width": (
        dict(edit=lambda t: t.update({f"{NAME}.q_weight": np.zeros((M, D + 1), np.float32)})),
        ConfigError,
        r"q_weight is \[4, 49\], and config\.json makes it \[4, 48\]",
    ),
    "a missing setting": (dict(engram_head_dim=None), ConfigError, r"config\.json has no engram_head_dim"),
}


@pytest.mark.parametrize("name", WRONG_V41)
def test_what_is_not_v41_is_refused(changed, name):
    arguments, error, message = WRONG_V41[name]
    with pytest.raises(error, match=message):
        deepseek_v41.open_memory(changed(**arguments))


def test_table_of_another_store_is_refused(v41):
    memory = deepseek_v41.open_memory(v41.folder)
    other = replace(memory, engram=replace(memory.engram, engram_vocab_size=90))
    with pytest.raises(ConfigError, match="other hash constants"):
        memory.load(make_store(other, True))
    with pytest.raises(ConfigError, match=r"layer 1 is [\d,]+ x 64, and .* make it"):
        table_sources.load_tables(make_store(other, True), memory.sources)


def test_overridden_names(changed):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("embed.weight", "table.weight")] = tensors.pop(name)

    folder = changed(rename)
    with pytest.raises(RunError, match=r"no tensor layers\.1\.engram\.embed\.weight"):
        deepseek_v41.open_memory(folder)
    memory = deepseek_v41.open_memory(folder, deepseek_v41.Names(rows="layers.{layer}.engram.table.weight"))
    assert memory.sources["1"].head_dim == 64


# --- Qwen ---

QWEN = {
    "ple_layer_ids": [LAYER + 1],
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ple_embed_dim": 4 * 6,
    "ngram_vocab_size_base": 50,
    "eos_token_id": 1,
    "ple_conv_kernel_size": 4,
    "hc_count": M,
    "hidden_size": D,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "seed": 1234,
    "make_ngram_vocab_size_divisible_by": 16,
}
PARTS = 4


def splitmix(seed, count):
    """Outputs 2..count + 1 of the published generator."""
    mask, state, out = 2**64 - 1, seed, []
    for _ in range(count + 1):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out[1:]


def qwen_folder(folder, fp8=False, edit=lambda tensors: None, **settings):
    rng, name = np.random.default_rng(4), "model.layers.1.ple"
    primes = next_primes(49, 4, set())
    primes = [primes[:2], primes[2:]]
    bound = (2**63 - 1) // 300 // 2
    multipliers = [2 * (z % bound) + 1 for z in splitmix(1234, 3)]
    logical = sum(map(sum, primes))
    padded = -(-logical // 16) * 16
    table = rng.normal(size=(padded, 6)).astype(np.float32)
    bounds = np.linspace(0, padded, PARTS + 1).astype(int)
    tensors, exact = {}, []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        part, row_name = table[start:end], f"{name}.ple_embedding.ngram_embedding.shard_{i}"
        if fp8:
            scale = np.float32(np.abs(part).max() / 448)
            tensors[f"{row_name}.weight"] = (part / scale).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{row_name}.weight_scale"] = scale.reshape(1)
            exact.append(tensors[f"{row_name}.weight"].astype(np.float32) * scale)
        else:
            tensors[f"{row_name}.weight"] = part.astype(ml_dtypes.bfloat16)
            exact.append(tensors[f"{row_name}.weight"].astype(np.float32))
    weights = {
        "key_proj": rng.normal(0, 0.2, (M * D, 24)),
        "value_proj": rng.normal(0, 0.2, (D, 24)),
        "norm_key": rng.normal(0, 0.2, M * D),
        "norm_query": rng.normal(0, 0.2, M * D),
        "norm_conv": rng.normal(0, 0.2, M * D),
        "conv1d": rng.normal(0, 0.5, (M * D, 1, 4)),
    }
    weights = {key: x.astype(np.float32) for key, x in weights.items()}
    tensors |= {f"{name}.{key}.weight": x for key, x in weights.items()}
    buffers = f"{name}.ple_embedding."
    sizes = np.array(primes).ravel()
    tensors |= {
        f"{buffers}layer_multipliers": np.array(multipliers, np.int64)[None],
        f"{buffers}ngram_heads_vocab_sizes": sizes.astype(np.int64),
        f"{buffers}ngram_heads_offsets": (np.cumsum(sizes) - sizes).astype(np.int64),
    }
    edit(tensors)
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen4_exp", "text_config": QWEN | settings}))
    return SimpleNamespace(
        folder=folder, table=np.concatenate(exact)[:logical], weights=weights, primes=primes, multipliers=multipliers
    )


def qwen_update(qwen, tokens, x_BTMD):
    """gated + silu(conv(norm(gated))) with gains 1 + w, in float64; documents end at EOS, the row is one sequence."""
    w = {key: x.astype(np.float64) for key, x in qwen.weights.items()}
    B, T = tokens.shape

    def normed(x, gain):  # over groups of D
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + gain.reshape(M, D))

    gated = np.zeros(x_BTMD.shape)
    for b, t in np.ndindex(B, T):
        history = [int(tokens[b, t])]
        for i in (1, 2):  # EOS stands for itself and for all that is older
            ended = t < i or 1 in tokens[b, t - i : t]
            history.append(1 if ended else int(tokens[b, t - i]))
        memory = qwen.table[row_ids(history, qwen.multipliers, qwen.primes)].ravel().astype(np.float64)
        key = normed((w["key_proj"] @ memory).reshape(M, D), w["norm_key"])
        dot = (normed(x_BTMD[b, t].astype(np.float64), w["norm_query"]) * key).sum(-1) * D**-0.5
        gate = 1 / (1 + np.exp(-np.sign(dot) * np.sqrt(np.maximum(np.abs(dot), 1e-6))))
        gated[b, t] = gate[:, None] * (w["value_proj"] @ memory)
    conv_in, mixed = normed(gated, w["norm_conv"]), np.zeros(gated.shape)
    kernel = w["conv1d"][:, 0].reshape(M, D, 4)
    for tap in range(4):
        distance = (3 - tap) * 3
        mixed[:, distance:] += kernel[..., tap] * conv_in[:, : T - distance]
    return gated + mixed / (1 + np.exp(-mixed))


@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "FP8"])
def test_qwen_reads_as_published(tmp_path, fp8):
    qwen = qwen_folder(tmp_path, fp8)
    memory = qwen_ple.open_memory(tmp_path)
    assert memory.engram.engram_layer_ids == (LAYER,)  # from one there, from zero here
    store = make_store(memory, frozen=False)
    state = memory.load(store)
    np.testing.assert_array_equal(store.materialize(state, 0)[str(LAYER)], qwen.table)
    tokens = TOKENS.copy()
    tokens[0, 5] = tokens[1, 0] = 1  # EOS within a row, and at its start
    x_BTMD = np.random.default_rng(2).normal(size=(*tokens.shape, M, D)).astype(np.float32)
    ours = our_update(memory, store, state, tokens, x_BTMD)
    expected = qwen_update(qwen, tokens, x_BTMD)
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())
    if fp8:
        with pytest.raises(ConfigError, match="not FP8 with a scale for 1 x 32"):
            table_sources.load_tables(make_store(memory, frozen=True), memory.sources)


BUFFERS = "model.layers.1.ple.ple_embedding"


def bump(name):
    def edit(tensors):
        tensors[f"{BUFFERS}.{name}"] = tensors[f"{BUFFERS}.{name}"] + 2

    return edit


WRONG_QWEN = {
    "multipliers": (dict(edit=bump("layer_multipliers")), ConfigError, r"layer_multipliers differs .* from entry 0"),
    "head sizes": (dict(edit=bump("ngram_heads_vocab_sizes")), ConfigError, r"ngram_heads_vocab_sizes differs"),
    "offsets": (dict(edit=bump("ngram_heads_offsets")), ConfigError, r"ngram_heads_offsets differs"),
    "another seed": (dict(seed=7), ConfigError, r"layer_multipliers differs"),
    "a part missing": (
        dict(edit=lambda t: t.pop(f"{BUFFERS}.ngram_embedding.shard_2.weight")),
        RunError,
        r"parts \[0, 1, 3\]",
    ),
    "the last part missing": (
        dict(edit=lambda t: t.pop(f"{BUFFERS}.ngram_embedding.shard_3.weight")),
        ConfigError,
        r"rows in 3 parts, and config\.json makes it",
    ),
    "two layers": (dict(ple_layer_ids=[2, 4]), ConfigError, r"ple_layer_ids=\[2, 4\]"),
    "several ends": (dict(eos_token_id=[1, 2]), ConfigError, r"eos_token_id=\[1, 2\]"),
    "biases": (
        dict(edit=lambda t: t.update({"model.layers.1.ple.key_proj.bias": np.zeros(3, np.float32)})),
        ConfigError,
        r"no biases",
    ),
    "a width that heads do not divide": (dict(ple_embed_dim=25), ConfigError, r"ple_embed_dim=25"),
}


@pytest.mark.parametrize("name", WRONG_QWEN)
def test_what_is_not_qwens_is_refused(tmp_path, name):
    arguments, error, message = WRONG_QWEN[name]
    qwen_folder(tmp_path, **arguments)
    with pytest.raises(error, match=message):
        qwen_ple.open_memory(tmp_path)
