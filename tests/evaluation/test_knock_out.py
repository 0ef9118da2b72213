"""The memory scaled through the reader's first map against rows multiplied by hand, and against no memory at all."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import ConfigError, EngramConfig, replace
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.knock_out import parse_scales, scale_memory
from engram_jax.layers.engram import EngramReader
from engram_jax.runs.state import TrainState

TOKENS = np.random.default_rng(0).integers(3, 300, (2, 48)).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def hidden(parts, state, factors):
    """States of all tokens, with each layer's rows multiplied by its factor; None: without any rows."""
    rows = None
    if factors is not None:
        rows = parts.store.fetch(state.memory, parts.store.plan(TOKENS), state.step)
        rows = {layer: array * factors[layer] for layer, array in rows.items()}
    return parts.model(state.params, state.buffers).hidden(TOKENS, rows)[0]


def run(model, state, factors):
    with jax.set_mesh(model.parts.mesh):
        return np.asarray(hidden(model.parts, state, factors))


def scaled(model, scales):
    with jax.set_mesh(model.parts.mesh):
        return scale_memory(model.state, scales)


ONES = {"0": 1.0, "1": 1.0}


def test_zero_is_the_model_without_rows(model):
    without = run(model, model.state, None)
    np.testing.assert_array_equal(run(model, scaled(model, {0: 0.0, 1: 0.0}), ONES), without)
    assert np.abs(run(model, model.state, ONES) - without).max() > 0.1, "a memory that changes nothing shows nothing"


def test_one_is_the_same_bits(model):
    state = scaled(model, {0: 1.0, 1: 1.0})
    jax.tree.map(np.testing.assert_array_equal, state.params, model.state.params)
    np.testing.assert_array_equal(run(model, state, ONES), run(model, model.state, ONES))


@pytest.mark.parametrize("scales", [{0: 0.5, 1: 0.5}, {0: 1.0, 1: 0.0}, {0: 3.7, 1: -1.3}])
def test_any_scale_is_that_of_the_rows(model, scales):
    by_rows = run(model, model.state, {str(layer): scale for layer, scale in scales.items()})
    np.testing.assert_allclose(run(model, scaled(model, scales), ONES), by_rows, rtol=1e-4, atol=1e-4)
    assert np.abs(by_rows - run(model, model.state, ONES)).max() > 0.01


def test_the_state_it_was_given_stays(model):
    before = jax.tree.map(np.array, model.state.params)
    scaled(model, {0: 0.0})
    jax.tree.map(np.testing.assert_array_equal, before, model.state.params)


def test_biases_are_silent_too(config, rng):
    """A reader with biases speaks even where its rows are zero."""
    reader = EngramReader(replace(config.model, engram__engram_bias=True), rngs=nnx.Rngs(0))
    reader.key_value_bias_md[...] += 0.5
    graph, params = nnx.split(reader)
    state = TrainState(None, {"engram": {"0": nnx.to_pure_dict(params)}}, {}, None, None)  # type: ignore[arg-type]
    streams = rng.normal(size=(1, 5, config.model.hc_mult, 32)).astype(np.float32)
    rows = rng.normal(size=(1, 5, 4, 8)).astype(np.float32)
    assert np.abs(reader(streams, 0 * rows)).max() > 0.1
    silent = scale_memory(state, {0: 0.0}).params["engram"]["0"]
    np.testing.assert_array_equal(nnx.merge(graph, silent)(streams, rows), np.zeros_like(streams))


def test_a_model_without_memory_stays(bare_run_dir):
    model = EvaluatedRun.load(bare_run_dir, log=lambda line: None)
    assert model.memory_scale == {} and scale_memory(model.state, {}) is model.state


ENGRAM = EngramConfig(engram_layer_ids=(1, 14))


@pytest.mark.parametrize(
    ("words", "scales"),
    [
        ([], {1: 1.0, 14: 1.0}),
        (["0"], {1: 0.0, 14: 0.0}),
        (["14=0.5"], {1: 1.0, 14: 0.5}),
        (["1=0", "14=2e-1"], {1: 0.0, 14: 0.2}),
    ],
)
def test_scales_as_they_are_written(words, scales):
    assert parse_scales(words, ENGRAM) == scales


@pytest.mark.parametrize(
    ("words", "engram", "message"),
    [
        (["2=0"], ENGRAM, r"memory_scale 2=0: '2' is not an Engram layer; they are \[1, 14\]"),
        (["1=off"], ENGRAM, "'off' is not a number"),
        (["0", "1=1"], ENGRAM, "one number or LAYER=NUMBER"),
        (["0"], EngramConfig(), "no memory to scale"),
    ],
)
def test_scales_that_mean_nothing(words, engram, message):
    with pytest.raises(ConfigError, match=message):
        parse_scales(words, engram)
