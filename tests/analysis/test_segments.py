"""Pieces of documents in windows, against the documents; the order of training against grain's own."""

import numpy as np
import pytest

from engram_jax.analysis.segments import segments, spread_evenly, trained_windows, window_order
from engram_jax.data.mixture import Mixture
from engram_jax.data.packing import TokenStream, WindowSource

BOS, EOS = 0, 1
SEQ_LEN = 16


def make_stream(rng, folder, name, num_documents):
    documents = [
        np.array([BOS, *rng.integers(3, 250, rng.integers(0, 40)), EOS], np.uint16) for _ in range(num_documents)
    ]
    tokens, starts = np.concatenate(documents), np.cumsum([0, *map(len, documents)])[:-1]
    (folder / f"{name}.tokens").write_bytes(tokens.astype("<u2").tobytes())
    (folder / f"{name}.starts").write_bytes(starts.astype("<i8").tobytes())
    return documents, TokenStream(folder / name, "<u2", len(tokens), num_documents, 1)


@pytest.fixture
def streams(tmp_path, rng):
    return [make_stream(rng, tmp_path, name, count) for name, count in (("a", 30), ("b", 11))]


@pytest.fixture
def mixture(streams):
    sources = [WindowSource(stream, SEQ_LEN, 2, keep_partial=False) for _, stream in streams]
    return Mixture(sources, [0.7, 0.3])


def test_segments_are_pieces_of_their_documents_and_ask_for_every_token_once(streams):
    documents, stream = streams[0]
    source = WindowSource(stream, SEQ_LEN, 2, keep_partial=True)
    asked = [np.zeros(len(document), int) for document in documents]
    for document, start, ids in segments(source, range(len(source))):
        np.testing.assert_array_equal(ids, documents[document][start : start + len(ids)])
        assert len(ids) > 1
        asked[document][start + 1 : start + len(ids)] += 1
    for counts in asked:
        assert counts[0] == 0 and (counts[1:] == 1).all()


def test_segments_of_a_mixture_count_the_documents_of_all_sources(streams, mixture):
    documents = [document for ours, _ in streams for document in ours]
    found = segments(mixture, range(len(mixture)))
    for document, start, ids in found:
        np.testing.assert_array_equal(ids, documents[document][start : start + len(ids)])
    assert max(segment.document for segment in found) >= 30


@pytest.mark.parametrize("mixed", [False, True])
def test_windows_in_the_order_of_training(streams, mixture, mixed):
    """Over more than an epoch."""
    source = mixture if mixed else WindowSource(streams[0][1], SEQ_LEN, 2, keep_partial=False)
    shuffled, order = source.shuffled(7), window_order(source, 7)
    count = 2 * len(source) + 3
    for i in range(count):
        np.testing.assert_array_equal(source[order[i]]["tokens"], shuffled[i]["tokens"])
    read = [int(order[i]) for i in range(count)]
    assert trained_windows(source, 7, count).tolist() == list(dict.fromkeys(read))
    assert trained_windows(source, 7, 5).tolist() == list(dict.fromkeys(read[:5]))


def test_evenly_spread():
    indices = np.arange(100, 200)
    assert spread_evenly(indices, 16, 10_000).tolist() == indices.tolist()
    assert spread_evenly(indices, 16, 16 * 4).tolist() == [100, 125, 150, 175]
    assert spread_evenly(indices, 16, 1).tolist() == [100]
