"""Corpora in shares: the shares, determinism, resuming, hold-out, and what is refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.data.loader import eval_batches, load_data, train_batches
from engram_jax.data.mixture import ChainedStream, parse_mixture
from engram_jax.data.packing import WindowSource


@pytest.fixture
def folders(texts, tmp_path):
    """Documents of two kinds: the second kind's are all digits."""
    for name, kind in (("words", str), ("digits", lambda text: " ".join(str(len(word) % 7) for word in text.split()))):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i:03d}.txt").write_text(kind(text))
    return tmp_path / "words", tmp_path / "digits"


@pytest.fixture
def mixed(config, folders):
    words, digits = folders
    return dataclasses.replace(config, corpus=f"{words}:3,{digits}:1")


def quiet(config):
    return load_data(config, 400, log=lambda _: None)


def of_digits(tokens_T, data):
    text = data.tokenizer.decode(tokens_T.tolist())
    return sum(c.isdigit() for c in text) > 0.3 * len(text)


def test_windows_come_in_the_given_shares_and_repeat(mixed):
    data = quiet(mixed)
    with train_batches(data.train, 8, seed=4) as batches:
        steps = [next(batches) for _ in range(2 * len(data.train) // 8)]
    per_batch = [sum(of_digits(row, data) for row in batch["tokens"]) for batch in steps]
    assert set(per_batch) == {2}  # of 8, in every batch
    seen = {tuple(row) for batch in steps for row in batch["tokens"]}
    digits = data.train.sources[1]  # type: ignore[attr-defined]
    assert {tuple(digits[i]["tokens"]) for i in range(len(digits))} <= seen


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_stream_is_a_function_of_seed_and_step(mixed, workers):
    data = pickle.loads(pickle.dumps(quiet(mixed).train))
    with train_batches(quiet(mixed).train, 8, seed=4) as batches:
        expected = [next(batches) for _ in range(6)]
    with train_batches(data, 8, seed=4, worker_count=workers, start_step=3) as batches:
        np.testing.assert_equal([next(batches) for _ in range(3)], expected[3:])
    with train_batches(data, 8, seed=5) as batches:
        assert np.any(next(batches)["tokens"] != expected[0]["tokens"])


def test_the_holdout_is_every_sources_own(mixed, folders, config):
    data = quiet(mixed)
    alone = [
        quiet(dataclasses.replace(config, corpus=str(folder), tokenizer=save(data, folder.parent)))
        for folder in folders
    ]
    streams = [one.validation.stream for one in alone]
    joined = data.validation.stream
    np.testing.assert_array_equal(joined.tokens, np.concatenate([s.tokens for s in streams]))
    assert joined.num_documents == sum(s.num_documents for s in streams) == len(joined.starts)
    assert all(joined.tokens[start] == data.tokenizer.bos_id for start in joined.starts)
    scored = sum((batch["targets"] >= 0).sum() for batch in eval_batches(data.validation, 8))
    assert scored == joined.num_tokens - joined.num_documents
    assert data.corpus_sha256 not in [one.corpus_sha256 for one in alone]
    other = quiet(dataclasses.replace(mixed, corpus=mixed.corpus.replace(":3,", ":2,")))
    assert other.corpus_sha256 != data.corpus_sha256


def save(data, folder):
    data.tokenizer.save(folder / "tokenizer.json")
    return str(folder / "tokenizer.json")


def test_a_shortened_chain_keeps_each_parts_beginning(mixed):
    parts = [source.stream for source in quiet(mixed).train.sources]  # type: ignore[attr-defined]
    chain = ChainedStream.of(parts, longest=100)
    np.testing.assert_array_equal(chain.tokens, np.concatenate([part.tokens[:100] for part in parts]))
    assert chain.num_tokens == 200
    assert [int(s) for s in chain.starts] == [
        offset + int(s) for part, offset in zip(parts, (0, 100), strict=True) for s in part.starts if s < 100
    ]
    window = WindowSource(chain, 40, 0, keep_partial=False)[2]  # tokens 80 .. 119, across the seam
    assert window["targets"][19] == -1 and window["positions"][20] == 0
    assert window["segment_ids"][20] == window["segment_ids"][19] + 1


@pytest.mark.parametrize(
    ("corpus", "sources"),
    [
        ("python:0.7, /books:0.3", [("python", 0.7), ("/books", 0.3)]),
        ("tfds:wiki:2,arrayrecord:/a/*.array_record:1", [("tfds:wiki", 2), ("arrayrecord:/a/*.array_record", 1)]),
        ("tfds:wiki", [("tfds:wiki", 1.0)]),
        ("/a,b.txt", [("/a,b.txt", 1.0)]),
        ("python:0.7", [("python:0.7", 1.0)]),
    ],
)
def test_what_names_a_mixture(corpus, sources):
    assert parse_mixture(corpus) == sources


@pytest.mark.parametrize(
    ("corpus", "says"), [("a:1,b:0", "weight of 'b'"), ("a:1,a:2", "twice"), ("a:1,b:nan", "weight of 'b'")]
)
def test_mistakes_in_a_mixture_are_named(corpus, says):
    with pytest.raises(ConfigError, match=says):
        parse_mixture(corpus)
