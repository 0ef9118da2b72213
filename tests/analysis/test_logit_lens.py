"""Each block's states against a model that ends there, and the lens against NumPy on those states."""

import dataclasses

import jax
import numpy as np
import pytest
from seeds import rng_of

from engram_jax.analysis.hidden_states import layer_states, state_batches, states_at
from engram_jax.analysis.logit_lens import DIRECTIONS, divergences, logit_lens, plot_lens
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
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.statistics import Metric
from engram_jax.model import segments
from engram_jax.runs.parts import assemble

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=270,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=32,
        attention=AttentionConfig(
            num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=16
        ),
        engram=EngramConfig(engram_layer_ids=(1,), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
        hc_mult=2,
        hc_sinkhorn_iters=1,
        dtype="float32",
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
)
WINDOWS = (30, 64, 2, 17, 1)
"""Ids of each sequence; the last one has nothing to predict."""
DOCUMENTS = (7, 7, 3, 3, 9)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"def f{i}(self): return self.x{i}\n" for i in range(50)], 270)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """With weights and rows large enough for every block and the memory to matter."""
    parts = assemble(CONFIG, tokenizer.backend, jax.devices()[:1])
    rng = np.random.default_rng(5)

    def perturbed(x, scale):
        return jax.device_put(np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
    tables = {name: dataclasses.replace(t, rows=perturbed(t.rows, 1.0)) for name, t in state.memory.tables.items()}
    params = jax.tree.map(lambda p: perturbed(p, 0.2), state.params)
    params["head_dv"] = 3 * params["head_dv"]  # predictions sharp enough to tell the two directions apart
    memory = dataclasses.replace(state.memory, tables=tables)
    state = dataclasses.replace(state, params=params, memory=memory)
    folder = tmp_path_factory.mktemp("no run")
    return EvaluatedRun("small", parts, state, tokenizer, folder, batch_tokens=128, log=lambda _: None)


@pytest.fixture(scope="module")
def sequences(request):
    rng = rng_of(request)
    return [np.array([0, *rng.integers(3, 270, n - 1)], np.int32) for n in WINDOWS]


@pytest.fixture(scope="module")
def states(model, sequences):
    """float32 [L, T, D] of each sequence, from the batches."""
    found = []
    for first, is_token_BT, states_LBTD in state_batches(model, sequences):
        assert first == len(found) and states_LBTD.shape == (4, 2, 64, 32)
        for row, is_token_T in enumerate(is_token_BT):
            found.append(np.asarray(states_LBTD)[:, row, is_token_T])
    assert [x.shape[1] for x in found] == [*WINDOWS, 0]
    return found[:-1]


def ended_after(model, blocks):
    """Parts and state of a model that is the first blocks of `model`."""
    parts = assemble(replace(CONFIG, model__num_hidden_layers=blocks), model.tokenizer.backend, jax.devices()[:1])
    stacks = {segment.start: model.state.params["blocks"][segment.name] for segment in segments(CONFIG.model)}
    cut = {
        s.name: jax.tree.map(lambda x, n=s.stop - s.start: x[:n], stacks[s.start]) for s in segments(parts.config.model)
    }
    return parts, dataclasses.replace(model.state, params=model.state.params | {"blocks": cut})


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_state_is_what_a_model_that_ends_there_returns(model, sequences, states, blocks):
    parts, state = ended_after(model, blocks)
    tokens_1T = sequences[0][None]

    @jax.jit
    def hidden(state):
        rows = parts.store.fetch(state.memory, parts.store.plan(tokens_1T), state.step)
        return parts.model(state.params, state.buffers).hidden(tokens_1T, rows)[0][0]

    with jax.set_mesh(parts.mesh):
        expected = hidden(state)
    x_TD = states[0][blocks].astype(np.float64)
    [gain] = jax.tree.leaves(model.state.params["final_norm"])
    normed = x_TD / np.sqrt(np.mean(x_TD**2, -1, keepdims=True)) * np.asarray(gain)
    np.testing.assert_allclose(normed, expected, rtol=2e-3, atol=2e-4)


def test_the_first_state_is_the_embedding(model, sequences, states):
    np.testing.assert_array_equal(states[1][0], np.asarray(model.state.params["embedding_vd"])[sequences[1]])


def test_without_rows_the_memory_adds_nothing(model, sequences, states):
    parts, state = model.parts, model.state
    with jax.set_mesh(parts.mesh):
        states_of = jax.jit(lambda params: layer_states(parts.model(params, state.buffers), sequences[0][None]))
        without = np.asarray(states_of(state.params))[:, 0]
    np.testing.assert_allclose(without[:2], states[0][:2], rtol=1e-3, atol=1e-4)
    assert np.abs(without[2] - states[0][2]).max() > 0.1  # it stands before block 1


def test_states_of_chosen_tokens(model, sequences, states):
    positions = [np.array(p, int) for p in ([0, 29], [], [1], [16, 3], [0])]
    expected = np.concatenate([x[:, p] for x, p in zip(states, positions, strict=True)], axis=1)
    np.testing.assert_array_equal(states_at(model, sequences, positions), expected)


def test_the_lens_is_that_of_numpy(model, sequences, states):
    lens = logit_lens(model, sequences, DOCUMENTS)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.state.params)
    [gain] = jax.tree.leaves(params["final_norm"])
    sums, sizes = {d: np.zeros((2, 4)) for d in DIRECTIONS}, np.zeros(2)
    for x, document in zip(states, DOCUMENTS, strict=True):
        x = x[:, :-1].astype(np.float64)  # the last id is only predicted
        logits = x / np.sqrt(np.mean(x**2, -1, keepdims=True)) * gain @ params["head_dv"]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        last = p[-1:]
        if x.shape[1]:
            row = (7, 3).index(document)
            sums["final||layer"][row] += (last * np.log(last / p)).sum((1, 2))
            sums["layer||final"][row] += (p * np.log(p / last)).sum((1, 2))
            sizes[row] += x.shape[1]
    for direction in DIRECTIONS:
        means = sums[direction].sum(0) / sizes.sum()
        # Two clusters: sqrt(2 / 1 * sum of squared residuals) / tokens.
        errors = np.sqrt(2 * ((sums[direction] - means * sizes[:, None]) ** 2).sum(0)) / sizes.sum()
        assert [(m.count, m.clusters, m.unit) for m in lens[direction]] == [(109, 2, "nats")] * 4
        np.testing.assert_allclose([m.value for m in lens[direction]], means, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose([m.stderr or 0 for m in lens[direction]], errors, rtol=1e-2, atol=1e-5)
        assert min(means[:-1]) > 0.01


def test_the_directions_are_told_apart():
    p, q = np.array([0.5, 0.5, 1e-30]), np.array([0.25, 0.5, 0.25])
    ahead, back = divergences(jax.numpy.log(p.astype("float32")), jax.numpy.log(q.astype("float32")))
    np.testing.assert_allclose(ahead, 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(back, 0.25 * np.log(0.5) + 0.25 * np.log(0.25e30), rtol=1e-6)


def test_without_documents_every_sequence_is_its_own(model, sequences):
    lens = logit_lens(model, sequences[:2])
    assert [m.clusters for m in lens["final||layer"]] == [2] * 4


def test_a_sequence_without_ids(model, sequences):
    with pytest.raises(ConfigError, match="has no ids"):
        logit_lens(model, [sequences[0], sequences[0][:0]])


def test_the_picture_shows_every_curve(tmp_path, rng):
    lenses = {
        label: [{d: [Metric(float(v)) for v in rng.random(5)] for d in DIRECTIONS} for _ in range(2)]
        for label in ("moe", "engram")
    }
    figure = plot_lens(lenses)
    assert [axes.get_title() for axes in figure.axes] == [f"KL({direction})" for direction in DIRECTIONS]
    for axes, direction in zip(figure.axes, DIRECTIONS, strict=True):
        for number, runs in enumerate(lenses.values()):
            curves = np.array([[m.value for m in lens[direction]] for lens in runs])
            mean, *dots = axes.lines[3 * number : 3 * number + 3]
            np.testing.assert_allclose(np.asarray(mean.get_xydata()), np.c_[range(-1, 4), curves.mean(0)])
            np.testing.assert_allclose(np.array([line.get_ydata() for line in dots]), curves)
        legend = axes.get_legend()
        assert legend and [text.get_text() for text in legend.get_texts()] == ["moe", "engram"]
    figure.savefig(tmp_path / "lens.png")
    assert (tmp_path / "lens.png").stat().st_size > 5000
