"""Gates that analysis reads out of a model, against eq. 6 in NumPy and against the model itself."""

import dataclasses

import jax
import numpy as np
import pytest

from engram_jax.analysis.gates import plot_gates, token_gates
from engram_jax.config import (
    AttentionConfig,
    ConfigError,
    EngramConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    replace,
)
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.layers.engram import EngramReader
from engram_jax.runs.parts import assemble

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=270,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=32,
        attention=AttentionConfig(
            num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=16
        ),
        engram=EngramConfig(engram_layer_ids=(0, 1), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
        hc_mult=3,
        hc_sinkhorn_iters=2,
        dtype="float32",
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
)
TEXT = "def f(self):\n    return self.é\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"def f{i}(self): return self.x{i}\n" for i in range(50)], 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    """(parts, state) with gains and rows that are not their initial ones and zeros."""
    parts = assemble(CONFIG, tokenizer.backend, jax.devices()[:1])
    rng = np.random.default_rng(5)

    def perturbed(x, scale):
        return jax.device_put(np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
    tables = {name: dataclasses.replace(t, rows=perturbed(t.rows, 1.0)) for name, t in state.memory.tables.items()}
    params = jax.tree.map(lambda p: perturbed(p, 0.2), state.params)
    return parts, dataclasses.replace(state, params=params, memory=dataclasses.replace(state.memory, tables=tables))


def rms_normed(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True))


@pytest.mark.slow
def test_gates_of_the_first_block_are_equation_6(model, tokenizer):
    parts, state = model
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    tokens, gates = token_gates(parts, state, tokenizer, TEXT)
    assert len(tokens) == len(ids) - 1 == len(gates["0"])

    with jax.set_mesh(parts.mesh):
        plan = parts.store.plan(jax.numpy.asarray(ids, "int32")[None])
        rows = np.asarray(parts.store.fetch(state.memory, plan, state.step)["0"], np.float64)[0]
    reader = state.params["engram"]["0"]
    keys_TMD = np.einsum("te,emd->tmd", rows.reshape(len(ids), -1), reader["key_value_emd"])[:, :-1]
    # Before the first block every stream holds the embedding.
    x_TMD = np.asarray(state.params["embedding_vd"])[ids][:, None]
    gain_MD = np.asarray(reader["query_norm"]) * np.asarray(reader["key_norm"])
    scores_TM = np.sum(rms_normed(x_TMD) * rms_normed(keys_TMD) * gain_MD, -1) / np.sqrt(32)
    expected_TM = 1 / (1 + np.exp(-np.sign(scores_TM) * np.sqrt(np.maximum(np.abs(scores_TM), 1e-6))))
    np.testing.assert_allclose(gates["0"], expected_TM[1:], rtol=1e-4)
    assert np.ptp(expected_TM) > 0.2


def test_every_layer_and_stream_has_gates_that_see_no_later_token(model, tokenizer):
    tokens, gates = token_gates(*model, tokenizer, TEXT)
    _, longer = token_gates(*model, tokenizer, TEXT + "x = 1")
    assert list(gates) == ["0", "1"]
    for layer, gate_TM in gates.items():
        assert gate_TM.shape == (len(tokens), 3) and 0 < gate_TM.min() < gate_TM.max() < 1
        np.testing.assert_allclose(longer[layer][: len(tokens)], gate_TM, rtol=1e-4)


def test_gates_are_those_of_the_models_own_forward_pass(model, tokenizer, monkeypatch):
    """Overheard at the readers of a model that runs as in training, without padding."""
    parts, state = model
    overheard = {}

    def call(reader, x_BTMD, rows_BTHd, segment_ids_BT=None):
        update_BTMD, overheard[len(overheard)] = reader.read(x_BTMD, rows_BTHd, segment_ids_BT)
        return update_BTMD

    @jax.jit
    def run(state, tokens_BT):
        rows = parts.store.fetch(state.memory, parts.store.plan(tokens_BT), state.step)
        parts.model(state.params, state.buffers).hidden(tokens_BT, rows)
        return overheard

    monkeypatch.setattr(EngramReader, "__call__", call)
    with jax.set_mesh(parts.mesh):
        expected = run(state, np.array([[tokenizer.bos_id, *tokenizer.encode(TEXT)]], np.int32))
    _, gates = token_gates(parts, state, tokenizer, TEXT)
    for i, layer in enumerate(("0", "1")):
        np.testing.assert_allclose(gates[layer], expected[i][0, 1:], rtol=1e-4)


def test_tokens_read_as_the_text(model, tokenizer):
    ascii_text = "def f(self):\n    return self.x\n"
    tokens, _ = token_gates(*model, tokenizer, ascii_text)
    assert "".join(tokens) == ascii_text and len(tokens) > 5


def test_a_model_without_memory_and_a_text_without_tokens(model, tokenizer):
    parts, state = model
    with pytest.raises(ConfigError, match="no tokens"):
        token_gates(parts, state, tokenizer, "")
    plain = assemble(replace(CONFIG, model__engram__engram_layer_ids=()), tokenizer.backend, jax.devices()[:1])
    with pytest.raises(ConfigError, match="no memory"):
        token_gates(plain, state, tokenizer, TEXT)


def test_the_heat_map_shows_every_gate(tmp_path, rng):
    tokens = ["def", " f", "$x", "_$", "\n", "\t", "é"]
    gates = {"1": rng.random((7, 2)), "14": rng.random((7, 3))}
    figure = plot_gates(tokens, gates)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), np.concatenate([gates["1"].T, gates["14"].T]))
    assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["def", "·f", "$x", "_$", "\\n", "\\t", "é"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("layer 1, stream 0", "layer 1, stream 1"),
        *("layer 14, stream 0", "layer 14, stream 1", "layer 14, stream 2"),
    ]
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5]
    figure.savefig(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 5000
