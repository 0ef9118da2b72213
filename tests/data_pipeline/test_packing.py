import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram_jax.config import ConfigError
from engram_jax.data import packing
from engram_jax.data.corpora import document_digest, is_held_out, open_corpus
from engram_jax.data.packing import TokenStream, WindowSource, tokenise_corpus
from engram_jax.data.tokenizer import train_tokenizer

PAD = 2


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400)


def write_stream(path, documents, dtype="<u2") -> TokenStream:
    np.array([token for document in documents for token in document], dtype).tofile(path.with_suffix(".tokens"))
    lengths = [len(document) for document in documents]
    np.cumsum([0, *lengths[:-1]], dtype="<i8").tofile(path.with_suffix(".starts"))
    return TokenStream(path, dtype, sum(lengths), len(documents), 0)


def reference_windows(documents, seq_len, keep_partial):
    """The definition, token by token."""
    flat = [(token, number) for number, document in enumerate(documents) for token in document]
    windows = []
    for begin in range(0, len(flat), seq_len):
        window = {"tokens": [], "targets": [], "segment_ids": [], "positions": []}
        for i in range(begin, begin + seq_len):
            if i >= len(flat):
                row = (PAD, -1, 0, 0)
            else:
                token, document = flat[i]
                same = i + 1 < len(flat) and flat[i + 1][1] == document
                target = flat[i + 1][0] if same else -1
                position = sum(1 for j in range(begin, i) if flat[j][1] == document)
                row = (token, target, 1 + document - flat[begin][1], position)
            for name, value in zip(window, row, strict=True):
                window[name].append(value)
        windows.append(window)
    if not keep_partial and len(flat) % seq_len and len(windows) > 1:
        windows.pop()
    return windows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    seq_len=st.integers(2, 17),
    keep_partial=st.booleans(),
    dtype=st.sampled_from(["<u2", "<u4"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_equal_the_definition(tmp_path, lengths, seq_len, keep_partial, dtype, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, np.iinfo(dtype).max // 2, n).tolist() for n in lengths]
    source = WindowSource(write_stream(tmp_path / "split", documents, dtype), seq_len, PAD, keep_partial)
    expected = reference_windows(documents, seq_len, keep_partial)
    assert len(source) == len(expected)
    for i, window in enumerate(expected):
        found = source[i]
        assert list(found) == list(window)
        for name, values in window.items():
            assert found[name].dtype == np.int32
            assert found[name].tolist() == values, (name, i)


def test_padding_window(tmp_path):
    source = WindowSource(write_stream(tmp_path / "split", [[5, 6, 7]]), 4, PAD, True)
    expected = {"tokens": [2] * 4, "targets": [-1] * 4, "segment_ids": [0] * 4, "positions": [0] * 4}
    found = source.padding()
    assert {name: values.tolist() for name, values in found.items()} == expected
    assert all(values.dtype == np.int32 for values in found.values())


def test_a_pickled_source_carries_no_tokens(tmp_path):
    documents = [list(range(50_000))]
    source = WindowSource(write_stream(tmp_path / "split", documents), 32, PAD, False)
    before = source[3]
    pickled = pickle.dumps(source)
    assert len(pickled) < 1_000
    np.testing.assert_equal(pickle.loads(pickled)[3], before)


def test_tokenised_corpus_holds_every_document_once(config, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 3_000)  # so that offsets run over many batches
    tokenised = tokenise_corpus(config, open_corpus(config), tokenizer, lambda _: None)
    for stream, wanted in ((tokenised.train, False), (tokenised.validation, True)):
        documents = [text for text in texts if is_held_out(document_digest(text), config.holdout_fraction) == wanted]
        encoded = [[0, *tokenizer.encode(text), 1] for text in documents]
        assert stream.tokens.tolist() == [token for ids in encoded for token in ids]
        assert stream.starts.tolist() == np.cumsum([0] + [len(ids) for ids in encoded])[:-1].tolist()
        assert stream.tokens.dtype == np.uint16
        assert (stream.num_documents, stream.num_tokens) == (len(documents), sum(map(len, encoded)))
        assert stream.num_bytes == sum(len(text.encode()) for text in documents)
        assert tokenizer.byte_lengths()[stream.tokens].sum() == stream.num_bytes


def test_tokenised_once_and_again_when_anything_changes(config, tokenizer, texts, tmp_path):
    lines = []
    first = tokenise_corpus(config, open_corpus(config), tokenizer, lines.append)
    assert tokenise_corpus(config, open_corpus(config), tokenizer, lines.append) == first
    assert len(lines) == 1 and "Tokenised 120 documents" in lines[0]
    half = dataclasses.replace(config, holdout_fraction=0.5)
    fewer = dataclasses.replace(config, max_documents=100)
    for other in (half, fewer):
        assert tokenise_corpus(other, open_corpus(other), tokenizer, lines.append) != first
    smaller = tokenise_corpus(config, open_corpus(config), train_tokenizer(texts, 300), lines.append)
    assert smaller.train.num_tokens > first.train.num_tokens
    assert smaller.sha256 == first.sha256
    assert len(lines) == 4


def test_the_corpus_hash_is_of_the_contents(config, tokenizer, texts, tmp_path):
    first = tokenise_corpus(config, open_corpus(config), tokenizer, lambda _: None)
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    same = dataclasses.replace(config, corpus=str(tmp_path / "same.jsonl"))
    assert tokenise_corpus(same, open_corpus(same), tokenizer, lambda _: None).sha256 == first.sha256
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text + "."}) + "\n" for text in texts))
    other = dataclasses.replace(config, corpus=str(tmp_path / "other.jsonl"))
    assert tokenise_corpus(other, open_corpus(other), tokenizer, lambda _: None).sha256 != first.sha256


@pytest.mark.parametrize("file", ["train.tokens", "validation.starts", "meta.json"])
def test_a_half_written_cache_is_rebuilt(config, tokenizer, file):
    lines = []
    first = tokenise_corpus(config, open_corpus(config), tokenizer, lines.append)
    damaged = first.train.path.with_name(file)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-7])
    assert tokenise_corpus(config, open_corpus(config), tokenizer, lines.append) == first
    assert damaged.read_bytes() == content
    assert len(lines) == 2


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(config, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    stream = tokenise_corpus(config, open_corpus(config), tokenizer, lambda _: None).train
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens[0] == 0 and stream.tokens.max() < 400


def test_progress_is_reported_while_it_lasts(config, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 10_000)
    monkeypatch.setattr(packing, "SECONDS_PER_PROGRESS_LINE", 0.0)
    lines = []
    tokenise_corpus(config, open_corpus(config), tokenizer, lines.append)
    assert len(lines) > 3 and all(line.startswith("Tokenised ") for line in lines)


def test_a_corpus_without_a_hold_out(config, tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("the only document there is")
    lonely = dataclasses.replace(config, corpus=str(tmp_path / "one.txt"), holdout_fraction=0.001)
    with pytest.raises(ConfigError, match=r"none fell into the validation split at data.holdout_fraction=0.001. Raise"):
        tokenise_corpus(lonely, open_corpus(lonely), tokenizer, lambda _: None)
