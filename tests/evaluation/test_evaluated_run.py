"""Batched, padded, chunked scoring against one pass over each sequence alone."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.errors import RunError
from engram_jax.evaluation import evaluated_run
from engram_jax.evaluation.evaluated_run import EvaluatedRun, chunk_length, padded_length
from engram_jax.evaluation.knock_out import scale_memory


@partial(jax.jit, static_argnums=0)
def full_logits(parts, state, tokens_1T):
    """From one pass without padding, segments or batch: [T, V]."""
    rows = parts.store.fetch(state.memory, parts.store.plan(tokens_1T), state.step)
    model = parts.model(state.params, state.buffers)
    return model.logits(model.hidden(tokens_1T, rows)[0])[0]


def recomputed(model, ids):
    """Losses and whether the id was the most probable, in NumPy's float64."""
    with jax.set_mesh(model.parts.mesh):
        logits = np.asarray(full_logits(model.parts, model.state, np.array([ids[:-1]], np.int32)), np.float64)
    targets = np.arange(len(ids) - 1), np.array(ids[1:])
    return np.log(np.exp(logits).sum(-1)) - logits[targets], logits, targets


def sequences(rng, lengths):
    return [[0, *rng.integers(3, 300, n - 1)] for n in lengths]


def test_scores_are_those_of_one_pass(model, rng):
    """Beginnings of one sequence: two lengths that share a batch, two of the next bucket, one with nothing to score."""
    [whole] = sequences(rng, (100,))
    expected, logits, targets = recomputed(model, whole)
    margin = logits[targets] - np.sort(logits, -1)[:, -1]
    given = [whole[:n] for n in (20, 65, 66, 100, 1)]
    for ids, (losses, is_greedy) in zip(given, model.score(given), strict=True):
        n = len(ids) - 1
        assert losses.shape == is_greedy.shape == (n,)
        np.testing.assert_allclose(losses, expected[:n], rtol=2e-4, atol=2e-4)
        clear = margin[:n] < -1e-4  # a tie to 1e-4 may go either way
        assert not is_greedy[clear].any()


def test_is_greedy_says_whether_an_id_is_the_most_probable(model, rng):
    [whole] = sequences(rng, (100,))
    _, logits, _ = recomputed(model, whole)
    first, second = np.argsort(-logits[-1])[:2]
    best, next_best = model.score([[*whole[:-1], first], [*whole[:-1], second]])
    assert best.is_greedy[-1] and not next_best.is_greedy[-1]
    np.testing.assert_array_equal(best.is_greedy[:-1], next_best.is_greedy[:-1])


def test_order_and_company_change_nothing(model, rng):
    given = sequences(rng, rng.integers(2, 64, 9))
    order = rng.permutation(9)
    together, shuffled = model.score(given), model.score([given[i] for i in order])
    for place, i in enumerate(order):
        np.testing.assert_allclose(shuffled[place].losses, together[i].losses, rtol=1e-5, atol=1e-5)


def test_chunks_of_positions_change_nothing(model, rng, monkeypatch):
    given = sequences(rng, (60, 40))
    whole = model.score(given)
    monkeypatch.setattr(evaluated_run, "LOGITS_BYTES", 4 * 4 * 300 * 16)  # 16 positions of 4 sequences
    for one, other in zip(whole, model.score(given), strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one.is_greedy, other.is_greedy)


def test_shapes_are_few():
    lengths = [padded_length(n) for n in range(0, 4097)]
    assert set(lengths) == {64, 128, 256, 512, 1024, 2048, 4096}
    assert all(padded >= n for n, padded in enumerate(lengths))
    assert chunk_length(8, 4096, 129_280) == 64 and chunk_length(1, 64, 300) == 64 and chunk_length(999, 64, 10**6) == 1


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([0, 300], "id 300 is outside"), ([-1, 2], "id -1 is")])
def test_ids_that_cannot_be(model, ids, message):
    with pytest.raises(ConfigError, match=message):
        model.score([[0, 5], ids])


def test_a_tokenizer_other_than_the_runs_is_refused(bare_run_dir, tmp_path):
    for entry in bare_run_dir.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "tokenizer.json").unlink()
    text = " ".join(f"{i} {chr(97 + i % 26)}{chr(97 + i % 7)}{chr(97 + i % 3)}" for i in range(400))
    train_tokenizer([text] * 2, 300).save(tmp_path / "tokenizer.json")
    with pytest.raises(RunError, match="not the tokenizer this run was trained with"):
        EvaluatedRun.load(tmp_path)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_greedy_takes_the_id_that_scores_call_greedy(model, rng, scale):
    """With the memory on and off: decoding sees the knock-out as scoring does."""
    with jax.set_mesh(model.parts.mesh):
        state = scale_memory(model.state, {0: scale, 1: scale})
    model = dataclasses.replace(model, state=state, _engines={})
    prompts = sequences(rng, (5, 30, 17))
    for prompt, new in zip(prompts, model.greedy(prompts, 6), strict=True):
        assert len(new) == 6 or model.score([[*prompt, *new, model.tokenizer.eos_id]])[0].is_greedy[-1]
        [scored] = model.score([[*prompt, *new]])
        assert scored.is_greedy[len(prompt) - 1 :].all()


@pytest.mark.parametrize("placement", ["host", "tiered"])
def test_where_the_tables_lie_changes_no_bit(model, run_dir, rng, placement):
    given = sequences(rng, (20, 64, 90))
    there = EvaluatedRun.load(run_dir, batch_tokens=256, placement=placement)
    assert there.parts.config.memory.placement == placement != model.parts.config.memory.placement
    for ours, theirs in zip(there.score(given), model.score(given), strict=True):
        np.testing.assert_array_equal(ours.losses, theirs.losses)


@pytest.mark.slow
def test_a_mesh_changes_nothing(model, run_dir, rng):
    """Sequences over two devices, and heads, widths, vocabulary over two more; the table's rows over all four."""
    given = sequences(rng, (20, 64, 90))
    cut = EvaluatedRun.load(run_dir, batch_tokens=256, mesh={"fsdp": 2, "tensor": 2})
    assert cut.parts.mesh.size == 4
    for ours, theirs in zip(cut.score(given), model.score(given), strict=True):
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2e-4, atol=2e-4)
