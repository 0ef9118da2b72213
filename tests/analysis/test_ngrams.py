"""Which n-grams own a row, counted by hand, and rows that are forgotten against rows set to zero one by one."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from engram_jax.analysis.ngrams import Ngrams, expected_share, has_twin, nearest, owners, shared_in_heads
from engram_jax.config import ConfigError, EngramConfig, OptimizerConfig
from engram_jax.evaluation.knock_out import forget_rows
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.hashing import hash_constants, ngram_row_ids_numpy
from engram_jax.memory.row_optimizers import CatchUpAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.runs.state import TrainState
from engram_jax.sharding import make_mesh

VOCAB, PAD = 12, 2
CONFIG = EngramConfig(
    engram_layer_ids=(0, 3), engram_n_heads=2, engram_head_dim=4, engram_vocab_size=37, engram_pad_token_id=PAD
)
CONSTANTS = hash_constants(CONFIG, TokenMap.identity(VOCAB))


@pytest.fixture
def text(rng):
    """(ids of several documents, offsets at which they begin)."""
    lengths = rng.integers(1, 60, 9)
    return rng.integers(0, VOCAB, lengths.sum()).astype(np.int32), np.cumsum([0, *lengths[:-1]])


def windows(ids, starts, order):
    """Every window, one at a time."""
    found = []
    for t in range(len(ids)):
        start = max(s for s in starts if s <= t)
        found.append(tuple(int(ids[t - back]) if t - back >= start else PAD for back in reversed(range(order))))
    return found


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("across", [False, True])
def test_the_ngrams_of_a_text_are_counted(text, order, across):
    ids, starts = text
    expected = windows(ids, [0] if across else starts, order)
    ngrams = Ngrams.of(ids, None if across else starts, order, PAD)
    listed = [tuple(n) for n in ngrams.ngrams_GN.tolist()]
    assert dict(zip(listed, ngrams.counts_G.tolist(), strict=True)) == Counter(expected)
    assert len(ngrams) == len(set(expected)) and np.all(np.diff(ngrams.counts_G) <= 0)
    assert [expected[t] for t in ngrams.first_G] == listed
    assert [expected.index(n) for n in listed] == ngrams.first_G.tolist()
    assert ngrams.index(listed[-1]) == len(listed) - 1 and ngrams.index([VOCAB] * order) is None


@pytest.mark.parametrize(("order", "heads"), [(2, slice(0, 2)), (3, slice(2, 4))])
def test_their_rows_are_those_that_the_text_reads(text, order, heads):
    ids, starts = text
    segments = np.searchsorted(starts, np.arange(len(ids)), side="right")
    ngrams = Ngrams.of(ids, starts, order, PAD)
    read_TK = ngram_row_ids_numpy(CONSTANTS, 3, ids, segments)[:, heads]
    places = np.array([ngrams.index(window) for window in windows(ids, starts, order)])
    np.testing.assert_array_equal(ngrams.rows(CONSTANTS, 3)[places], read_TK)


def test_an_order_that_the_memory_does_not_read_is_refused(text):
    with pytest.raises(ConfigError, match=r"order=4.*2 to 3"):
        Ngrams.of(text[0], text[1], 4, PAD).rows(CONSTANTS, 0)
    with pytest.raises(ConfigError, match="order=1"):
        Ngrams.of(text[0], text[1], 1, PAD)


def test_who_shares_a_row_with_whom(rng):
    rows = rng.integers(0, 9, (60, 2)) + np.array([0, 9])
    of_row = {row: [g for g in range(60) if row in rows[g]] for row in range(18)}
    for row, expected in of_row.items():
        assert owners(rows, row).tolist() == expected
    shared = [sum(len(of_row[row]) > 1 for row in rows[g]) for g in range(60)]
    assert shared_in_heads(rows).tolist() == shared
    pairs = Counter(map(tuple, rows.tolist()))
    assert has_twin(rows).tolist() == [pairs[tuple(r)] > 1 for r in rows.tolist()]
    assert 0 < sum(has_twin(rows)) < 60


def test_the_expected_share_is_what_chance_gives(rng):
    measured = [shared_in_heads(rng.integers(0, 500, (200, 1))).mean() for _ in range(400)]
    error = np.std(measured, ddof=1) / np.sqrt(len(measured))
    assert expected_share(200, 500) == pytest.approx(np.mean(measured), abs=5 * error)
    assert expected_share(1, 500) == 0


def test_the_nearest_vectors(rng):
    vectors = rng.normal(size=(30, 5))
    vectors[7] = 3 * vectors[4] + 1e-3  # a scale does not matter
    vectors[9] = 0
    found, cosines = nearest(vectors, 4, 29)
    assert found[0] == 7 and 4 not in found and len(set(found)) == 29
    expected = [0.0 if j == 9 else vectors[j] @ vectors[4] / np.sqrt(vectors[j] @ vectors[j]) for j in found]
    np.testing.assert_allclose(cosines, expected / np.sqrt(vectors[4] @ vectors[4]), atol=1e-12)
    assert np.all(np.diff(cosines) <= 0)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_forgotten_rows_are_zero_and_stay_so_and_the_others_stay(rng, on_mesh):
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if on_mesh else make_mesh(devices=jax.devices()[:1])
    store = MemoryStore.create(
        CONFIG,
        TokenMap.identity(VOCAB),
        CatchUpAdam.create(OptimizerConfig(), np.full(10, 1e-2)),
        shards=mesh.size,
    )
    with jax.set_mesh(mesh):
        memory = store.init(jax.random.key(1))
        # Momentum on every row: what catch-up would go on moving.
        tables = {
            layer: dataclasses.replace(
                table, slots=table.slots | {name: table.slots[name] + 0.5 for name in ("m", "v")}, uses=table.uses + 1
            )
            for layer, table in memory.tables.items()
        }
        state = TrainState(None, {}, {}, None, dataclasses.replace(memory, tables=tables))  # type: ignore[arg-type]
        before = jax.tree.map(np.asarray, store.materialize(state.memory, 5))
        read_TH = ngram_row_ids_numpy(CONSTANTS, 3, rng.integers(0, VOCAB, 3).astype(np.int32))
        chosen_TH = np.where([[True, False, True, True]], read_TH, -1)
        after_state = forget_rows(store, state, "3", chosen_TH)
        after = jax.tree.map(np.asarray, store.materialize(after_state.memory, 5))
        unchanged = jax.tree.map(np.asarray, store.materialize(state.memory, 5))
    forgotten = np.unique(chosen_TH[chosen_TH >= 0])
    assert np.all(np.any(before["3"][forgotten], axis=1))
    np.testing.assert_array_equal(after["3"][forgotten], 0)
    np.testing.assert_array_equal(np.delete(after["3"], forgotten, axis=0), np.delete(before["3"], forgotten, axis=0))
    np.testing.assert_array_equal(after["0"], before["0"])
    np.testing.assert_array_equal(unchanged["3"], before["3"])
    for layer in after_state.memory.tables:
        np.testing.assert_array_equal(after_state.memory.tables[layer].uses, state.memory.tables[layer].uses)
    assert after_state.memory.rows_used == state.memory.rows_used
