"""Losses, bits per byte and frequency buckets against plain Python counting."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from engram_jax.data import ngram_frequency
from engram_jax.data.ngram_frequency import BUCKETS, NgramCounts, bucket_names
from engram_jax.training.validation import evaluate


def counted(tokens, order: int) -> Counter:
    return Counter(tuple(tokens[i - order + 1 : i + 1]) for i in range(order - 1, len(tokens)))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_counts_are_the_counters(rng, order):
    stream = rng.integers(0, 5, 3000)
    tokens_BT = rng.integers(0, 6, (4, 50))  # token 5 is in no trained n-gram
    reference = counted(stream.tolist(), order)
    expected_BT = [
        [0 if t < order - 1 else reference[tuple(row[t - order + 1 : t + 1])] for t in range(50)]
        for row in tokens_BT.tolist()
    ]
    counts_BT = NgramCounts.of(stream.astype(np.uint16), order).lookup(tokens_BT.astype(np.int32))
    np.testing.assert_array_equal(counts_BT, expected_BT)
    assert counts_BT.max() > 0


def test_counts_of_a_large_vocabulary(rng):
    """Ids that do not fit 16 bits, id 0 at the start, and no two n-grams taken for one."""
    stream = rng.integers(0, 129_280, 20_000).astype(np.uint32)
    stream[:2] = 0
    counts = NgramCounts.of(stream, 3)
    # The stream's first two positions have shorter n-grams, which count as n-grams of their own.
    assert len(counts.keys) == len(counted(stream.tolist(), 3)) + 2
    assert counts.counts.sum() == len(stream)
    np.testing.assert_array_equal(counts.lookup(stream[None].astype(np.int32))[0, 2:], 1)


def test_the_last_id_of_16_bits_and_texts_shorter_than_an_ngram():
    stream = np.array([7, 65_535, 8, 7, 65_535, 8], np.uint16)
    counts = NgramCounts.of(stream, 3)
    assert counts.lookup(np.array([[7, 65_535, 8]]))[0, 2] == 2
    for length in (1, 2, 3):
        assert (NgramCounts.of(stream, 5).lookup(np.ones((1, length), np.int32)) == 0).all()


def test_counting_stops_at_its_limit(rng, monkeypatch):
    monkeypatch.setattr(ngram_frequency, "MAX_TOKENS", 100)
    stream = rng.integers(0, 4, 1000)
    ours, short = NgramCounts.of(stream, 2), NgramCounts.of(stream[:100], 2)
    np.testing.assert_array_equal(ours.counts, short.counts)
    assert ours.counts.sum() == 100


def test_bucket_names_are_their_ranges():
    assert bucket_names() == ["0", "1-3", "4-15", "16-63", "64+"]
    for (_, high), (low, _) in itertools.pairwise(BUCKETS):
        assert low == high + 1, "a count that is in no bucket, or in two"


def make_batches(rng, count: int, vocab_size: int):
    """Batches in which a third of the positions is not scored; some tokens stand for no byte."""
    batches, losses = [], []
    for _ in range(count):
        targets = rng.integers(0, vocab_size, (3, 40))
        targets[rng.random((3, 40)) < 1 / 3] = -1
        batches.append({"tokens": rng.integers(0, vocab_size, (3, 40)), "targets": targets})
        losses.append(np.where(targets < 0, 0, rng.gamma(2, 2, (3, 40))).astype(np.float32))
    return batches, losses, rng.integers(0, 9, vocab_size)


def test_evaluation_is_the_plain_sum(rng):
    stream = np.repeat(rng.integers(0, 12, 900), rng.integers(1, 3, 900))
    batches, losses, byte_lengths = make_batches(rng, 4, 12)
    reference = counted(stream.tolist(), 2)
    total, num_bytes, by_bucket = 0.0, 0, {name: [] for name in bucket_names()}
    for batch, losses_BT in zip(batches, losses, strict=True):
        for b in range(3):
            for t in range(40):
                target = batch["targets"][b, t]
                if target < 0:
                    continue
                total += float(losses_BT[b, t])
                num_bytes += int(byte_lengths[target])
                seen = reference[tuple(batch["tokens"][b, t - 1 : t + 1].tolist())] if t else 0
                [name] = [
                    name
                    for name, (low, high) in zip(bucket_names(), BUCKETS, strict=True)
                    if low <= seen and (high is None or seen <= high)
                ]
                by_bucket[name].append(float(losses_BT[b, t]))
    num_tokens = sum(map(len, by_bucket.values()))

    returned = iter(losses)
    result = evaluate(lambda batch: next(returned), batches, byte_lengths, NgramCounts.of(stream, 2))
    assert result.num_tokens == num_tokens
    assert result.loss == pytest.approx(total / num_tokens, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-12)
    assert set(result.buckets) == {name for name, values in by_bucket.items() if values} and len(result.buckets) > 2
    for name, bucket in result.buckets.items():
        assert bucket["loss"] == pytest.approx(np.mean(by_bucket[name]), rel=1e-12)
        assert bucket["share"] == pytest.approx(len(by_bucket[name]) / num_tokens, rel=1e-12)
    assert result.loss == pytest.approx(sum(b["loss"] * b["share"] for b in result.buckets.values()), rel=1e-12)
    assert result.to_dict()["buckets"] == result.buckets


def test_without_counts_there_are_no_buckets(rng):
    batches, losses, byte_lengths = make_batches(rng, 1, 12)
    assert evaluate(lambda batch: losses[0], batches, byte_lengths).buckets == {}


def test_the_sum_does_not_lose_small_losses(rng):
    """One large loss, then many that float32 would round away beside it."""
    batch = {"tokens": np.zeros((1, 2000), int), "targets": np.zeros((1, 2000), int)}
    losses = np.full((1, 2000), 1e-5, np.float32)
    losses[0, 0] = 1e3
    result = evaluate(lambda batch: losses, [batch], np.ones(1, int))
    assert result.loss * 2000 - 1e3 == pytest.approx(1999 * 1e-5, rel=1e-5)
