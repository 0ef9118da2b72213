"""Held-out loss: nats per token, bits per byte, and loss by how often the last n-gram was seen in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import jax
import numpy as np

from engram_jax.data.ngram_frequency import BUCKETS, NgramCounts, bucket_names

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean nats per scored token."""
    bits_per_byte: float
    """Comparable across tokenizers."""
    num_tokens: int
    buckets: dict[str, dict[str, float]]
    """Occurrences in training -> {loss, share of tokens}; empty without counts."""

    def to_dict(self) -> dict:
        return asdict(self)


def evaluate(
    token_losses: Callable[[Batch], jax.Array | np.ndarray],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    counts: NgramCounts | None = None,
) -> Evaluation:
    """Sums in float64 over all batches.

    Args:
      token_losses: batch -> float32 [B, T], nats, 0 where the target is -1.
      byte_lengths: int [vocab_size], bytes of text each token stands for.
      counts: of the training text, for the buckets.
    """
    total, num_tokens, num_bytes = 0.0, 0, 0
    sums, sizes = np.zeros(len(BUCKETS)), np.zeros(len(BUCKETS), np.int64)
    for batch in batches:
        losses_BT = np.asarray(token_losses(batch), np.float64)
        scored_BT = batch["targets"] >= 0
        total += losses_BT[scored_BT].sum()
        num_tokens += int(scored_BT.sum())
        num_bytes += int(byte_lengths[batch["targets"][scored_BT]].sum())
        if counts is not None:
            occurrences = counts.lookup(batch["tokens"])[scored_BT]
            bucket = np.searchsorted([low for low, _ in BUCKETS], occurrences, side="right") - 1
            sums += np.bincount(bucket, losses_BT[scored_BT], len(BUCKETS))
            sizes += np.bincount(bucket, minlength=len(BUCKETS))
    by_bucket = {
        name: {"loss": float(s / n), "share": float(n / num_tokens)}
        for name, s, n in zip(bucket_names(), sums, sizes, strict=True)
        if n
    }
    return Evaluation(
        loss=float(total / max(num_tokens, 1)),
        bits_per_byte=float(total / math.log(2) / max(num_bytes, 1)),
        num_tokens=num_tokens,
        buckets=by_bucket,
    )
