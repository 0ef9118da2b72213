"""Owners of rows: the n-grams of a text, the rows that they read, n-grams that share a row, and rows that lie close.

Hashing goes one way, from n-gram to row. To find the owners of a row, every n-gram of a text is hashed.

Legend: T tokens of a text, G distinct n-grams of it, N their order, K heads of that order, R rows, D row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engram_jax.config import require
from engram_jax.memory.hashing import HashConstants, ngram_row_ids_numpy


@dataclass(frozen=True, eq=False)
class Ngrams:
    """The distinct n-grams of one order in a text, the most frequent first; equally frequent ones as they occur."""

    ngrams_GN: np.ndarray
    """int32, canonical ids, oldest first; the pad id where a window reaches past its document's start."""
    counts_G: np.ndarray
    """int64, occurrences in the text."""
    first_G: np.ndarray
    """int64, the position where the n-gram's first occurrence ends, to show it as it was written."""

    @classmethod
    def of(cls, canonical_T: np.ndarray, starts: np.ndarray | None, order: int, pad_id: int) -> Ngrams:
        """Every window of `order` tokens, cut off as the memory cuts it.

        Args:
          canonical_T: canonical ids (memory/compression.py) of documents one after the other.
          starts: offset of each document. None: windows run across documents (engram_cross_documents).
          pad_id: `HashConstants.pad_id`.

        Raises:
          ConfigError: no tokens, or an order below 2.
        """
        require(order >= 2 and len(canonical_T) > 0, f"order={order} over {len(canonical_T)} tokens has no n-grams.")
        ids_T = np.asarray(canonical_T, np.int64)
        positions_T = np.arange(len(ids_T))
        begun = np.array([0] if starts is None else starts)
        start_T = begun[np.searchsorted(begun, positions_T, side="right") - 1]
        windows_TN = np.full((len(ids_T), order), pad_id, np.int32)
        key_T, bound = np.zeros(len(ids_T), np.int64), max(int(ids_T.max()), pad_id) + 1
        for steps in range(order):
            older_T = np.where(positions_T - steps >= start_T, ids_T[positions_T - steps], pad_id)
            windows_TN[:, order - 1 - steps] = older_T
            # Ranks below T, so that the next product stays far from 2^63 at any order.
            _, key_T = np.unique(key_T * bound + older_T, return_inverse=True)
        _, first_G, counts_G = np.unique(key_T, return_index=True, return_counts=True)
        by_count = np.lexsort((first_G, -counts_G))
        first_G, counts_G = first_G[by_count], counts_G[by_count]
        return cls(windows_TN[first_G], counts_G, first_G)

    def __len__(self) -> int:
        return len(self.counts_G)

    @property
    def order(self) -> int:
        return self.ngrams_GN.shape[1]

    @cached_property
    def _index(self) -> dict[tuple[int, ...], int]:
        return {tuple(ngram): g for g, ngram in enumerate(self.ngrams_GN.tolist())}

    def index(self, ngram: Sequence[int]) -> int | None:
        """The n-gram's place in the arrays; None if the text does not have it."""
        return self._index.get(tuple(int(i) for i in ngram))

    def rows(self, constants: HashConstants, layer_id: int) -> np.ndarray:
        """The rows that each n-gram reads in a layer's table: int32 [G, K], heads of this order only.

        Raises:
          ConfigError: the memory has no heads for this order.
        """
        orders = len(constants.primes[0]) + 1
        require(self.order <= orders, f"order={self.order}: this memory reads n-grams of 2 to {orders} tokens.")
        heads = len(constants.primes[0][0])
        # An n-gram written out as a text of its own reads what it reads anywhere: the pad is just another id.
        rows_GH = ngram_row_ids_numpy(constants, layer_id, self.ngrams_GN)[:, -1]
        return rows_GH[:, (self.order - 2) * heads : (self.order - 1) * heads]


def owners(rows_GK: np.ndarray, row: int) -> np.ndarray:
    """Indices (int64) of the n-grams that read a row, the most frequent first."""
    return np.flatnonzero((rows_GK == row).any(axis=1))


def shared_in_heads(rows_GK: np.ndarray) -> np.ndarray:
    """Number of heads in which each n-gram shares its row with another n-gram: int64 [G], 0..K."""
    return sum((_group_sizes(rows_G) > 1).astype(np.int64) for rows_G in rows_GK.T)  # type: ignore[return-value]


def has_twin(rows_GK: np.ndarray) -> np.ndarray:
    """Whether another n-gram shares *all* of its rows, so that the memory cannot tell the two apart: bool [G]."""
    together_G = np.zeros(len(rows_GK), np.int64)
    for rows_G in rows_GK.T:
        _, together_G = np.unique(together_G * (int(rows_GK.max()) + 1) + rows_G, return_inverse=True)
    return _group_sizes(together_G) > 1


def expected_share(num_ngrams: int, num_rows: int | np.ndarray) -> np.ndarray:
    """Probability that an n-gram shares its row in one head, if n-grams fall on rows at random."""
    return 1 - (1 - 1 / np.asarray(num_rows, np.float64)) ** (num_ngrams - 1)


def nearest(vectors_RD: np.ndarray, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` vectors with the greatest cosine to one of them, itself left out.

    Returns:
      (int64 indices, cosines), the nearest first. A vector of zeros has the cosine 0.
    """
    norms_R = np.linalg.norm(vectors_RD, axis=1)
    products_R = vectors_RD @ vectors_RD[index]
    cosines_R = np.divide(products_R, norms_R * norms_R[index], out=np.zeros_like(products_R), where=products_R != 0)
    ranked = np.argsort(-cosines_R, kind="stable")
    chosen = ranked[ranked != index][:count]
    return chosen, cosines_R[chosen]


def _group_sizes(labels_G: np.ndarray) -> np.ndarray:
    """For each entry, how many entries equal it."""
    _, inverse_G, sizes = np.unique(labels_G, return_inverse=True, return_counts=True)
    return sizes[inverse_G]
