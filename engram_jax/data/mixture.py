"""Several corpora in fixed shares: `data.corpus = "python:0.7,/books:0.3"`.

A batch's windows come from the sources in turn, in proportion to the weights (grain's mixing), so every stretch of the
stream has the shares, and the batch stays a function of (seed, step). Each source has its own shuffle and repeats when
it is used up: a share is of windows, whatever the source's size. The hold-out is every source's own, end to end.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from engram_jax.config import DataConfig, require
from engram_jax.data.corpora import Corpus, open_corpus
from engram_jax.data.packing import START_DTYPE, TokenStream, WindowSource

COUNTED_TOKENS = 50_000_000
"""Of each source, in `Mixture.stream`: as many as n-grams are counted in."""


def parse_mixture(corpus: str) -> list[tuple[str, float]]:
    """The sources and weights that `data.corpus` names; one of weight 1 if it is no list of NAME:WEIGHT.

    Raises:
      ConfigError: a weight that is not positive, or a source named twice.
    """
    named = [part.strip().rpartition(":") for part in corpus.split(",")]
    if len(named) < 2 or not all(name and _is_number(weight) for name, _, weight in named):
        return [(corpus, 1.0)]
    sources = [(name, float(weight)) for name, _, weight in named]
    for name, weight in sources:
        require(0 < weight < math.inf, f"data.corpus={corpus!r}: the weight of {name!r} must be positive.")
    require(len(dict(sources)) == len(sources), f"data.corpus={corpus!r} names a source twice: add up its weights.")
    return sources


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def open_sources(config: DataConfig) -> list[tuple[Corpus, float]]:
    """The corpora of `config.corpus` with their weights. Raises as `open_corpus` and `parse_mixture` do."""
    return [(open_corpus(replace(config, corpus=name)), weight) for name, weight in parse_mixture(config.corpus)]


def chained(name: str, corpora: Sequence[Corpus]) -> Corpus:
    """One corpus after the other, for what is made from all of them: the tokenizer."""
    if len(corpora) == 1:
        return corpora[0]
    fingerprint = hashlib.sha256("\n".join(corpus.fingerprint for corpus in corpora).encode()).hexdigest()
    return Corpus(name, fingerprint, lambda: itertools.chain.from_iterable(corpora))


@dataclass(frozen=True)
class ChainedStream(TokenStream):
    """Token streams end to end. Arrays are joined in memory when they are first used."""

    parts: tuple[TokenStream, ...] = ()
    longest: int | None = None
    """Tokens taken of each part, from its beginning; None: all."""

    @classmethod
    def of(cls, parts: Sequence[TokenStream], longest: int | None = None) -> ChainedStream:
        totals = {name: sum(getattr(p, name) for p in parts) for name in ("num_documents", "num_bytes")}
        num_tokens = sum(min(p.num_tokens, longest or p.num_tokens) for p in parts)
        return cls(Path(), parts[0].dtype, num_tokens, **totals, parts=tuple(parts), longest=longest)

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.concatenate([part.tokens[: self.longest] for part in self.parts])

    @cached_property
    def starts(self) -> np.ndarray:
        offsets = np.cumsum([0, *(min(p.num_tokens, self.longest or p.num_tokens) for p in self.parts[:-1])])
        starts = [p.starts[p.starts[:] < (self.longest or p.num_tokens)] for p in self.parts]
        return np.concatenate([s + offset for s, offset in zip(starts, offsets, strict=True)]).astype(START_DTYPE)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChainedStream.of, (self.parts, self.longest)


class Mixture(WindowSource):
    """Windows of several sources. Random access goes through them end to end; `shuffled` mixes them by weight.

    `stream` has the first 50 M tokens of each source, for counting n-grams.
    """

    def __init__(self, sources: Sequence[WindowSource], weights: Sequence[float]):
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.stream = ChainedStream.of([source.stream for source in sources], COUNTED_TOKENS)
        self.seq_len, self.pad_id = sources[0].seq_len, sources[0].pad_id
        self._ends = np.cumsum([len(source) for source in sources])
        self.num_windows = int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - int(self._ends[which]) + len(self.sources[which])]

    def shuffled(self, seed: int) -> grain.MapDataset:
        return grain.MapDataset.mix([source.shuffled(seed) for source in self.sources], self.weights)
