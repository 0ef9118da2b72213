"""The perplexity task against plain Python over the documents' texts."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.data.corpora import document_digest, is_held_out
from engram_jax.data.ngram_frequency import BUCKETS, NgramCounts, bucket_names
from engram_jax.evaluation.corpus_perplexity import POSITIONS, Perplexity, Tally, position_bucket, position_names
from engram_jax.evaluation.evaluated_run import Scored
from engram_jax.evaluation.statistics import ratio
from engram_jax.evaluation.tasks import Shared


@pytest.fixture(scope="module")
def texts(corpus):
    return [path.read_text() for path in sorted(corpus.iterdir())]


@pytest.fixture(scope="module")
def held_out(texts):
    return [text for text in texts if is_held_out(document_digest(text), 0.2)]


@pytest.fixture(scope="module")
def own(model):
    return Perplexity()(model, Shared())


def alone(model, ids, context, stride):
    """Losses by the definition, every id from a sequence of its own."""
    chunks = []
    for position in range(1, len(ids)):
        windows_before = max(0, -(-(position - context) // stride))
        start = windows_before * stride
        chunks.append(ids[start : position + 1])
    return np.array([scored.losses[-1] for scored in model.score(chunks)], np.float64)


def encoded(model, text):
    return [model.tokenizer.bos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id]


def test_held_out_documents_by_the_definition(model, held_out, own):
    """The shortest three and the longest one of the held-out documents, and the sums over all of them."""
    per_document, details = own.details["per_document"], own.details
    documents = [encoded(model, text) for text in held_out]
    assert details["num_documents"] == len(documents) > 5
    assert per_document["tokens"] == [len(ids) - 1 for ids in documents]
    assert per_document["bytes"] == [len(text.encode()) for text in held_out]
    assert (details["context"], details["stride"]) == (64, 32)
    by_length = np.argsort([len(ids) for ids in documents])
    assert len(documents[by_length[-1]]) > 3 * 64
    for index in [*by_length[:3], by_length[-1]]:
        losses = alone(model, documents[index], 64, 32)
        assert per_document["loss"][index] == pytest.approx(losses.sum(), rel=1e-4)


def test_metrics_follow_from_the_documents(own):
    losses, tokens, num_bytes = (np.array(own.details["per_document"][key]) for key in ("loss", "tokens", "bytes"))
    loss, bits = own.metrics["loss"], own.metrics["bits_per_byte"]
    assert loss.value == pytest.approx(losses.sum() / tokens.sum()) and loss.count == tokens.sum()
    assert loss.stderr == pytest.approx(ratio(losses, tokens).stderr)
    assert own.metrics["perplexity"].value == pytest.approx(math.exp(loss.value))
    assert bits.value == pytest.approx(losses.sum() / math.log(2) / num_bytes.sum())
    assert bits.stderr == pytest.approx(ratio(losses / math.log(2), num_bytes).stderr)
    for key in ("by_position", "by_ngram_frequency"):
        buckets = own.details[key].values()
        assert sum(b["share"] for b in buckets) == pytest.approx(1)
        assert sum(b["share"] * b["loss"] for b in buckets) == pytest.approx(loss.value)


def test_another_corpus_has_its_own_documents(model, texts, held_out, own, tmp_path):
    """The held-out documents again, from a JSONL file: the same tokens, the same numbers."""
    file = tmp_path / "books.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in held_out))
    result = Perplexity()(model, Shared(corpus=str(file), text_key="body"))
    assert result.details["documents_sha256"] == own.details["documents_sha256"]
    np.testing.assert_allclose(result.details["per_document"]["loss"], own.details["per_document"]["loss"], rtol=1e-5)
    first = Perplexity(ngram_order=0)(model, Shared(corpus=str(file), text_key="body", limit=2))
    assert first.details["per_document"]["tokens"] == own.details["per_document"]["tokens"][:2]
    assert first.details["by_ngram_frequency"] == {}


def test_several_sources_are_read_one_after_the_other(model, held_out, own, tmp_path):
    """In whole, whatever their weights; and one word moved across a boundary is another text."""
    for name, texts in (("a", held_out[:3]), ("b", held_out[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shared = Shared(corpus=f"{tmp_path}/a.jsonl:0.9,{tmp_path}/b.jsonl:0.1")
    result = Perplexity(ngram_order=0)(model, shared)
    assert result.details["documents_sha256"] == own.details["documents_sha256"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "".join(held_out[:3])}) + "\n")
    assert Perplexity(ngram_order=0)(model, shared).details["documents_sha256"] != own.details["documents_sha256"]


def test_a_limit_spreads_over_the_held_out_documents(model, own):
    few = Perplexity(ngram_order=0)(model, Shared(limit=3)).details["per_document"]["tokens"]
    everything = own.details["per_document"]["tokens"]
    assert few == [everything[i * len(everything) // 3] for i in range(3)]


def test_buckets_are_plain_counting(rng):
    """Each loss in the bucket of the bigram that ends before its token, and of its position; errors by document."""
    stream = rng.integers(0, 6, 4000)
    tally, reference = Tally(np.ones(6, int), NgramCounts.of(stream, 2)), Counter(itertools.pairwise(stream.tolist()))
    by_frequency = {name: [[] for _ in range(12)] for name in bucket_names()}
    by_position = {name: [[] for _ in range(12)] for name in position_names()}
    for document in range(12):
        ids = rng.integers(0, 7, rng.integers(2, 150)).clip(0, 5)
        losses = rng.gamma(2, 2, len(ids) - 1).astype(np.float32)
        tally.add(ids, Scored(losses, losses < 1))
        for t, loss in enumerate(losses, start=1):
            seen = reference[ids[t - 2], ids[t - 1]] if t > 1 else 0
            [name] = [
                name
                for name, (low, high) in zip(bucket_names(), BUCKETS, strict=True)
                if low <= seen and (high is None or seen <= high)
            ]
            by_frequency[name][document].append(float(loss))
            name = "1-31" if t < 32 else "32-63" if t < 64 else "64-127" if t < 128 else "128-255"
            by_position[name][document].append(float(loss))
    details = tally.result().details
    for found, expected in ((details["by_ngram_frequency"], by_frequency), (details["by_position"], by_position)):
        expected = {name: documents for name, documents in expected.items() if any(documents)}
        assert set(found) == set(expected)
        for name, documents in expected.items():
            metric = ratio([sum(losses) for losses in documents], [len(losses) for losses in documents])
            assert found[name]["loss"] == pytest.approx(metric.value)
            assert found[name]["stderr"] == pytest.approx(metric.stderr)


def test_positions_have_one_bucket_each():
    for position in (1, 31, 32, 63, 64, 5000, 1 << 21, 1 << 30):
        low, _, high = position_names()[position_bucket(np.array(position))].rstrip("+").partition("-")
        assert int(low) <= position and (not high or position <= int(high))
    assert len(position_names()) == len(POSITIONS)


def test_a_longer_context_says_what_was_trained(model):
    lines = []
    model = dataclasses.replace(model, log=lines.append, _said=set())
    result = Perplexity(context=128, stride=128, ngram_order=0)(model, Shared(limit=3))
    assert result.details["num_tokens"] > 0
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1 and "trained with data.seq_len=64" in warnings[0]


def test_training_text_that_is_gone_costs_the_buckets_only(model, held_out, tmp_path, monkeypatch):
    """The text of a run copied from elsewhere is not here, another text is."""

    def gone(*_):
        raise ConfigError("data.corpus='elsewhere': no such file.")

    monkeypatch.setattr("engram_jax.evaluation.documents.load_data", gone)
    (tmp_path / "a.txt").write_text(held_out[0])
    result = Perplexity()(model, Shared(corpus=str(tmp_path)))
    assert result.details["by_ngram_frequency"] == {} and result.details["num_documents"] == 1
    with pytest.raises(ConfigError, match="elsewhere"):
        Perplexity(ngram_order=0)(model, Shared())


def test_a_tokenizer_that_is_no_longer_the_runs(model, monkeypatch, rng):
    from engram_jax.evaluation.documents import OwnText

    with monkeypatch.context() as patched:
        patched.setattr(type(model.tokenizer.backend), "to_str", lambda self: str(rng.random()), raising=False)
        with pytest.raises(ConfigError, match="--corpus"):
            _ = OwnText(model).data


@pytest.mark.parametrize(
    ("task", "shared", "message"),
    [
        (Perplexity(stride=65), Shared(), "perplexity.stride=65"),
        (Perplexity(), Shared(corpus="/nowhere/at/all"), "--corpus='/nowhere/at/all'"),
    ],
)
def test_settings_that_cannot_work(model, task, shared, message):
    with pytest.raises(ConfigError, match=message):
        task(model, shared)


def test_a_corpus_without_text(model, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"--corpus='.*' holds no text"):
        Perplexity(ngram_order=0)(model, Shared(corpus=str(tmp_path)))
