"""A small checkpoint in the layout of DeepSeek-V4.1, against the published equations in NumPy."""

import functools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from foreign import LAYER, TOKENS, D, M, make_store, next_primes, our_update, row_ids, write
from tokenizers import Tokenizer

from engram_jax.config import ConfigError
from engram_jax.errors import RunError
from engram_jax.interop import deepseek_v41, shards, table_sources
from engram_jax.memory.compression import TokenMap

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
