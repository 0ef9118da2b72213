"""Segments: the pieces of documents in the windows that a run reads, held out or trained on.

Attention, n-gram windows and positions end with a document. So the documents of a window can be scored one by one, and
give the losses of training.

Legend: T tokens that are read, each of which predicts the next one; W windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import grain
import numpy as np

from engram_jax.data.mixture import Mixture
from engram_jax.data.packing import WindowSource


class Segment(NamedTuple):
    """A piece of a document in a window."""

    document: int
    """Number of the document in the source."""
    start: int
    """Position of `ids[0]`, in tokens from the document's bos."""
    ids: np.ndarray
    """int32 [T + 1]; the last id is only predicted."""


def segments(source: WindowSource, indices: Iterable[int]) -> list[Segment]:
    """The segments of the given windows. Pieces without an id to predict are left out."""
    return [segment for index in indices for segment in _of_window(source, int(index))]


def _of_window(source: WindowSource, index: int) -> list[Segment]:
    window, (stream, begin, first_document) = source[index], _place(source, index)
    starts, found = stream.starts, []
    for number in range(1, int(window["segment_ids"].max()) + 1):
        (places,) = np.nonzero(window["segment_ids"] == number)
        if len(places) == 0:  # the first document of a window that begins with a bos is number 2
            continue
        last_target = window["targets"][places[-1]]
        ids = window["tokens"][places]
        ids = np.append(ids, last_target).astype(np.int32) if last_target >= 0 else ids
        document = int(np.searchsorted(starts, begin + places[0], side="right")) - 1
        if len(ids) > 1:
            found.append(Segment(first_document + document, int(begin + places[0] - starts[document]), ids))
    return found


def _place(source: WindowSource, index: int):
    """The stream that holds a window, the window's first token in it, and the number of documents before the stream."""
    first_document = 0
    if isinstance(source, Mixture):
        for part in source.sources:
            if index < len(part):
                return part.stream, index * part.seq_len, first_document
            index, first_document = index - len(part), first_document + part.stream.num_documents
    return source.stream, index * source.seq_len, first_document


def spread_evenly(indices: np.ndarray, seq_len: int, most_tokens: int) -> np.ndarray:
    """All windows, or if they have more than `most_tokens`, windows evenly spread."""
    count = min(len(indices), max(1, most_tokens // seq_len))
    return indices[np.arange(count) * len(indices) // count]


def trained_windows(source: WindowSource, seed: int, count: int) -> np.ndarray:
    """The distinct windows among the first `count` that training with this `data.seed` reads, in order: int64 [W]."""
    order = window_order(source, seed)
    read = np.fromiter((order[i] for i in range(count)), np.int64, count)
    _, first = np.unique(read, return_index=True)
    return read[np.sort(first)]


def window_order(source: WindowSource, seed: int) -> grain.MapDataset:
    """`source.shuffled(seed)`, with numbers of windows instead of windows."""

    def shuffled(start: int, size: int) -> grain.MapDataset:
        return grain.MapDataset.range(start, start + size).shuffle(seed=seed).repeat()

    if not isinstance(source, Mixture):
        return shuffled(0, len(source))
    sizes = [len(part) for part in source.sources]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return grain.MapDataset.mix([shuffled(*part) for part in zip(starts, sizes, strict=True)], source.weights)
