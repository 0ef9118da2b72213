"""A small checkpoint in the layout of Qwen, against the published equations in NumPy."""

import itertools
import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from foreign import LAYER, TOKENS, D, M, make_store, next_primes, our_update, row_ids, write

from engram_jax.config import ConfigError
from engram_jax.errors import RunError
from engram_jax.interop import qwen_ple, table_sources

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
