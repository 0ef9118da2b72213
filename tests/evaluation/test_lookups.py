"""Gates, uses and ages of rows against the tables read by hand, token by token."""

import dataclasses

import jax
import numpy as np
import pytest
from seeds import rng_of

from engram_jax.analysis.gates import token_gates
from engram_jax.analysis.lookups import look_up, with_memory
from engram_jax.config import ConfigError
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.memory.compression import canonicalize_numpy
from engram_jax.memory.hashing import ngram_row_ids_numpy

STEP = 4  # of the saved run


@pytest.fixture(scope="module")
def aged(model, request):
    """The run with tables that differ in every row's uses and last step; some rows were never used."""
    rng = rng_of(request)

    def aged(table):
        uses = rng.integers(0, 4, table.uses.shape).astype(np.int32)
        last = rng.integers(0, STEP, table.uses.shape).astype(np.int32)
        uses, last = (jax.device_put(x, table.uses.sharding) for x in (uses, last))
        return dataclasses.replace(table, uses=uses, slots=table.slots | {"last_step": last})

    tables = {layer: aged(table) for layer, table in model.state.memory.tables.items()}
    memory = dataclasses.replace(model.state.memory, tables=tables)
    return dataclasses.replace(model, state=dataclasses.replace(model.state, memory=memory))


@pytest.fixture(scope="module")
def sequences(model, request):
    rng = rng_of(request)
    return [np.array([model.tokenizer.bos_id, *rng.integers(3, 300, n)], np.int32) for n in (5, 64, 1, 30, 40, 12)]


@pytest.fixture(scope="module")
def found(aged, sequences):
    return look_up(aged, sequences)


def test_uses_and_ages_are_the_tables(aged, sequences, found):
    store = aged.parts.store
    for ids, lookup in zip(sequences, found, strict=True):
        canonical = canonicalize_numpy(store.token_map, ids[:-1])
        for layer, table in aged.state.memory.tables.items():
            rows_THd = ngram_row_ids_numpy(store.constants, int(layer), canonical)
            uses = np.asarray(table.uses)[rows_THd].reshape(len(ids) - 1, 2, 2)
            age = np.where(uses > 0, STEP - np.asarray(table.slots["last_step"])[rows_THd].reshape(uses.shape), 0)
            counted = (uses > 0).sum(-1)
            expected = np.where(counted > 0, age.sum(-1) / np.maximum(counted, 1), np.nan)
            np.testing.assert_allclose(lookup.uses[layer], uses.mean(-1), rtol=1e-6)
            np.testing.assert_allclose(lookup.ages[layer], expected, rtol=1e-6)
    ages = np.concatenate([lookup.ages["0"] for lookup in found])
    assert np.isnan(ages).any() and np.nanmax(ages) > np.nanmin(ages) > 0


def test_gates_are_those_of_a_text_by_itself(model, found):
    text = "def value self.\n"
    ids = np.array([model.tokenizer.bos_id, *model.tokenizer.encode(text), 5], np.int32)
    _, gates = token_gates(model.parts, model.state, model.tokenizer, text)
    (lookup,) = look_up(model, [ids])
    for layer, gate_TM in gates.items():
        np.testing.assert_allclose(lookup.gates[layer][1:], gate_TM, rtol=1e-5)
    assert all(lookup.gates["0"].shape == (len(lookup.uses["0"]), 1) for lookup in found)


def test_memory_switched_off_in_a_copy(model, run_dir, sequences):
    off = with_memory(model, {1: 0.0})
    assert off.memory_scale == {0: 1.0, 1: 0.0} and model.memory_scale == {0: 1.0, 1: 1.0}
    loaded = EvaluatedRun.load(run_dir, batch_tokens=256, memory_scale=["1=0"], log=lambda line: None)
    for ours, theirs, before in zip(*(m.score(sequences) for m in (off, loaded, model)), strict=True):
        np.testing.assert_array_equal(ours.losses, theirs.losses)
        assert not np.array_equal(ours.losses, before.losses)


def test_a_run_without_memory(bare_run_dir):
    model = EvaluatedRun.load(bare_run_dir, log=lambda line: None)
    with pytest.raises(ConfigError, match="no memory to look into"):
        look_up(model, [np.array([0, 5, 6], np.int32)])
