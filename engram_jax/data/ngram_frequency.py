"""How often the n-gram that ends at a token occurs in the training text.

A row can only know what its n-gram was seen to precede, so losses are also given by that frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BUCKETS = ((0, 0), (1, 3), (4, 15), (16, 63), (64, None))
"""Occurrences in the training text, both ends included."""
MAX_TOKENS = 50_000_000  # counting sorts one 64-bit key per token


def bucket_names() -> list[str]:
    return [str(low) if low == high else f"{low}+" if high is None else f"{low}-{high}" for low, high in BUCKETS]


@dataclass(frozen=True)
class NgramCounts:
    """Counts of all n-grams of one order."""

    order: int
    keys: np.ndarray  # uint64 [distinct], ascending
    counts: np.ndarray  # int64 [distinct]

    @classmethod
    def of(cls, tokens: np.ndarray, order: int) -> NgramCounts:
        """Counts in a token stream (its first 50 M tokens); documents are told apart by their own bos and eos."""
        keys, counts = np.unique(_ngram_keys(np.asarray(tokens[:MAX_TOKENS]), order), return_counts=True)
        return cls(order, keys, counts)

    @classmethod
    def of_windows(cls, tokens_WT: np.ndarray, order: int) -> NgramCounts:
        """Counts in windows of text, none reaching from one into the next."""
        keys = _ngram_keys(np.asarray(tokens_WT), order)[:, order - 1 :]
        keys, counts = np.unique(keys, return_counts=True)
        return cls(order, keys, counts)

    def lookup(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Occurrences of the n-gram that ends at each position: [B, T]; shorter ones at the start count as unseen."""
        keys_BT = _ngram_keys(tokens_BT, self.order)
        index = np.minimum(np.searchsorted(self.keys, keys_BT), len(self.keys) - 1)
        counts_BT = np.where(self.keys[index] == keys_BT, self.counts[index], 0)
        counts_BT[..., : self.order - 1] = 0
        return counts_BT


def _ngram_keys(tokens: np.ndarray, order: int) -> np.ndarray:
    """64-bit keys; among 5 M distinct n-grams two collide with probability below 1e-6."""
    multiplier, keys = np.uint64(0x9E3779B97F4A7C15), np.zeros(tokens.shape, np.uint64)
    for steps in range(order - 1, -1, -1):
        older = np.zeros_like(keys)
        # Wider before the sum: a stream of 2^16 tokens is stored as uint16.
        older[..., steps:] = tokens[..., : max(tokens.shape[-1] - steps, 0)].astype(np.uint64) + np.uint64(1)
        keys = (keys + older) * multiplier
        keys ^= keys >> np.uint64(29)
    return keys
